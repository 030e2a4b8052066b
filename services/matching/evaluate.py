"""Rank files of needs or plain texts with the production ranker, for measuring from outside.

    python -m services.matching.evaluate --needs FILE --providers FILE --output FILE
    python -m services.matching.evaluate --queries FILE --corpus FILE --output FILE

Needs and providers are JSON lines; queries and corpus are tab separated id and text. A corpus id may come several
times (the documents of one expert): it is scored by the mean of its best three. The output has tab separated need,
provider and score, best first: every feasible provider of each need, or the top 100 of each query. Bad input ends with
one line on standard error and exit code 2.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from services.matching.catalogue import Catalogue
from services.matching.domain import (
    ANY_DIVISION,
    Kind,
    MatchingError,
    Need,
    Provider,
    Size,
    Source,
    Urgency,
)
from services.matching.ranking import Ranker
from services.matching.text import Embedder

PER_QUERY_MAX = 100
TEXT_PASSAGES_MAX = 32
EMBEDDED_PASSAGES_MAX = 20_000
"""Of a whole corpus, some ten minutes: the more texts, the fewer passages of each, but one of each at least."""
Line = tuple[str, str, float]
Item = TypeVar("Item")


class BadInputError(Exception):
    """An input file is missing or not in the promised form."""


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    embedder = Embedder.installed()
    if embedder is None:
        print("evaluate: the sentence model is not installed, ranking by words alone", file=sys.stderr)
    try:
        if options.needs:
            lines = rank_needs(needs_of_file(options.needs), providers_of_file(options.providers), embedder)
        else:
            queries = texts_of_file(options.queries, repeated=False)
            lines = rank_texts(queries, texts_of_file(options.corpus, repeated=True), embedder)
        _write(options.output, lines)
    except (BadInputError, MatchingError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def rank_needs(needs: Iterable[Need], providers: Iterable[Provider], embedder: Embedder | None) -> Iterator[Line]:
    """All feasible providers of each need, best first."""
    ranker = Ranker(embedder)
    for provider in providers:
        ranker.upsert(provider)
    for need in needs:
        for each in ranker.rank(need, limit=len(ranker)).ranked:
            yield need.id, each.provider_id, each.score


def rank_texts(
    queries: Iterable[tuple[str, str]], corpus: Sequence[tuple[str, str]], embedder: Embedder | None
) -> Iterator[Line]:
    """The top 100 of each query by text alone; ties by id."""
    affordable = EMBEDDED_PASSAGES_MAX // max(len(corpus), 1)
    catalogue = Catalogue(embedder, passages_max=min(max(affordable, 1), TEXT_PASSAGES_MAX))
    for text_id, text in corpus:
        catalogue.add(text_id, text)
    for query_id, text in queries:
        for found, score in catalogue.search(text, PER_QUERY_MAX):
            yield query_id, found, score


def needs_of_file(path: Path) -> list[Need]:
    """Raises BadInputError, as the others do."""
    return _json_lines(path, need_from_json)


def providers_of_file(path: Path) -> list[Provider]:
    return _json_lines(path, provider_from_json)


def texts_of_file(path: Path, *, repeated: bool) -> list[tuple[str, str]]:
    """(id, text); `repeated`: an id may come several times."""
    rows: list[tuple[str, str]] = []
    seen: set[str] = set()
    for place, line in _lines(path):
        text_id, tab, text = line.partition("\t")
        text_id = text_id.strip()
        if not (text_id and tab and text.strip()):
            raise BadInputError(f"{place}: expected an id, a tab and a text")
        if text_id in seen and not repeated:
            raise BadInputError(f"{place}: id {text_id} comes twice")
        seen.add(text_id)
        rows.append((text_id, text.replace("\t", " ").strip()))
    return _not_empty(path, rows)


def need_from_json(fields: Mapping[str, Any]) -> Need:
    return Need(
        id=_text(fields, "id"),
        text=_text(fields, "text"),
        sic=_text(fields, "sic", ""),
        size=Size(_text(fields, "size", Size.SMALL)),
        region=_text(fields, "region", ""),
        urgency=Urgency(_text(fields, "urgency", Urgency.NORMAL)),
        source=Source(_text(fields, "source", Source.FIRM)),
    )


def provider_from_json(fields: Mapping[str, Any]) -> Provider:
    divisions = fields.get("sic_divisions", [ANY_DIVISION])
    capacity = fields.get("capacity_per_quarter", 1)
    if not isinstance(divisions, list) or not all(isinstance(each, str) for each in divisions):
        raise ValueError("sic_divisions is not a list of texts")
    scores = fields.get("outcomes", [])
    if not isinstance(scores, list) or not all(isinstance(each, int) and 1 <= each <= 5 for each in scores):
        raise ValueError("outcomes is not a list of scores 1 to 5, one a firm")
    if not isinstance(capacity, int) or isinstance(capacity, bool):
        raise ValueError("capacity_per_quarter is not a whole number")
    return Provider(
        id=_text(fields, "id"),
        kind=Kind(_text(fields, "kind", Kind.EXPERT)),
        title=_text(fields, "title", ""),
        text=_text(fields, "text", ""),
        region=_text(fields, "region", ""),
        sic_divisions=frozenset(divisions),
        capacity_per_quarter=capacity,
        outcome_firms=len(scores),
        outcome_points=sum(scores),
    )


def _text(fields: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {'missing' if value is None else 'not a text'}")
    if not value.isascii():
        value.encode("utf-8")  # half a surrogate pair, as JSON can spell it, is refused here with a ValueError
    return value


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file, line n", line) of every line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8 text") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line.rstrip("\r")


def _json_lines(path: Path, build: Callable[[Mapping[str, Any]], Item]) -> list[Item]:
    items: list[Item] = []
    seen: set[str] = set()
    for place, line in _lines(path):
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("not a JSON object")
            item = build(fields)
        except (ValueError, RecursionError, MatchingError) as error:
            raise BadInputError(f"{place}: {' '.join(str(error).split())}") from error
        if len(str(fields["id"]).splitlines()) > 1 or "\t" in fields["id"]:
            raise BadInputError(f"{place}: the id holds a tab or a line end")
        if fields["id"] in seen:
            raise BadInputError(f"{place}: id {fields['id']} comes twice")
        seen.add(fields["id"])
        items.append(item)
    return _not_empty(path, items)


def _not_empty(path: Path, items: list[Item]) -> list[Item]:
    if not items:
        raise BadInputError(f"{path} holds nothing to rank")
    return items


def _write(path: Path, lines: Iterable[Line]) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{query}\t{found}\t{score:.6f}\n" for query, found, score in lines)
    except OSError as error:
        raise BadInputError(f"cannot write {path}: {error.strerror}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"evaluate: {message}", file=sys.stderr)
        raise SystemExit(2)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="evaluate", description="Rank needs or plain texts with the production ranker.")
    for name in ("needs", "providers", "queries", "corpus"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    pairs = [(options.needs, options.providers), (options.queries, options.corpus)]
    if sum(all(pair) for pair in pairs) != 1 or any(any(pair) and not all(pair) for pair in pairs):
        parser.error("give either --needs and --providers or --queries and --corpus, and --output")
    return options


if __name__ == "__main__":
    sys.exit(main())
