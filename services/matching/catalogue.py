"""A catalogue of texts searched by text alone: names of skills and occupations (ESCO), or documents of experts.

Free text in needs and profiles is linked to the shared vocabulary through it. The two text parts are those of the
ranker; what is added here is for catalogues: long texts are split, several documents stand for one entry, and names
that say the same thing do not fill the top of the list.
"""

import re

import numpy as np
from numpy.typing import NDArray

from services.matching.retrieval import PassageIndex, Scores
from services.matching.text import Embedder, is_name, mean_of_best

NAME_WORDS_WEIGHT = 0.3
"""Of shared words when a name is looked up: chosen on both halves of the MELO development queries (0.15 to 0.6 differ
by 0.006 MRR)."""
TEXT_WORDS_WEIGHT = 0.6
"""Of shared words when a sentence is looked up, as in the ranker."""
PASSAGE_WORDS_MAX = 90
"""Words of one passage of a long text, about the 128 tokens that are embedded."""
SAMENESS_FREE, SAMENESS_WEIGHT = 0.5, 0.5
"""A name whose cosine with a better one is above 0.5 loses half of what is above. Synonyms of a wrong entry are wrong
too: on MELO this lifts MRR by 0.010 and the share of queries answered within five by 0.025, in both halves."""
LABEL_WORDS_MEAN_MAX = 5
"""That is done only in a catalogue of short labels: documents that are alike are not the same answer twice."""
VARIED_FROM = 150
"""How many of the best names take part in that."""


class Catalogue:
    """Entries by id, each with one or more texts. An entry scores the mean of its best three passages.

    Not for use from several threads at once.
    """

    def __init__(self, embedder: Embedder | None, *, passages_max: int = 8) -> None:
        """`passages_max` bounds how many passages of one long text are embedded; later ones are left out."""
        self._index = PassageIndex(embedder)
        self._passages_max = passages_max
        self._slots_of: dict[str, list[int]] = {}
        self._slot_with: dict[str, int] = {}  # equal passages share a slot: catalogues repeat names
        self._words = 0
        self._rows: tuple[list[str], NDArray[np.intp], dict[int, list[int]]] | None = None

    @property
    def degraded(self) -> bool:
        """True when the sentence model is missing and words alone decide."""
        return self._index.degraded

    def add(self, entry_id: str, text: str) -> None:
        """Add a text to an entry, new or known."""
        self._rows = None
        self._words += len(text.split())
        slots = self._slots_of.setdefault(entry_id, [])
        for passage in passages(text)[: self._passages_max]:
            slot = self._slot_with.setdefault(passage, len(self._slot_with))
            if slot == self._index.size:
                self._index.put(slot, passage, self._index.embed(passage))
            slots.append(slot)

    def search(self, text: str, limit: int = 100) -> list[tuple[str, float]]:
        """(entry id, score), best first; equal scores by id."""
        by_name = is_name(text)
        weight = NAME_WORDS_WEIGHT if by_name else TEXT_WORDS_WEIGHT
        found = self._index.meaning(self._index.question(text)) + np.float32(weight) * self._index.words(text)
        ids, first, several = self._entries()
        scores: Scores = found[first]
        for row, slots in several.items():
            scores[row] = mean_of_best(found[slots].tolist())
        np.round(scores, 6, out=scores)
        if by_name and not several and self._words <= LABEL_WORDS_MEAN_MAX * len(ids):
            order, scores = self._varied(scores, first, limit)
        else:
            order = np.argsort(-scores, kind="stable")[:limit]
        return [(ids[row], float(scores[row])) for row in order.tolist()]

    def _entries(self) -> tuple[list[str], NDArray[np.intp], dict[int, list[int]]]:
        """Ids in order, the first slot of each, and all slots of those that have several."""
        if self._rows is None:
            ids = sorted(self._slots_of)
            first = np.array([self._slots_of[each][0] for each in ids], dtype=np.intp)
            several = {row: self._slots_of[each] for row, each in enumerate(ids) if len(self._slots_of[each]) > 1}
            self._rows = ids, first, several
        return self._rows

    def _varied(self, scores: Scores, first: NDArray[np.intp], limit: int) -> tuple[NDArray[np.intp], Scores]:
        """Rows best first and all scores, names lowered for being like a better one (maximal marginal relevance).

        Equal names (the same slot) are lowered together, so that they stay side by side in the order of their ids.
        """
        slots, group = np.unique(first, return_inverse=True)
        of_slot = np.full(len(slots), -np.inf, dtype=np.float32)
        np.maximum.at(of_slot, group, scores)
        top = np.argsort(-of_slot, kind="stable")[: max(VARIED_FROM, limit)]
        alike = np.maximum(self._index.likeness(slots[top]) - np.float32(SAMENESS_FREE), 0.0)
        lowered, penalty = of_slot[top], np.zeros(len(top), dtype=np.float32)
        waiting = np.ones(len(top), dtype=np.bool_)
        for _ in range(len(top)):
            now = np.where(waiting, of_slot[top] - np.float32(SAMENESS_WEIGHT) * penalty, -np.inf)
            best = int(np.argmax(now))
            lowered[best], waiting[best] = now[best], False
            penalty = np.maximum(penalty, alike[best])
        of_slot[:] = -np.inf  # what is beyond the top is not listed
        of_slot[top] = np.round(lowered, 6)
        varied: Scores = of_slot[group]
        order = np.argsort(-varied, kind="stable")[:limit]
        return order[np.isfinite(varied[order])], varied


def passages(text: str) -> list[str]:
    """A long text as runs of whole sentences of at most 90 words; a short one as it is. Never empty."""
    if len(text.split()) <= PASSAGE_WORDS_MAX:
        return [text]
    runs: list[list[str]] = [[]]
    for sentence in re.split(r"(?<=[.!?;])\s+", text):
        words = sentence.split()
        while words:
            room = PASSAGE_WORDS_MAX - len(runs[-1])
            if len(words) > room and runs[-1]:
                runs.append([])
                room = PASSAGE_WORDS_MAX
            runs[-1] += words[:room]
            words = words[room:]
    return [" ".join(run) for run in runs if run]
