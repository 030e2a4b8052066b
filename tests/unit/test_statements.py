"""What holds of every SQL statement of the services."""

import re
from pathlib import Path

import pytest

SERVICES = Path(__file__).parents[2] / "services"
# Of the rows that a function gives, or of a part of a statement whose own result has names.
STAR = re.compile(r"(?:SELECT|RETURNING) (?:[^;\"]*?, )?(?:[a-z_]+\.)?\*(?! FROM [a-z_]+\()(?![^\n]* FROM unnest\()")
WITHIN = {
    ("ingest/diagnosis/store.py", "SELECT r.*"),
    ("anomaly/tuning_store.py", "SELECT t.*"),
}


@pytest.mark.parametrize(
    "text", ["SELECT * FROM need", "UPDATE need SET x = 1 RETURNING *", "SELECT a.id, n.* FROM need n"]
)
def test_a_star_is_seen(text: str) -> None:
    assert STAR.search(text)


def test_statements_name_their_columns() -> None:
    """A statement with a star fails once in each connection of the running release when a migration adds a column."""
    found = {
        (str(path.relative_to(SERVICES)), star[0])
        for path in SERVICES.rglob("*.py")
        for star in STAR.finditer(path.read_text())
    }
    assert found <= WITHIN, sorted(found - WITHIN)
