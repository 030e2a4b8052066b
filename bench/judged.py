"""How good the order is, on judged sets: the folder that SMDIH_BENCH_JUDGED names, in the form of `services.matching.evaluate`.

    needs.jsonl, providers.jsonl, qrels.tsv    needs and providers; need, provider, grade
    queries.tsv, corpus.tsv, qrels.tsv         plain texts

Either may stand in a folder below it. Grades are numbers; the highest of a query are its best.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bench.report import tell
from services.matching.evaluate import needs_of_file, providers_of_file, rank_needs, rank_texts, texts_of_file
from services.matching.text import Embedder

NEEDS_NDCG5_GOAL, NEEDS_MRR_GOAL = 0.87, 0.93
TEXTS_MRR_GOAL, TEXTS_A5_GOAL = 0.65, 0.82
Grades = Mapping[str, Mapping[str, float]]
Figure = Callable[[Mapping[str, float], Sequence[str]], float]


def run(folder: Path, embedder: Embedder) -> None:
    for judged in sorted({path.parent for path in folder.rglob("qrels.tsv")}):
        grades = _grades(judged / "qrels.tsv")
        if (judged / "needs.jsonl").exists():
            needs, providers = needs_of_file(judged / "needs.jsonl"), providers_of_file(judged / "providers.jsonl")
            found = _found(rank_needs(needs, providers, embedder))
            detail = {"needs": len(grades), "providers": len(providers)}
            tell("needs_ndcg5", _mean(grades, found, _ndcg5), "share", NEEDS_NDCG5_GOAL, **detail)
            tell("needs_mrr", _mean(grades, found, _reciprocal_rank), "share", NEEDS_MRR_GOAL, **detail)
        else:
            queries = texts_of_file(judged / "queries.tsv", repeated=False)
            corpus = texts_of_file(judged / "corpus.tsv", repeated=True)
            found = _found(rank_texts(queries, corpus, embedder))
            detail = {"queries": len(grades), "texts": len(corpus)}
            tell("texts_mrr", _mean(grades, found, _reciprocal_rank), "share", TEXTS_MRR_GOAL, **detail)
            tell("texts_a5", _mean(grades, found, _among5), "share", TEXTS_A5_GOAL, **detail)


def _grades(path: Path) -> Grades:
    """By query; a line that does not end in a number is a heading."""
    grades: dict[str, dict[str, float]] = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines():
        query, found, grade = line.split("\t")
        with contextlib.suppress(ValueError):
            grades[query][found] = float(grade)
    return grades


def _found(lines: Iterable[tuple[str, str, float]]) -> Mapping[str, Sequence[str]]:
    """The best first, by query."""
    found: dict[str, list[str]] = defaultdict(list)
    for query, each, _ in lines:
        found[query].append(each)
    return found


def _mean(grades: Grades, found: Mapping[str, Sequence[str]], figure: Figure) -> float:
    return math.fsum(figure(grades[query], found.get(query, ())) for query in grades) / len(grades)


def _ndcg5(grades: Mapping[str, float], found: Sequence[str]) -> float:
    best = sorted(grades.values(), reverse=True)
    return _gain([grades.get(each, 0.0) for each in found]) / _gain(best)


def _gain(grades: Sequence[float]) -> float:
    return math.fsum((2**grade - 1) / math.log2(place + 2) for place, grade in enumerate(grades[:5]))


def _reciprocal_rank(grades: Mapping[str, float], found: Sequence[str]) -> float:
    return next((1 / place for place, each in enumerate(found, start=1) if each in _best(grades)), 0.0)


def _among5(grades: Mapping[str, float], found: Sequence[str]) -> float:
    return float(any(each in _best(grades) for each in found[:5]))


def _best(grades: Mapping[str, float]) -> set[str]:
    return {each for each, grade in grades.items() if grade == max(grades.values())}
