"""Score folders of CSV files with the production detector: `python -m services.anomaly.evaluate --help`.

Each file is one machine: the first column a timestamp, the others its signals, empty or NaN where absent.  A row's
score is the joint score of the signals or the largest score of one signal, whichever is higher; with w signals one
signal's score is lowered by log10(w), because w of them are looked at (Bonferroni).  Rows that the detector skips,
being no newer than the one before, score 0.
"""

import argparse
import csv
import math
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.anomaly.detector import WIDTH_MAX, Config, Detector, Scores, frame_starts

BATCH_ROWS = 4096


class InputError(Exception):
    """The input cannot be scored; the message says which file and why, in one line."""


def row_scores(scores: Scores, kind: str, width: int) -> NDArray[np.float64]:
    """One score a row, float64[n], by the rule in the module's text."""
    single, joint = (scores.onset, scores.joint_onset) if kind == "onset" else (scores.state, scores.joint_state)
    highest = single.reshape(-1, width).max(axis=1) - math.log10(width)
    rows: NDArray[np.float64] = np.maximum(np.maximum(highest, joint), 0.0)
    return rows


def score_table(times_us: NDArray[np.int64], values: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """Scores of one machine's rows (values: float64[n, width]) by a detector that knows nothing yet."""
    detector = Detector(Config())
    width = values.shape[1]
    slot = detector.add(width)
    parts = []
    for begin in range(0, len(times_us), BATCH_ROWS):
        times, rows = times_us[begin : begin + BATCH_ROWS], values[begin : begin + BATCH_ROWS]
        slots = np.full(len(times), slot, dtype=np.int32)
        starts = frame_starts(np.full(len(times), width, dtype=np.int64))
        parts.append(row_scores(detector.score(slots, times, rows.ravel(), starts), kind, width))
    return np.concatenate(parts) if parts else np.zeros(0)


def read_table(path: Path) -> tuple[list[str], list[list[str]], NDArray[np.int64], NDArray[np.float64]]:
    """Header, raw rows, times in microseconds and values (float64[n, width]) of one file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not 2 <= len(header) <= WIDTH_MAX + 1:
        raise InputError(f"{path}: needs a timestamp column and 1 to {WIDTH_MAX} number columns")
    rows = [row for row in rows if row]
    times = np.empty(len(rows), dtype=np.int64)
    values = np.empty((len(rows), len(header) - 1))
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(f"{path}: row {i + 2} has {len(row)} columns, the header {len(header)}")
        try:
            times[i] = parse_time_us(row[0])
            values[i] = [float(cell) if cell.strip() else math.nan for cell in row[1:]]
        except (ValueError, OverflowError) as error:
            raise InputError(f"{path}: row {i + 2}: {error}") from error
    return header, rows, times, values


def parse_time_us(text: str) -> int:
    """Microseconds since 1970 of an ISO 8601 time (no zone: UTC) or of a number of seconds."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        try:
            return round(float(text) * 1e6)
        except ValueError:
            raise ValueError(f"{text!r} is not a timestamp") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def evaluate(source: Path, target: Path, kind: str) -> int:
    """Score every CSV file below `source` into the same place below `target`; returns how many."""
    if not source.is_dir():
        raise InputError(f"{source}: no such directory")
    paths = sorted(path for path in source.rglob("*.csv") if path.is_file())
    if not paths:
        raise InputError(f"{source}: no CSV files below it")
    for path in paths:
        header, rows, times, values = read_table(path)
        scores = score_table(times, values, kind)
        out = target / path.relative_to(source)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow([*header, "anomaly_score"])
                writer.writerows([*row, f"{score:.6g}"] for row, score in zip(rows, scores.tolist(), strict=True))
        except OSError as error:
            raise InputError(f"{out}: cannot be written: {error}") from error
    return len(paths)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="services.anomaly.evaluate", description="Score folders of CSV files.")
    parser.add_argument("--input", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--score", choices=("onset", "state"), default="onset")
    options = parser.parse_args(arguments)
    try:
        count = evaluate(options.input, options.output, options.score)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} files scored")
    return 0


if __name__ == "__main__":
    sys.exit(main())
