"""The ranker: hard filters with a code each, then a sum of documented parts, so the parts are the explanation.

    score = meaning + words + skills + sector + region + urgency + size + capacity + outcomes

Each part is its weight x 0..1; outcomes is its weight x -0.75..0.25, and 0 for who has not been scored. No part is
multiplied by another, none is learned from clicks, and the same inputs give the same numbers: parts are rounded to six
places, the score is their sum, equal scores are ordered by provider id.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.matching.catalogue import passages
from services.matching.directory import (
    Directory,
    Field,
    Mask,
    UnknownProviderError,
    any_of,
    provider_places,
)
from services.matching.domain import (
    ANY_DIVISION,
    OUTCOME_FIRMS_MIN,
    REGION_SAME,
    Assessment,
    FilterCode,
    Kind,
    Need,
    Provider,
    Size,
    Source,
    Urgency,
    canonical_region,
    outcome_lift,
    region_nearness,
    sector_closeness,
)
from services.matching.retrieval import PassageIndex, Scores
from services.matching.text import Embedder, Vectors

__all__ = ["Excluded", "Ranked", "Ranker", "Ranking", "UnknownProviderError", "Weights"]

Today = Callable[[], date]

PLACES = 6
EXCLUDED_SHOWN_MAX = 20
ASSESSMENT_PASSAGES_MAX = 8
"""Passages of an application that are embedded, some 700 words; the rest is seen by the words only."""
URGENCY_SUITS = 0.8
ESCO_SKILLS = "http://data.europa.eu/esco/skill/"


@dataclass(frozen=True, slots=True)
class Weights:
    """The most each part can add. Text decides; the rest orders providers whose texts fit about equally well.

    A typical gap in meaning between a fitting and a passable profile is 0.1 to 0.3, so 0.1 for the sector can settle
    a near tie and seldom lifts an unrelated profile. A need shares few words with jargon, a tenth of their weight is
    usual, so 0.6 for words speaks up only when rare words agree. Chosen by reasoning, not fitted: too few needs have
    been judged so far. Scores of firms come last and late: 0.08 x -0.75..0.25 adds at most 0.02 and takes at most 0.06.
    Raise `version` with any change; it is stored with every offer.
    """

    version: str = "3"
    meaning: float = 1.0
    words: float = 0.6
    skills: float = 0.15
    sector: float = 0.1
    region: float = 0.05
    urgency: float = 0.03
    size: float = 0.02
    capacity: float = 0.02
    outcomes: float = 0.08


PARTS: tuple[str, ...] = tuple(each.name for each in fields(Weights) if each.name != "version")

# How well a kind of help suits how soon it is wanted: people and benches act at once, taught skills act later. An
# alarm is a fault in progress, so it counts as urgent whatever its stated urgency.
_URGENCY_FIT: dict[Urgency, dict[Kind, float]] = {
    Urgency.HIGH: {Kind.EXPERT: 1.0, Kind.FACILITY: 1.0, Kind.WORKSHOP: 0.3, Kind.COURSE: 0.0},
    Urgency.NORMAL: {Kind.EXPERT: 0.6, Kind.FACILITY: 0.6, Kind.WORKSHOP: 0.6, Kind.COURSE: 0.5},
    Urgency.LOW: {Kind.EXPERT: 0.4, Kind.FACILITY: 0.4, Kind.WORKSHOP: 0.8, Kind.COURSE: 1.0},
}
# What a firm of this size can usually take up: laboratories ask for staff and money, courses for neither.
_SIZE_FIT: dict[Size, dict[Kind, float]] = {
    Size.MICRO: {Kind.EXPERT: 0.8, Kind.FACILITY: 0.5, Kind.WORKSHOP: 1.0, Kind.COURSE: 1.0},
    Size.SMALL: {Kind.EXPERT: 1.0, Kind.FACILITY: 0.8, Kind.WORKSHOP: 0.9, Kind.COURSE: 0.7},
    Size.MEDIUM: {Kind.EXPERT: 1.0, Kind.FACILITY: 1.0, Kind.WORKSHOP: 0.6, Kind.COURSE: 0.4},
    Size.LARGE: {Kind.EXPERT: 1.0, Kind.FACILITY: 1.0, Kind.WORKSHOP: 0.5, Kind.COURSE: 0.3},
}


@dataclass(frozen=True, slots=True)
class Ranked:
    """One provider for one need. `parts` adds up to `score`; `reasons` are sentences for a person."""

    provider_id: str
    score: float
    parts: Mapping[str, float]
    reasons: tuple[str, ...]
    matched_terms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Excluded:
    """A provider that the hard filters took out, with every code that did so. `text_score` is meaning + words."""

    provider_id: str
    codes: tuple[FilterCode, ...]
    text_score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """The answer for one need, best first, and what is needed to make it again.

    `excluded` holds the 20 filtered providers whose text fits best; `excluded_counts` counts all of them by code (a
    provider with two codes counts under both). `degraded` says that the sentence model was missing.
    """

    ranked: tuple[Ranked, ...]
    excluded: tuple[Excluded, ...]
    excluded_counts: Mapping[FilterCode, int]
    excluded_total: int
    considered: int
    model_id: str
    weights_version: str
    degraded: bool
    # What the need was searched with, for later use by a round.
    question: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)


class Ranker:
    """Ranks providers for needs; holds all profiles in memory. Safe to share between threads.

    A provider that is put, changed or removed is seen by the next call. Profiles are embedded here unless their
    stored vector is handed over. `today` says which profiles have expired.
    """

    def __init__(
        self, embedder: Embedder | None, *, weights: Weights | None = None, today: Today | None = None
    ) -> None:
        self._index = PassageIndex(embedder)
        self._weights = weights or Weights()
        self._today = today or (lambda: date.min)  # no clock: nothing expires
        self._directory = Directory()
        self._rules = _rules(self._directory)
        self._lock = RLock()

    # -- what is known of providers

    def __len__(self) -> int:
        return len(self._directory.slots)

    @property
    def degraded(self) -> bool:
        """True when the sentence model is missing and words alone carry the text part."""
        return self._index.degraded

    @property
    def model_id(self) -> str:
        """Of the vectors in use; store it beside every vector. "none" when degraded."""
        return self._index.model_id

    @property
    def weights_version(self) -> str:
        return self._weights.version

    def upsert(self, provider: Provider, vector: NDArray[np.float32] | None = None) -> None:
        """Add or replace a provider. An unchanged profile keeps its vector, so only new text costs embedding time.

        Ranking goes on meanwhile. Changes of one provider must come one after the other; of several, in any order.
        """
        with self._lock:
            before = self._directory.find(provider.id)
        known = before is not None and before.profile == provider.profile
        if vector is None and not known:
            vector = self._index.embed(provider.profile)  # the slow part, outside the lock
        with self._lock:
            slot = self._directory.put(provider)
            if vector is not None:
                self._index.put(slot, provider.profile, vector)

    def remove(self, provider_id: str) -> None:
        """Forget a provider; nothing happens if it is not known."""
        with self._lock:
            slot = self._directory.drop(provider_id)
            if slot is not None:
                self._index.drop(slot)

    def set_capacity_left(self, provider_id: str, places: int) -> None:
        """Tell what is free after a reservation or its end. Raises `UnknownProviderError`."""
        with self._lock:
            self._directory.set_places(provider_id, places)

    # -- one need

    def question(self, text: str) -> NDArray[np.float32]:
        """The vector that a need's text is searched with, shape (384,); keep it for the round."""
        return self._index.question(text)

    def rank(self, need: Need, limit: int = 10, *, question: NDArray[np.float32] | None = None) -> Ranking:
        """The best `limit` feasible providers, best first; ties by provider id. Embeds the need unless `question`."""
        vector = self._index.question(need.text) if question is None else question
        with self._lock:
            parts = self._parts(need, self._index.meaning(vector), self._index.words(need.text))
            blocked = self._directory.blocked(need, self._today())
            ranking = self._ranking(need, parts, blocked, self._directory.occupied, limit, _sentences)
            return replace(ranking, question=vector)

    def codes(self, need: Need, provider_id: str) -> tuple[FilterCode, ...]:
        """The filters that take this provider out for the need; empty: none does. Raises `UnknownProviderError`."""
        with self._lock:
            slot = self._slot(provider_id)
            return tuple(code for code, mask in self._directory.blocked(need, self._today()).items() if mask[slot])

    def explain(self, need: Need, provider_id: str, *, question: NDArray[np.float32] | None = None) -> Ranked:
        """One provider for one need, whatever the filters say; as `rank` explains it. Raises `UnknownProviderError`."""
        vector = self._index.question(need.text) if question is None else question
        with self._lock:
            slot = self._slot(provider_id)
            parts = {
                "meaning": self._weights.meaning * self._index.meaning_at(vector, slot),
                "words": self._weights.words * self._index.words_at(need.text, slot),
                **self._structured_at(need, slot),
            }
            rounded = {name: round(float(parts[name]), PLACES) for name in PARTS}
            return self._told(need, slot, rounded, _sentences)

    # -- an application

    def rank_assessors(self, asked: Assessment, limit: int = 10) -> Ranking:
        """The best `limit` assessors without a conflict, best first; `excluded` are assessors only.

        An application is long, so its meaning is the mean of its first passages. Urgency, size and free places are about
        helping firms, as are their scores, and add nothing here.
        """
        vector = self._index.question_of_passages(passages(asked.text)[:ASSESSMENT_PASSAGES_MAX])
        need = Need(id="assessment", text=asked.text, sic=asked.sic, region=asked.region)
        with self._lock:
            parts = self._parts(need, self._index.meaning(vector), self._index.words(need.text))
            for name in ("urgency", "size", "capacity", "outcomes"):
                parts[name][:] = 0.0
            blocked = self._directory.blocked_as_assessors(asked, self._today())
            return self._ranking(need, parts, blocked, self._directory.assessors, limit, _assessor_sentences)

    # -- a round of needs

    def provider_ids(self) -> list[str]:
        """All providers in the order of the columns of `score_table`: by id."""
        return sorted(self._directory.slots)

    def score_table(
        self, needs: Sequence[Need], questions: Vectors, provider_ids: Sequence[str] | None = None
    ) -> Scores:
        """Scores of every provider for every need, shape (needs, providers); -inf where a filter forbids.

        Providers in the order of `provider_ids`, by default that of ids; -inf for one that is not known any more. The same
        numbers as `rank` gives, up to rounding. Capacity is left to the assignment: a full provider is not -inf here. For
        some thousand needs call it in blocks of a few hundred; it is 4 bytes a pair.
        """
        with self._lock:
            wanted = self.provider_ids() if provider_ids is None else provider_ids
            gone = np.array([each not in self._directory.slots for each in wanted], dtype=np.bool_)
            columns = np.array([self._directory.slots.get(each, 0) for each in wanted], dtype=np.intp)
            if not self._directory.size:
                return np.full((len(needs), len(wanted)), -np.inf, dtype=np.float32)
            table = self._index.meaning(questions)
            table *= np.float32(self._weights.meaning)
            table += np.float32(self._weights.words) * self._index.words_of_many([need.text for need in needs])
            today = self._today()
            shared: dict[Hashable, Scores] = {}
            for row, need in enumerate(needs):
                key = need.skills, need.division, canonical_region(need.region), need.urgency, need.source, need.size
                if key not in shared:
                    structured = _total(self._structured(need)).astype(np.float32)
                    structured[self._directory.blocked_for_round(need, today)] = -np.inf
                    shared[key] = structured
                table[row] += shared[key]
                table[row, self._directory.in_conflict_with(need.firm_id)] = -np.inf
            in_order = len(columns) == table.shape[1] and bool((columns[1:] > columns[:-1]).all())
            if in_order:
                return table
            chosen: Scores = table[:, columns]
            chosen[:, gone] = -np.inf
            return chosen

    # -- inside

    def _ranking(
        self,
        need: Need,
        parts: Mapping[str, NDArray[np.float64]],
        blocked: Mapping[FilterCode, Mask],
        among: Mask,
        limit: int,
        sentences: "Sentences",
    ) -> Ranking:
        total = _total(parts)
        free = among & ~any_of(blocked, len(total))
        best = self._directory.best(np.where(free, total, -np.inf), limit)
        excluded, counts = self._excluded(blocked, parts["meaning"] + parts["words"])
        return Ranking(
            ranked=tuple(self._explain(need, slot, parts, sentences) for slot in best),
            excluded=excluded,
            excluded_counts=counts,
            excluded_total=int(any_of(blocked, len(total)).sum()),
            considered=int(free.sum()),
            model_id=self.model_id,
            weights_version=self._weights.version,
            degraded=self.degraded,
        )

    def _parts(self, need: Need, meaning: Scores, words: Scores) -> dict[str, NDArray[np.float64]]:
        text = {"meaning": self._weights.meaning * meaning, "words": self._weights.words * words}
        every = {**text, **self._structured(need)}
        return {name: np.round(every[name].astype(np.float64), PLACES) for name in PARTS}

    def _structured(self, need: Need) -> dict[str, NDArray[np.float64]]:
        return {
            name: getattr(self._weights, name) * column.map((name, looks_at(need)), functools.partial(rule, need))
            for name, (column, looks_at, rule) in self._rules.items()
        }

    def _structured_at(self, need: Need, slot: int) -> dict[str, float]:
        return {
            name: getattr(self._weights, name) * rule(need, column.at(slot))
            for name, (column, _, rule) in self._rules.items()
        }

    def _explain(
        self, need: Need, slot: int, parts: Mapping[str, NDArray[np.float64]], sentences: "Sentences"
    ) -> Ranked:
        return self._told(need, slot, {name: float(parts[name][slot]) for name in PARTS}, sentences)

    def _slot(self, provider_id: str) -> int:
        slot = self._directory.slots.get(provider_id)
        if slot is None:
            raise UnknownProviderError(f"no provider {provider_id}")
        return slot

    def _told(self, need: Need, slot: int, own: Mapping[str, float], sentences: "Sentences") -> Ranked:
        provider = self._directory.at(slot)
        terms = self._index.matched_words(need.text, slot)
        return Ranked(
            provider_id=provider.id,
            score=round(math.fsum(own.values()), PLACES),
            parts=own,
            reasons=sentences(need, provider, own, terms, self._weights),
            matched_terms=terms,
        )

    def _excluded(
        self, blocked: Mapping[FilterCode, Mask], text_score: NDArray[np.float64]
    ) -> tuple[tuple[Excluded, ...], dict[FilterCode, int]]:
        counts = {code: int(mask.sum()) for code, mask in blocked.items() if mask.any()}
        out = any_of(blocked, len(text_score))
        nearest = self._directory.best(np.where(out, text_score, -np.inf), EXCLUDED_SHOWN_MAX)
        shown = tuple(
            Excluded(
                provider_id=self._directory.at(slot).id,
                codes=tuple(code for code, mask in blocked.items() if mask[slot]),
                text_score=round(float(text_score[slot]), PLACES),
            )
            for slot in nearest
        )
        return shown, counts


