"""The table of machines: what becomes of each line, before anything is done."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.domain import NewSignal
from services.ingest.registry import machinetable
from services.ingest.registry.machinetable import BadTable, KnownMachine, Plan, read

SITES = {"leeds": 1, "york": 2}
KNOWN = {
    "acme/leeds/press-1": KnownMachine(
        5, "Press 1", "press", {"temperature": NewSignal("temperature", "degC", -50.0, 300.0), "v": NewSignal("v")}
    )
}
HEADER = "machine,machine_name,kind,signal,unit,range_min,range_max\n"


def planned(text: str) -> Plan:
    return machinetable.plan(read((HEADER + text).encode()), firm_slug="acme", sites=SITES, known=KNOWN)


def outcomes(text: str) -> list[tuple[str, str]]:
    return [(one.action, one.reason) for one in planned(text).outcomes]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("leeds/press-1,,,temperature,degC,-50,300", ("same", "")),
        ("acme/leeds/press-1,Press 1,press,,,,", ("same", "")),
        ("LEEDS/Press-1,,,v,,,", ("same", "")),
        ("leeds/press-1,,,temperature,degC,-50,400", ("change", "")),
        ("leeds/press-1,Press One,,v,,,", ("change", "")),
        ("leeds/press-1,,,current,A,,", ("create", "")),
        ("leeds/line-1/cell-2/saw,Saw,saw,rpm,1/min,0,9000", ("create", "")),
        ("leeds/saw,,saw,,,,", ("create", "")),
        ("leeds/saw,,,rpm,,,", ("refuse", "NO_KIND")),
        ("hull/saw,,saw,rpm,,,", ("refuse", "UNKNOWN_SITE")),
        ("leeds,,saw,rpm,,,", ("refuse", "BAD_NAME")),
        (",,saw,rpm,,,", ("refuse", "UNKNOWN_SITE")),
        ("leeds/a/b/c/d/e,,saw,rpm,,,", ("refuse", "BAD_NAME")),
        ("leeds/saw blade,,saw,rpm,,,", ("refuse", "BAD_NAME")),
        ("leeds/unknown,,saw,rpm,,,", ("refuse", "BAD_NAME")),
        (f"leeds/{'x' * 64},,saw,rpm,,,", ("refuse", "BAD_NAME")),
        ("leeds/press-1,,,Temperature,degC,,", ("refuse", "BAD_NAME")),
        ("leeds/press-1,,,a/b,,,", ("refuse", "BAD_NAME")),
        (f"leeds/press-1,,,{'n' * 101},,,", ("refuse", "BAD_NAME")),
        (f"leeds/press-1,,,n,{'u' * 33},,", ("refuse", "BAD_NAME")),
        ("leeds/press-1,,,n,,5,5", ("refuse", "BAD_RANGE")),
        ("leeds/press-1,,,n,,nan,", ("refuse", "BAD_RANGE")),
        ("leeds/press-1,,,n,,1_0,", ("refuse", "BAD_RANGE")),
        ("leeds/press-1,,,n,,5 bar,", ("refuse", "BAD_RANGE")),
        ("leeds/press-1,,,,degC,,", ("refuse", "NO_SIGNAL")),
    ],
)
def test_what_becomes_of_a_line(line: str, expected: tuple[str, str]) -> None:
    (found,) = outcomes(line)
    assert found == expected


def test_lines_of_one_machine_belong_together() -> None:
    text = "leeds/saw,Saw,saw,a,,,\nleeds/saw,,,b,,,\nleeds/saw,Other,,c,,,\nleeds/saw,,drill,d,,,\nleeds/saw,,,a,,,\n"
    assert outcomes(text) == [
        ("create", ""),
        ("create", ""),
        ("refuse", "CONFLICT"),
        ("refuse", "CONFLICT"),
        ("refuse", "DUPLICATE"),
    ]
    (saw,) = planned("leeds/saw,Saw,saw,a,,,\nleeds/saw,,,b,,,\n").machines
    assert [signal.name for signal in saw.new_signals] == ["a", "b"]
    assert planned("leeds/press-1,,,v,,,").machines == []


def test_a_change_says_what_changes() -> None:
    (one,) = planned("leeds/press-1,,,temperature,K,-50,").outcomes
    assert one.detail == "unit: 'degC' becomes 'K'; range_max: 300.0 becomes None"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "missing"),
        (b"machine,signal\n", "no lines"),
        (b"machine\nleeds/a\n", "'signal' is missing"),
        (b"machine,signal,colour\n", "'colour' is not known"),
        (b"machine,signal,signal\n", "twice"),
        (b"machine,signal\nleeds/a,b,c\n", "Line 2 has 3 cells"),
        (b'machine,signal\n"leeds/a,b\n', "not CSV"),
        (b"machine,signal\n\xff\n", "UTF-8"),
        (b"machine,signal\nleeds/\x00,b\n", "not text"),
        (b"machine,signal\n" + b"leeds/a,b\n" * 20_001, "20000 lines"),
        (b"machine,signal\nleeds/a," + b"b" * 1001 + b"\n", "1000 characters"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_with_the_reason(body: bytes, words: str) -> None:
    with pytest.raises(BadTable, match=words):
        read(body)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_spreadsheets_save_is_read(delimiter: str) -> None:
    text = "\ufeffSignal,Machine,Unit\r\ntemperature,leeds/press-1,degC\r\n,,\r\n".replace(",", delimiter)
    (line,) = read(text.encode())
    assert (line.number, line.machine, line.signal, line.unit) == (2, "leeds/press-1", "temperature", "degC")


def test_the_template_can_be_imported() -> None:
    plan = machinetable.plan(read(machinetable.template().encode()), firm_slug="acme", sites=SITES, known={})
    assert [one.action for one in plan.outcomes] == ["create", "create"]


NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=20)


@given(NAMES, NAMES, st.none() | st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_exported_is_read_back_as_it_was(name: str, unit: str, low: float | None) -> None:
    """No cell is a formula to a spreadsheet, either."""
    text = machinetable.written([("acme/leeds/a", name, "kind", name, unit, low, None)])
    (line,) = read(text.encode())
    assert (line.machine_name, line.signal, line.unit) == (name, name, unit)
    assert (float(line.range_min) if line.range_min else None) == low
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in text.splitlines()[1].split(",")[1:4])


@given(st.binary(max_size=300))
def test_no_file_breaks_the_reading(body: bytes) -> None:
    try:
        planned_lines = read(HEADER.encode() + body)
    except BadTable:
        return
    machinetable.plan(planned_lines, firm_slug="acme", sites=SITES, known=KNOWN)
