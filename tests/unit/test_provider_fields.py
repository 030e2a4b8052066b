"""The table of one field of all providers."""

from services.matching.directory import VALUES_SPARE, Field


def test_a_field_forgets_values_that_nobody_has_any_more() -> None:
    field: Field[int] = Field()
    field.put(0, -1)
    for value in range(5_000):
        field.put(1, value)
        field.put(2, value % 7)
    seen: list[int] = []

    def above_100(value: int) -> bool:
        seen.append(value)
        return value > 100

    assert list(field.fresh(above_100)) == [False, True, False]
    assert len(seen) <= VALUES_SPARE + 2 * 3
    assert [field.at(slot) for slot in range(3)] == [-1, 4_999, 4_999 % 7]
