"""One searchable set of passages: sentence vectors and stemmed words side by side, changed one passage at a time."""

from collections.abc import Mapping, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from services.matching.text import (
    DIMENSIONS,
    NO_MODEL_ID,
    ROUTING_TOKENS_MAX,
    Embedder,
    LexicalIndex,
    Vectors,
    is_name,
    plain_name,
)

Scores = NDArray[np.float32]

COMMON_SHARE = 100
"""A word that one passage in a hundred has, or more, is a common one."""
COMMON_AT_ONCE = 512
"""Common words in one product; for 5,000 passages that is 10 MB."""


class PassageIndex:
    """Passages in numbered slots. Without an embedder it is degraded: `meaning` is zero, words alone decide.

    Not for use from several threads at once.
    """

    def __init__(self, embedder: Embedder | None) -> None:
        self._embedder = embedder
        self._vectors: Vectors = np.zeros((64, DIMENSIONS), dtype=np.float32)
        self._lexical = LexicalIndex()
        self.size = 0
        """One more than the highest slot ever used: the length of every score array."""

    @property
    def degraded(self) -> bool:
        return self._embedder is None

    @property
    def model_id(self) -> str:
        """Of the vectors; "none" when degraded."""
        return NO_MODEL_ID if self._embedder is None else self._embedder.model_id

    def embed(self, text: str) -> NDArray[np.float32]:
        """The unit vector a passage is stored with, shape (384,); zeros when degraded."""
        if self._embedder is None:
            return np.zeros(DIMENSIONS, dtype=np.float32)
        return np.asarray(self._embedder.embed([text])[0])

    def put(self, slot: int, text: str, vector: NDArray[np.float32]) -> None:
        """Store a passage; `vector` is its unit vector, shape (384,), made by the same `model_id`."""
        if slot >= len(self._vectors):
            grown = np.zeros((max(slot + 1, 2 * len(self._vectors)), DIMENSIONS), dtype=np.float32)
            grown[: self.size] = self._vectors[: self.size]
            self._vectors = grown
        self._vectors[slot] = 0.0 if self.degraded else vector
        self._lexical.put(slot, text)
        self.size = max(self.size, slot + 1)

    def drop(self, slot: int) -> None:
        self._lexical.drop(slot)
        self._vectors[slot] = 0.0

    def question(self, text: str) -> NDArray[np.float32]:
        """The unit vector a text is searched with, shape (384,); zeros when degraded.

        A short label is searched as catalogues write it (`plain_name`), a sentence as it stands.
        """
        if self._embedder is None:
            return np.zeros(DIMENSIONS, dtype=np.float32)
        forms: Sequence[str] = [plain_name(text)] if is_name(text) else [text]
        mean = self._embedder.embed(forms, tokens_max=ROUTING_TOKENS_MAX).mean(axis=0)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), dtype=np.float32)

    def question_of_passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The mean direction of several passages of one long text, shape (384,); zeros when degraded."""
        if self._embedder is None:
            return np.zeros(DIMENSIONS, dtype=np.float32)
        mean = self._embedder.embed(texts).mean(axis=0)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), dtype=np.float32)

    def meaning(self, questions: NDArray[np.float32]) -> Scores:
        """Cosine of each question with each slot, negative ones as 0; (384,) -> (size,), (n, 384) -> (n, size)."""
        cosines: Scores = questions @ self._vectors[: self.size].T
        return np.maximum(cosines, np.float32(0.0), out=cosines)

    def meaning_at(self, question: NDArray[np.float32], slot: int) -> float:
        """`meaning` of one question with one slot."""
        return max(float(question @ self._vectors[slot]), 0.0)

    def words_at(self, text: str, slot: int) -> float:
        """`words` of one slot."""
        return self._lexical.score_at(text, slot)

    def likeness(self, slots: NDArray[np.intp]) -> Scores:
        """Cosines of these passages with each other, shape (n, n)."""
        chosen = self._vectors[slots]
        cosines: Scores = chosen @ chosen.T
        return cosines

    def words(self, text: str) -> Scores:
        """Share 0..1 of the text's words (weighted by rarity) that each slot has, shape (size,)."""
        return self._lexical.scores(text, self.size)

    def words_of_many(self, texts: Sequence[str]) -> Scores:
        """`words` for many texts at once, up to rounding, shape (n, size): each posting list is read once for all of them."""
        users: dict[str, list[tuple[int, float]]] = {}
        for row, text in enumerate(texts):
            for term, weight in self._lexical.query_weights(text).items():
                users.setdefault(term, []).append((row, weight))
        common = [term for term in users if len(self._lexical.term_shares(term)[0]) * COMMON_SHARE >= self.size]
        table = self._rare(users.keys() - set(common), users, len(texts))
        for start in range(0, len(common), COMMON_AT_ONCE):
            table += self._common(common[start : start + COMMON_AT_ONCE], users, len(texts))
        return table

    def _rare(self, terms: Set[str], users: Mapping[str, Sequence[tuple[int, float]]], texts: int) -> Scores:
        """The shares of words that few passages have, each pair of text and word a run of one long sum."""
        pairs = [
            (row, weight, *self._lexical.term_shares(term)) for term in sorted(terms) for row, weight in users[term]
        ]
        if not pairs:
            return np.zeros((texts, self.size), dtype=np.float32)
        lengths = [len(slots) for _, _, slots, _ in pairs]
        cells = np.repeat(np.array([row for row, _, _, _ in pairs], dtype=np.int64) * self.size, lengths)
        cells += np.concatenate([slots for _, _, slots, _ in pairs])
        weights = np.repeat(np.array([weight for _, weight, _, _ in pairs]), lengths)
        weights *= np.concatenate([shares for _, _, _, shares in pairs])
        summed = np.bincount(cells, weights=weights, minlength=texts * self.size)
        return summed.reshape(texts, self.size).astype(np.float32)

    def _common(self, terms: Sequence[str], users: Mapping[str, Sequence[tuple[int, float]]], texts: int) -> Scores:
        """The shares of words that many passages have, as one product of matrices: ten times as fast as word by word."""
        wanted = np.zeros((texts, len(terms)), dtype=np.float32)
        held = np.zeros((len(terms), self.size), dtype=np.float32)
        for number, term in enumerate(terms):
            for row, weight in users[term]:
                wanted[row, number] = weight
            slots, shares = self._lexical.term_shares(term)
            held[number, slots] = shares
        product: Scores = wanted @ held
        return product

    def matched_words(self, text: str, slot: int) -> tuple[str, ...]:
        """Words of the text that the passage has too, the rarest first, at most 8."""
        return self._lexical.matched_words(text, slot)
