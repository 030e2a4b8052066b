"""Run worked examples through the production rules: ``python -m services.funding.evaluate --cases F --output F``.

Writes the same JSON with ``actual`` beside ``expected`` on each check and prints one line. Exit code 0 if it ran,
even when some checks differ; 2, with one line, if the input is missing or malformed or the output cannot be written.
A check that cannot be answered has ``{"error": ...}`` as its ``actual``.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from services.funding.operations import UnknownOperation, run_operation
from services.funding.parameters import ParameterMissing, ParameterTable, load_parameters
from services.funding.rules.exact import InvalidFact


class CasesMalformed(Exception):
    """The file of cases does not have the shape of worked examples."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="services.funding.evaluate", description="Run worked examples of the fund's rules"
    )
    parser.add_argument("--cases", required=True, type=Path, help="JSON as in worked examples")
    parser.add_argument("--output", required=True, type=Path, help="where the same JSON with actual answers goes")
    options = parser.parse_args(arguments)
    try:
        document = json.loads(options.cases.read_text(encoding="utf-8"))
        agreeing, total = evaluate(document, load_parameters())
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, ValueError, RecursionError, CasesMalformed) as error:
        print(f"error: {options.cases}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    differing = total - agreeing
    print(f"{agreeing} of {total} checks agree" + (f", {differing} differ" if differing else ""))
    return 0


def evaluate(document: Any, table: ParameterTable) -> tuple[int, int]:
    """Add ``actual`` to every check of the document, in place; answer how many agree, and how many there are.

    A check that cannot be answered does not agree, whatever it expects.

    The event date of an operation without a date of its own is the document's ``as_of``, else the day on which the
    parameters were last checked: never today's.

    Raises:
        CasesMalformed: not an object with ``cases``, each with ``checks`` that are objects.
    """
    checks = list(_checks(document))
    try:
        as_of = date.fromisoformat(document["as_of"]) if document.get("as_of") else table.checked_on
    except (TypeError, ValueError) as error:
        raise CasesMalformed(f"as_of is not a date: {error}") from error
    agreeing = 0
    for check in checks:
        try:
            check["actual"] = run_operation(check.get("operation"), check.get("input"), table=table, as_of=as_of)
        except (UnknownOperation, InvalidFact, ParameterMissing) as error:
            check["actual"] = {"error": f"{error.REASON}: {error}"}
            continue
        agreeing += agrees(check.get("expected"), check["actual"])
    return agreeing, len(checks)


def agrees(expected: Any, actual: Any) -> bool:
    """Whether every field that is expected is there with the same value; further fields are free."""
    if isinstance(expected, dict):
        return isinstance(actual, dict) and all(
            name in actual and agrees(value, actual[name]) for name, value in expected.items()
        )
    return type(expected) is type(actual) and bool(expected == actual)


def _checks(document: Any) -> Iterator[dict[str, Any]]:
    cases = document.get("cases") if isinstance(document, dict) else None
    if not isinstance(cases, list):
        raise CasesMalformed("expected an object with a list of cases")
    for case in cases:
        checks = case.get("checks") if isinstance(case, dict) else None
        if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
            raise CasesMalformed("each case needs a list of checks")
        yield from checks


if __name__ == "__main__":
    sys.exit(main())
