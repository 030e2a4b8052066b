"""Files of history as blocks: the same rows in the same block however reading begins, and what cannot be sent with its row."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smdih_client import history
from smdih_client.backfill import Counts, Job, Progress, fingerprint, jobs
from smdih_client.history import NO_NUMBER, NO_TIME, blocks
from smdih_client.recording import NotARecording

START_S = 1_500_000_000


def _csv(path: Path, rows: int) -> Path:
    lines = [f"{START_S + row},{row},{row / 2}" for row in range(rows)]
    path.write_text("time,a,b\n" + "\n".join(lines) + "\n")
    return path


def _parquet(path: Path, rows: int) -> Path:
    times = pa.array(np.arange(START_S, START_S + rows) * 1000, pa.timestamp("ms", tz="UTC"))
    a = pa.array(np.arange(rows), pa.int32())
    b = pa.array([None if row % 7 == 0 else row / 2 for row in range(rows)], pa.float32())
    pq.write_table(pa.table({"time": times, "a": a, "b": b}), path, row_group_size=333)
    return path


@pytest.mark.parametrize("name", ["press.csv", "press.parquet"])
def test_blocks_are_the_same_wherever_reading_begins(tmp_path: Path, name: str) -> None:
    path = (_csv if name.endswith("csv") else _parquet)(tmp_path / name, 1_750)
    whole = list(blocks(path))
    assert [block.number for block in whole] == [0, 1, 2, 3]
    assert [block.rows_read for block in whole] == [500, 500, 500, 250]
    assert np.concatenate([block.rows for block in whole]).tolist() == list(range(1, 1_751))
    times = np.concatenate([block.times_us for block in whole])
    assert times.tolist() == [(START_S + row) * 1_000_000 for row in range(1_750)]
    values = np.concatenate([block.values for block in whole])
    assert values[:, 0].tolist() == list(range(1_750))
    assert np.isnan(values[7, 1]) == (name == "press.parquet")
    rest = list(blocks(path, first=2))
    assert [block.number for block in rest] == [2, 3]
    for one, other in zip(rest, whole[2:], strict=True):
        np.testing.assert_array_equal(one.times_us, other.times_us)
        np.testing.assert_array_equal(one.values, other.values)


def test_a_block_of_many_columns_has_few_rows(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    columns = history.CELLS_PER_BLOCK_MAX // 10
    header = "t," + ",".join(f"s{column}" for column in range(columns))
    path.write_text("\n".join([header, *(f"{START_S + row}" + ",1" * columns for row in range(25))]))
    assert [block.rows_read for block in blocks(path)] == [10, 10, 5]


def test_what_cannot_be_sent_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "press.csv"
    path.write_text(f"t;a;b\n{START_S};1,5;2\n\nnoon;1;2\n{START_S + 1};;warm\n{START_S + 2};3;4;5\n")
    (block,) = blocks(path)
    assert block.samples == 4
    assert [(one.reason, one.row, one.cells) for one in block.left_out] == [
        (NO_TIME, 2, 2),
        (NO_NUMBER, 4, 1),
        (NO_NUMBER, 3, 1),
    ]
    assert "b: 'warm'" in block.left_out[-1].detail


@pytest.mark.parametrize("cell", ['"4', '"4"x', '"' + "4" * 200_000, "4" * 200_000])
def test_a_row_that_is_no_csv_costs_no_other_row(tmp_path: Path, cell: str) -> None:
    path = _csv(tmp_path / "press.csv", 600)
    lines = path.read_text().splitlines()
    lines[5] = f"{START_S + 4},{cell},2"
    path.write_text("\n".join(lines))
    first, second = blocks(path)
    assert (first.rows_read, second.rows_read) == (500, 100)
    assert first.rows.tolist() == [1, 2, 3, 4, *range(6, 501)]
    assert first.values[4:, 0].tolist() == list(range(5, 500))
    ((reason, row, cells),) = [(one.reason, one.row, one.cells) for one in first.left_out]
    assert (reason, row, cells) == (NO_NUMBER, 5, 2)


def test_parquet_columns_that_are_no_numbers_and_rows_without_a_time_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "press.parquet"
    stamps = [datetime(2020, 1, 1, tzinfo=UTC), None, datetime(2020, 1, 2, tzinfo=UTC)]
    table = pa.table(
        {
            "at": pa.array(stamps, pa.timestamp("ns", tz="UTC")),
            "on": [True, False, None],
            "name": ["x", None, "y"],
            "count": pa.array([1, 2, 3], pa.uint64()),
        }
    )
    pq.write_table(table, path)
    (block,) = blocks(path)
    assert block.times_us.tolist() == [1577836800_000_000, 1577923200_000_000]
    np.testing.assert_array_equal(block.values, [[1, np.nan, 1], [np.nan, np.nan, 3]])
    assert sorted((one.reason, one.row, one.cells) for one in block.left_out) == [
        (NO_NUMBER, 1, 1),
        (NO_NUMBER, 3, 1),
        (NO_TIME, 2, 2),
    ]


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1"])
def test_a_file_that_is_something_else_says_so(tmp_path: Path, content: bytes) -> None:
    for name in ("press.csv", "press.parquet"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(NotARecording):
            list(blocks(path))


def test_a_folder_names_machines_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "acme" / "leeds"
    folder.mkdir(parents=True)
    _csv(folder / "press-3.csv", 1)
    _parquet(folder / "press-4.parquet", 1)
    (folder / "notes.txt").write_text("no telemetry")
    assert [(job.name, job.machine) for job in jobs(tmp_path, "")] == [
        ("acme/leeds/press-3.csv", "acme/leeds/press-3"),
        ("acme/leeds/press-4.parquet", "acme/leeds/press-4"),
    ]
    with pytest.raises(NotARecording, match="--machine"):
        jobs(folder / "press-3.csv", "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotARecording, match="holds no file"):
        jobs(tmp_path / "empty", "")


def test_progress_is_kept_and_a_changed_file_is_not_taken_up_again(tmp_path: Path) -> None:
    job = Job(_csv(tmp_path / "press.csv", 10), "press.csv", "acme/leeds/press")
    path = tmp_path / "progress.json"
    counts = Counts(rows=500, stored=900, quarantined=3, reasons={"OUT_OF_RANGE": 3})
    Progress(path).move(job, fingerprint(job), 1, counts, is_done=False)
    assert Progress(path).of(job, fingerprint(job)) == (1, counts, False)
    assert Progress(path).of(Job(job.path, "other.csv", "m"), "") == (0, Counts(), False)
    _csv(job.path, 11)
    with pytest.raises(NotARecording, match="has changed"):
        Progress(path).of(job, fingerprint(job))
    # By one digit far from both ends.
    _csv(job.path, 200_000)
    before, content = fingerprint(job), bytearray(job.path.read_bytes())
    assert len(content) > 3 * 1024 * 1024
    middle = content.index(b",100000,")
    content[middle + 2] ^= 1
    job.path.write_bytes(content)
    assert fingerprint(job) != before
    path.write_text("[]")
    with pytest.raises(NotARecording, match="no progress file"):
        Progress(path)
