"""CSV files as people have them."""

from pathlib import Path

import numpy as np
import pytest

from smdih_client.recording import NotARecording, read


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recording.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "timestamp,a,b\n2026-01-01 00:00:00,1,2\n2026-01-01 00:00:01,,4\n",
        "timestamp;a;b\n2026-01-01T00:00:00Z;1,0;2\n2026-01-01T01:00:01+01:00;;4,0\n",
        "timestamp\ta\tb\n1767225600\t1\t2\n1767225601\tnan\t4\n",
        "timestamp,a,b\n1767225600000,1,2\n1767225601000,,4\n",
        "timestamp,a,b\n01/01/2026 00:00:00,1,2\n01/01/2026 00:00:01,,4\n",
    ],
)
def test_separators_and_times_are_understood(tmp_path: Path, text: str) -> None:
    recording = read(_file(tmp_path, text))
    assert recording.names == ("a", "b")
    assert recording.times_us.tolist() == [1767225600_000_000, 1767225601_000_000]
    np.testing.assert_array_equal(recording.values, [[1, 2], [np.nan, 4]])
    assert recording.refused == 0


def test_a_date_with_the_month_first_is_no_time_rather_than_another_one(tmp_path: Path) -> None:
    recording = read(_file(tmp_path, "t,a\n03/04/2026 12:00:00,1\n03/13/2026 12:00:00,2\n"))
    assert recording.times_us.tolist() == [1775217600_000_000]  # 3 April
    assert recording.refused == 1


def test_a_quote_without_an_end_costs_its_row_and_no_other(tmp_path: Path) -> None:
    rows = [f"{1767225600 + n},{n},0" for n in range(10)]
    rows[3] = '1767225603,"3,0'
    recording = read(_file(tmp_path, "t,a,b\n" + "\n".join(rows) + "\n"))
    assert recording.values[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert recording.refused == 2


def test_cells_that_are_no_numbers_are_refused_and_counted(tmp_path: Path) -> None:
    recording = read(_file(tmp_path, "t,a,b\n2026-01-01,1,hot\nyesterday,3,4\n2026-01-02,5,6\n"))
    assert recording.values.shape == (2, 2)
    assert recording.refused == 3


def test_of_rows_with_the_same_time_the_later_wins_where_it_has_a_value(tmp_path: Path) -> None:
    recording = read(_file(tmp_path, "t,a,b\n2026-01-02,9,9\n2026-01-01,1,2\n2026-01-01,,3\n"))
    np.testing.assert_array_equal(recording.values, [[1, 3], [9, 9]])
    assert recording.refused == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "header line"),
        ("t,a\n", "at least one row"),
        ("just a text\nand another\n", "one column"),
        ("t,a,a\n2026-01-01,1,2\n", "same name"),
        ('t,"a,b\n2026-01-01,1,2\n', "header cannot be read"),
        ("t," + "a" * 200_000 + "\n2026-01-01,1,2\n", "header cannot be read"),
        ("t,a\nno,1\nnever,2\n", "no row has a time"),
    ],
)
def test_what_is_no_recording_is_told_with_the_next_step(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(NotARecording, match=words):
        read(_file(tmp_path, text))


def test_a_missing_or_binary_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotARecording, match="cannot be read"):
        read(tmp_path / "nothing.csv")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(NotARecording, match="not text"):
        read(tmp_path / "binary")
