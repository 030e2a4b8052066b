"""The panel sheet as a table for people: CSV for spreadsheets, HTML for printing."""

import csv
import io
from collections.abc import Iterator, Sequence
from html import escape

from services.funding.reviews import PanelRow
from services.funding.rules.exact import fixed_down, gbp

HEADINGS = (
    "Rank", "Tied", "Application", "Firm", "Region", "State", "Grant asked", "Exact mean", "Mean", "Scores", "Spread",
    "In scope", "Remark",
)  # fmt: skip
# What a spreadsheet would take as the start of a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def as_csv(rows: Sequence[PanelRow]) -> str:
    """RFC 4180 with a byte order mark, which spreadsheets need to see that it is UTF-8."""
    text = io.StringIO()
    text.write("\ufeff")
    writer = csv.writer(text)
    writer.writerow(HEADINGS)
    for cells in map(_cells, rows):
        writer.writerow([f"'{cell}" if cell.startswith(_FORMULA_STARTS) else cell for cell in cells])
    return text.getvalue()


def as_html(rows: Sequence[PanelRow]) -> str:
    return "".join(_html(rows))


def _html(rows: Sequence[PanelRow]) -> Iterator[str]:
    yield (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Panel sheet</title><style>'
        "body{font:14px/1.4 system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
        "th,td{border:1px solid #999;padding:.25em .6em;text-align:left}tr.tied td{background:#fff4cc}"
        "@media print{body{margin:0}}</style></head><body><h1>Panel sheet</h1>"
        "<p>Means are exact; the decimals beside them are cut, not rounded. Equal means share a rank and are marked.</p>"
        "<table><thead><tr>"
    )
    yield from (f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    yield "</tr></thead><tbody>"
    for row in rows:
        yield '<tr class="tied">' if row.tied else "<tr>"
        yield from (f"<td>{escape(cell)}</td>" for cell in _cells(row))
        yield "</tr>"
    yield "</tbody></table></body></html>"


def _cells(row: PanelRow) -> list[str]:
    verdict, application = row.verdict, row.application
    return [
        "" if row.rank is None else str(row.rank),
        "yes" if row.tied else "",
        application.id,
        row.firm_name,
        row.region,
        application.state,
        gbp(application.grant_pence or 0),
        "" if verdict.mean is None else str(verdict.mean),
        "" if verdict.mean is None else fixed_down(verdict.mean),
        " ".join(fixed_down(score) for score in verdict.scores),
        fixed_down(verdict.spread),
        f"{verdict.in_scope} of {len(verdict.scores)}",
        verdict.text,
    ]
