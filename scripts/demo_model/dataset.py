"""From texts to token arrays: the mixture, the held-out split and the sampling of training windows."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import chat
import dictionaries
import numpy as np
import packages
import prose
from tokenizer import END, Tokenizer

# Share of the training tokens: while the learning rate is constant, and while it falls.
MIXTURE = {
    "austen": (0.10, 0.06),
    "bible": (0.05, 0.03),
    "wesnoth": (0.06, 0.06),
    "endless-sky": (0.06, 0.06),
    "anarchism": (0.04, 0.02),
    "handbook": (0.03, 0.02),
    "sqlite": (0.03, 0.01),
    "python-manual": (0.07, 0.06),
    "python-code": (0.13, 0.13),
    "foldoc": (0.06, 0.05),
    "gcide": (0.02, 0.01),
    "wordnet": (0.10, 0.08),
    "chat": (0.20, 0.18),
    "basics": (0.05, 0.27),
}
VALIDATION_SHARE = 0.02


@dataclass
class Corpus:
    """Token streams by source, for training and for validation."""

    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    tokenizer: Tokenizer


def collect(root: Path, seed: int = 1) -> dict[str, list[str]]:
    """Every source's documents, cleaned and shuffled."""
    rng = random.Random(seed)
    texts = {name: read(root) for name, read in prose.SOURCES.items()}
    senses = dictionaries.wordnet(root)
    terms = dictionaries.foldoc(root)
    texts["foldoc"] = dictionaries.foldoc_text(terms)
    texts["gcide"] = dictionaries.gcide_text(root)
    texts["wordnet"] = dictionaries.wordnet_text(senses)
    counts: Counter[str] = Counter()
    for name in ("austen", "bible", "wesnoth", "endless-sky", "handbook", "python-manual"):
        for document in texts[name]:
            counts.update(re.findall(r"[a-z]+", document.lower()))
    for documents in texts.values():
        rng.shuffle(documents)
    # Dialogues quote stories and code: only those that are not held out.
    stories = [text for name in ("wesnoth", "endless-sky") for text in split(texts[name])[0]]
    first = dictionaries.first_senses(root, senses)
    texts["chat"] = chat.dialogues(first, terms, stories, split(texts["python-code"])[0], counts, rng)
    texts["basics"] = chat.basics(first, counts, rng)
    # Single dictionary entries are short: several share a document, so that the end mark stays rare.
    for name in ("gcide", "wordnet"):
        texts[name] = ["\n\n".join(texts[name][at : at + 12]) for at in range(0, len(texts[name]), 12)]
    return texts


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents."""
    held = max(1, round(len(documents) * VALIDATION_SHARE))
    return documents[held:], documents[:held]


def prepare(work: Path, vocabulary: int) -> Corpus:
    """Fetch, clean, train the tokenizer and tokenise; everything is kept in `work` and reused."""
    saved = work / "tokens.npz"
    if not saved.exists():
        work.mkdir(parents=True, exist_ok=True)
        texts = collect(packages.fetch())
        sizes = {name: sum(map(len, documents)) for name, documents in texts.items()}
        (work / "sizes.json").write_text(json.dumps(sizes, indent=1))
        parts = {name: split(documents) for name, documents in texts.items()}
        parts["basics"] = (texts["basics"], [])  # repeats what other sources say: nothing to validate on
        tokenizer = Tokenizer.train(_sample(parts), vocabulary)
        tokenizer.save(work / "tokenizer.json")
        arrays = {}
        for name, (train, validation) in parts.items():
            arrays[f"train/{name}"] = _encode(tokenizer, train)
            if validation:
                arrays[f"validation/{name}"] = _encode(tokenizer, validation)
            ratio = sum(map(len, train)) / len(arrays[f"train/{name}"])
            print(
                f"[data] {name}: {len(arrays[f'train/{name}']):,} tokens, {ratio:.2f} characters each",
                flush=True,
            )
        np.savez(saved, **arrays)
    with np.load(saved) as arrays:
        train = {key[6:]: arrays[key] for key in arrays.files if key.startswith("train/")}
        validation = {key[11:]: arrays[key] for key in arrays.files if key.startswith("validation/")}
    return Corpus(train, validation, Tokenizer.load(work / "tokenizer.json"))


def _sample(parts: dict[str, tuple[list[str], list[str]]]) -> list[str]:
    """Text for the tokenizer, in about the proportions of the mixture."""
    chosen = []
    for name, (train, _) in parts.items():
        budget = 25_000_000 * MIXTURE[name][0]
        for document in train:
            budget -= len(document)
            if budget < 0:
                break
            chosen.append(document)
    return chosen


def _encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """One stream of tokens: every document is preceded by the end-of-text token."""
    end = tokenizer.special(END)
    stream: list[int] = []
    for ids in tokenizer.encode_batch(documents):
        stream.append(end)
        stream.extend(ids)
    return np.array(stream, dtype=np.uint16)


class Sampler:
    """Random windows of the training streams, every source passed through evenly, by the mixture's shares."""

    def __init__(self, train: dict[str, np.ndarray], rank: int, ranks: int, seed: int) -> None:
        self.rng = np.random.default_rng([seed, rank])
        self.length = 0
        # Every worker passes through its own part of each stream.
        self.train = {name: np.array_split(stream, ranks)[rank] for name, stream in train.items()}
        self.queues: dict[str, list[int]] = {}

    def batch(self, size: int, length: int, phase: float) -> np.ndarray:
        """`size` windows of length + 1; `phase` 0 is the constant part's mixture, 1 the final one."""
        if length != self.length:
            self.length, self.queues = length, {name: [] for name in self.train}
        names = list(self.train)
        shares = np.array([MIXTURE[name][0] * (1 - phase) + MIXTURE[name][1] * phase for name in names])
        picks = self.rng.choice(len(names), size=size, p=shares / shares.sum())
        return np.stack([self._window(names[pick]) for pick in picks])

    def _window(self, name: str) -> np.ndarray:
        stream, queue = self.train[name], self.queues[name]
        if not queue:
            shift = int(self.rng.integers(0, self.length))
            starts = np.arange(shift, len(stream) - self.length - 1, self.length)
            self.rng.shuffle(starts)
            queue.extend(starts.tolist())
        start = queue.pop()
        return stream[start : start + self.length + 1].astype(np.int64)