Rule = Callable[[Need, Any], float]


def _rules(directory: Directory) -> dict[str, tuple[Field[Any], Callable[[Need], Hashable], Rule]]:
    """The structured parts: which field of a provider each looks at, what of the need, and what it makes of both."""
    return {
        "skills": (directory.skills, lambda need: need.skills, lambda need, held: _overlap(need.skills, held)),
        "sector": (
            directory.divisions,
            lambda need: need.division,
            lambda need, served: sector_closeness(need.division, served),
        ),
        "region": (
            directory.regions,
            lambda need: canonical_region(need.region),
            lambda need, there: _nearest(need.region, there),
        ),
        "urgency": (directory.kinds, _acted_on, lambda need, kind: _URGENCY_FIT[_acted_on(need)][kind]),
        "size": (directory.kinds, lambda need: need.size, lambda need, kind: _SIZE_FIT[need.size][kind]),
        "capacity": (
            directory.places,
            lambda need: None,
            lambda need, places: min(places[0] / places[1], 1.0) if places[1] else 0.0,
        ),
        "outcomes": (directory.outcomes, lambda need: None, lambda need, scored: outcome_lift(*scored)),
    }


def _acted_on(need: Need) -> Urgency:
    return Urgency.HIGH if need.source is Source.ANOMALY else need.urgency


