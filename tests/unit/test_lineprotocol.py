"""Line protocol: exact on what is right, a reason for what is wrong, nothing raised whatever comes."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.telemetry.frames import RAW_BYTES_MAX
from services.ingest.telemetry.lineprotocol import (
    FAULTS_MAX,
    FORMS_MAX,
    PRECISIONS,
    Fault,
    TooMany,
    batches,
    by_reason,
    read,
)
from smdih.ingest.v1 import telemetry_pb2

NOW_US = 1_764_000_000_000_000

Sample = tuple[str, str, str, int, float]


def samples(body: bytes, precision: str = "us") -> list[Sample]:
    """(machine, measurement, field, time, value), in order of appearance within a form."""
    found = []
    for block in read(body, precision=precision, now_us=NOW_US).blocks:
        for row, time_us in enumerate(block.times_us.tolist()):
            for column, field in enumerate(block.fields):
                if block.present is None or block.present[row, column]:
                    value = float(block.values[row, column])
                    found.append((block.machine, block.measurement, field, time_us, value))
    return found


def faults(body: bytes, precision: str = "us") -> list[tuple[int, str, int]]:
    return [(f.line, f.reason, f.samples) for f in read(body, precision=precision, now_us=NOW_US).faults]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"m a=1 7", [("m", "m", "a", 7, 1.0)]),
        (b"m a=1", [("m", "m", "a", NOW_US, 1.0)]),
        (b"m,machine=x/y/z a=1 7", [("x/y/z", "m", "a", 7, 1.0)]),
        (b"m,host=h,machine=12 a=1 7", [("12", "m", "a", 7, 1.0)]),
        (
            b"m a=1.5,b=-2e3,c=.5,d=5.,e=+1 7",
            [("m", "m", k, 7, v) for k, v in zip("abcde", (1.5, -2e3, 0.5, 5, 1), strict=True)],
        ),
        (b"m a=3i,b=-4i,c=5u 7", [("m", "m", k, 7, v) for k, v in zip("abc", (3, -4, 5), strict=True)]),
        (b"m a=9223372036854775807i 7", [("m", "m", "a", 7, 2.0**63)]),
        (b"m a=t,b=F,c=True,d=false 7", [("m", "m", k, 7, v) for k, v in zip("abcd", (1, 0, 1, 0), strict=True)]),
        (b"m a=1 -7", [("m", "m", "a", -7, 1.0)]),
        (b"  m   a=1   7  \r", [("m", "m", "a", 7, 1.0)]),
        (rb"a\ b\,c,ta\=g=v\,w a\=\ b\,c=1 7", [("a b,c", "a b,c", "a= b,c", 7, 1.0)]),
        (rb"m,machine=a\ b a=1 7", [("a b", "m", "a", 7, 1.0)]),
        (rb"a\b c\d=1 7", [(r"a\b", r"a\b", r"c\d", 7, 1.0)]),
        ("größe a=1 7".encode(), [("größe", "größe", "a", 7, 1.0)]),
        (b'm a="text",b=2 7', [("m", "m", "b", 7, 2.0)]),
        (rb'm a="say \"1, 2\" \\",b=2 7', [("m", "m", "b", 7, 2.0)]),
        (b'm,q="x" b=2 7', [("m", "m", "b", 7, 2.0)]),
        (b"", []),
        (b"# a comment=1 2", []),
        (b"   ", []),
    ],
)
def test_lines_as_the_specification_writes_them(line: bytes, expected: list[Sample]) -> None:
    assert samples(line) == expected
    assert [reason for _, reason, _ in faults(line)] in ([], ["WRONG_TYPE"])
    # Met again, a form is read by its pattern; that must come to the same.
    assert samples(b"\n".join([line] * 3)) == expected * 3


@pytest.mark.parametrize(
    "line",
    [
        b"m",
        b"m ",
        b"m a",
        b"m a=",
        b"m =1 7",
        b"m a=1,",
        b"m a=1, 7",
        b"m a=1 7 8",
        b"m a=1 7.5",
        b"m a=1 soon",
        b"m a=1x 7",
        b"m a=1_000 7",
        b"m a=0x10 7",
        b"m a=1e 7",
        b"m a=-5u 7",
        b"m a=9223372036854775808i 7",
        b"m a=1=2 7",
        b"m a,1=b,2 7",
        b"m a=1,a=2 7",
        b",t=v a=1 7",
        b"m,t a=1 7",
        b"m,t= a=1 7",
        b"m,=v a=1 7",
        b"m,machine= a=1 7",
        b'm a="open 7',
        b'm a="x"y 7',
        b"m\xff a=1 7",
        b"m \xff=1 7",
        b"m a=1\t7",
        b"m a=1 1_0",
        b"m a=1 " + b"9" * 30,
    ],
)
def test_a_bad_line_is_named_and_its_neighbours_are_taken(line: bytes) -> None:
    for good in (b"m a=1 1", b"m a=1,b=2 1"):
        body = good + b"\n" + good + b"\n" + line + b"\n" + good
        assert faults(body) == [(3, "MALFORMED", 0)]
        assert len(samples(body)) == 3 * (1 + good.count(b","))


def test_a_text_is_set_aside_and_the_rest_of_its_line_taken() -> None:
    body = b'm a=1,state="run",mode="x y" 1\nm a=2,state=3,mode=4 2\nm state="stop" 3\n'
    assert samples(body) == [
        ("m", "m", "a", 1, 1.0),
        ("m", "m", "a", 2, 2.0),
        ("m", "m", "state", 2, 3.0),
        ("m", "m", "mode", 2, 4.0),
    ]
    assert faults(body) == [(1, "WRONG_TYPE", 2), (3, "WRONG_TYPE", 1)]


def test_a_text_may_hold_line_ends_and_lines_keep_their_numbers() -> None:
    body = b'm a="one\ntwo\nthree",b=1 1\nm b=2 2\nbad\nm c="never closed\nm b=3 3'
    assert samples(body) == [("m", "m", "b", 1, 1.0), ("m", "m", "b", 2, 2.0), ("m", "m", "b", 3, 3.0)]
    assert faults(body) == [(1, "WRONG_TYPE", 1), (5, "MALFORMED", 0), (6, "MALFORMED", 0)]


@pytest.mark.parametrize(
    ("precision", "time", "expected"),
    [
        ("ns", 1_764_000_000_123_456_789, 1_764_000_000_123_456),
        ("us", 1_764_000_000_123_456, 1_764_000_000_123_456),
        ("ms", 1_764_000_000_123, 1_764_000_000_123_000),
        ("s", 1_764_000_000, 1_764_000_000_000_000),
        ("ns", -1, -1),
    ],
)
def test_times_come_in_microseconds(precision: str, time: int, expected: int) -> None:
    assert [one[3] for one in samples(b"m a=1 %d" % time, precision)] == [expected]
    assert faults(b"m a=1,b=2 9223372036854775807", "s") == [(1, "TIME_OUT_OF_WINDOW", 2)]


names = st.text(st.characters(codec="utf-8", exclude_characters='\n\r\\"#\t'), min_size=1, max_size=8).filter(
    lambda name: name == name.strip() and not name.isspace()
)
numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**53), 2**53), st.booleans())


def _escaped(name: str) -> bytes:
    return name.replace(",", r"\,").replace("=", r"\=").replace(" ", r"\ ").encode()


def _written(value: float | int | bool) -> bytes:
    if isinstance(value, bool):
        return b"true" if value else b"f"
    return (f"{value}i" if isinstance(value, int) else repr(value)).encode()


@given(
    st.lists(
        st.tuples(
            names,
            st.dictionaries(names, numbers, min_size=1, max_size=4),
            st.integers(-(2**62), 2**62),
        ),
        max_size=6,
    )
)
def test_what_is_written_is_read_again(points: list[tuple[str, dict[str, float], int]]) -> None:
    body = b"\n".join(
        _escaped(name) + b" " + b",".join(_escaped(k) + b"=" + _written(v) for k, v in fields.items()) + b" %d" % time
        for name, fields, time in points
    )
    assert faults(body) == []
    expected = [(name, name, k, time, float(v)) for name, fields, time in points for k, v in fields.items()]
    assert sorted(samples(body)) == sorted(expected)


_fragments = st.lists(
    st.sampled_from(
        [
            b"m",
            b"a",
            b"=",
            b",",
            b" ",
            b'"',
            b"\\",
            b"\n",
            b"#",
            b"1",
            b"2i",
            b"t",
            b"-",
            b".",
            b"e",
            b"\r",
            b"\t",
            b"\xff",
            b"m a=1 1\n",
            b"m a=1,b=2 1\n",
            b',b="',
            b"machine=",
            b"nan",
        ]
    ),
    max_size=60,
).map(b"".join)


@given(st.one_of(st.binary(max_size=300), _fragments), st.sampled_from(sorted(PRECISIONS)))
def test_no_bytes_raise_and_every_batch_is_sound(body: bytes, precision: str) -> None:
    reading = read(body, precision=precision, now_us=NOW_US)
    made = batches(reading.blocks, lambda machine, path: ("a",))
    cells = 0
    for batch in made:
        assert len(batch.values) == len(batch.times_us) * len(batch.signals)
        absent = np.unpackbits(np.frombuffer(batch.absent, np.uint8), bitorder="little").sum()
        cells += len(batch.values) - int(absent)
    assert cells == len(samples(body, precision))
    assert all(fault.detail and fault.raw for fault in reading.faults)


@given(_fragments.filter(lambda body: b'"' not in body))
def test_lines_together_are_read_as_each_alone(body: bytes) -> None:
    lines = body.replace(b"\r\n", b"\n").split(b"\n")
    # NaN is not equal to itself; repr is.
    together, alone = samples(body), [one for line in lines for one in samples(line)]
    assert sorted(map(repr, together)) == sorted(map(repr, alone))
    expected = [(n, *fault[1:]) for n, line in enumerate(lines, 1) for fault in faults(line)]
    assert faults(body) == expected


def _batches(body: bytes, *signals: str) -> list[telemetry_pb2.Batch]:
    return batches(read(body, precision="us", now_us=NOW_US).blocks, lambda machine, path: signals)


def test_lines_of_one_machine_become_one_matrix_in_order_of_time() -> None:
    body = b"cpu,machine=x/y/z a=1 2\nmem,machine=x/y/z b=5 2\ncpu,machine=x/y/z a=2 1\nmem,machine=7 b=1 1"
    one, other = _batches(body, "a", "mem.b")
    assert (one.machine_path, one.machine_id, list(one.times_us)) == ("x/y/z", 0, [1, 2])
    assert (list(one.signals), list(one.values), one.absent) == (["a", "mem.b"], [2.0, 0.0, 1.0, 5.0], b"\x02")
    assert (other.machine_path, other.machine_id, list(other.signals)) == ("", 7, ["mem.b"])


def test_nothing_is_replaced_when_two_lines_name_one_cell() -> None:
    body = b"cpu,machine=x a=1 1\nmem,machine=x a=2 1"
    assert [list(batch.values) for batch in _batches(body, "a")] == [[1.0], [2.0]]


def test_forms_that_share_no_times_do_not_make_a_matrix_of_nothing() -> None:
    body = b"\n".join(b"m,machine=x f%d=1 %d" % (n, n) for n in range(3_000))
    assert sum(len(batch.values) for batch in _batches(body)) <= 4 * 3_000


def test_faults_are_put_together_up_to_what_a_record_keeps() -> None:
    many = [Fault(n, "MALFORMED", "d", 0, b"x" * 1000) for n in range(200)] + [Fault(1, "WRONG_TYPE", "d", 1, b"y")]
    groups = by_reason(many)
    assert sum(len(group) for group in groups) == 201
    assert all(len({fault.reason for fault in group}) == 1 for group in groups)
    assert all(sum(len(fault.raw) + 1 for fault in group) <= RAW_BYTES_MAX for group in groups)


@pytest.mark.parametrize(
    "body",
    [b'm a="' * 100_000, b'm a="\\"\n' * 100_000, b"\\" * 1_000_000, b"a=b," * 200_000, b"m " + b'a="",' * 100_000],
)
def test_odd_bodies_take_time_in_proportion(body: bytes) -> None:
    # Something quadratic would take hours; the suite's own limit would end it.
    with contextlib.suppress(TooMany):
        read(body, precision="ns", now_us=NOW_US)


def test_what_one_body_can_cost_is_bounded() -> None:
    for line in (b"m%d a=1 1", b"m f%d=1 1", b"bad%d", b'm%d a="x" 1'):
        with pytest.raises(TooMany):
            read(b"\n".join(line % n for n in range(max(FORMS_MAX, FAULTS_MAX) + 1)), precision="ns", now_us=NOW_US)
    wide = b"m " + b",".join(b"f%d=1" % n for n in range(50_000)) + b" 1"
    (block,) = read(wide + b"\n" + wide, precision="ns", now_us=NOW_US).blocks
    assert block.values.shape == (2, 50_000)