def _total(parts: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.sum(list(parts.values()), axis=0)
    return np.round(total, PLACES)


def _overlap(wanted: frozenset[str], held: frozenset[str]) -> float:
    return len(wanted & held) / len(wanted) if wanted else 0.0


def _nearest(need_region: str, places: tuple[str, ...]) -> float:
    return max(region_nearness(need_region, place) for place in places)


Sentences = Callable[[Need, Provider, Mapping[str, float], tuple[str, ...], Weights], tuple[str, ...]]


def _text_sentences(parts: Mapping[str, float], terms: tuple[str, ...], weights: Weights, asked: str) -> list[str]:
    told: list[str] = []
    similarity = parts["meaning"] / weights.meaning if weights.meaning else 0.0
    if similarity > 0:
        told.append(
            f"Its profile is {_closeness_word(similarity)} in meaning to the {asked} (similarity {similarity:.2f})."
        )
    if terms:
        told.append(f"It uses the same words: {', '.join(terms)}.")
    return told


def _assessor_sentences(
    need: Need, provider: Provider, parts: Mapping[str, float], terms: tuple[str, ...], weights: Weights
) -> tuple[str, ...]:
    """Why this assessor, for a person."""
    told = _text_sentences(parts, terms, weights, "application")
    told += [_sector_sentence(need, provider), _region_sentence(need, provider)]
    told.append("No conflict with the firms and organisations of the application is known.")
    return tuple(sentence for sentence in told if sentence)


def _sentences(
    need: Need, provider: Provider, parts: Mapping[str, float], terms: tuple[str, ...], weights: Weights
) -> tuple[str, ...]:
    """Why this provider, for a person: the text first, then what else spoke for or against it."""
    told = _text_sentences(parts, terms, weights, "need")
    if shared := sorted(need.skills & provider.skills):
        told.append(
            f"It offers {len(shared)} of the {len(need.skills)} skills asked for: {', '.join(map(_named, shared))}."
        )
    told.append(_sector_sentence(need, provider))
    told.append(_region_sentence(need, provider))
    if need.source is Source.ANOMALY and provider.kind in {Kind.EXPERT, Kind.FACILITY}:
        told.append(f"An alarm calls for someone who can act now: it is {_article(provider.kind)}.")
    elif need.urgency is not Urgency.NORMAL:
        fits = _URGENCY_FIT[need.urgency][provider.kind] >= 0.8
        told.append(
            f"Being {_article(provider.kind)}, it {'suits' if fits else 'suits less well'} {need.urgency} urgency."
        )
    if provider.outcome_firms >= OUTCOME_FIRMS_MIN:
        mean = provider.outcome_points / provider.outcome_firms
        told.append(f"{provider.outcome_firms} firms have scored its work, {mean:.1f} of 5 on average.")
    if provider.kind is Kind.COURSE:
        told.append("It is a course and has room for everyone.")
    else:
        told.append(f"It has {provider.places_left} of {provider.capacity_per_quarter} places free this quarter.")
    return tuple(sentence for sentence in told if sentence)


def _named(skill: str) -> str:
    """A tag as it is; a term of ESCO by what tells it from others in its address."""
    return f"ESCO {skill[len(ESCO_SKILLS) :]}" if skill.startswith(ESCO_SKILLS) else skill


def _closeness_word(similarity: float) -> str:
    return "very close" if similarity >= 0.5 else "close" if similarity >= 0.3 else "loosely related"


def _sector_sentence(need: Need, provider: Provider) -> str:
    closeness = sector_closeness(need.division, provider.sic_divisions)
    if not need.division:
        return ""
    if need.division in provider.sic_divisions:
        return f"It knows the sector of the firm (SIC division {need.division})."
    if ANY_DIVISION in provider.sic_divisions or not provider.sic_divisions:
        return "It serves all sectors."
    known = ", ".join(sorted(provider.sic_divisions))
    return f"It works in {'a related sector' if closeness > 0 else 'other sectors'} (SIC division {known})."


def _region_sentence(need: Need, provider: Provider) -> str:
    places = provider_places(provider)
    nearness = _nearest(need.region, places)
    if "online" in places:
        return "It can be used from anywhere."
    if not need.region or not provider.region:
        return ""
    if nearness >= REGION_SAME:
        return f"It serves the firm's region ({need.region})."
    return f"It is in {provider.region}, {'a neighbouring region' if nearness > 0 else 'far from the firm'}."


def _article(kind: Kind) -> str:
    return f"{'an' if kind is Kind.EXPERT else 'a'} {kind}"
