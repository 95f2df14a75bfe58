"""The model's own byte-level BPE vocabulary, with the pre-tokenisation of GPT-2 (llama.cpp's "gpt-2")."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as Bpe
from tokenizers import decoders, models, pre_tokenizers, trainers

END, USER, ASSISTANT, SYSTEM = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIALS = [END, USER, ASSISTANT, SYSTEM]


class Tokenizer:
    """A thin wrapper that also knows the vocabulary in the form the GGUF file wants."""

    def __init__(self, bpe: Bpe) -> None:
        self.bpe = bpe

    @classmethod
    def train(cls, texts: list[str], size: int) -> Tokenizer:
        """Learn the merges from `texts`."""
        bpe = Bpe(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        cleaned = (text if "<|" not in text else _without_specials(text) for text in texts)
        bpe.train_from_iterator(cleaned, trainer)
        return cls(bpe)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        return cls(Bpe.from_file(str(path)))

    def save(self, path: Path) -> None:
        self.bpe.save(str(path))

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.bpe.encode_batch(texts)]

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(ids, skip_special_tokens=False)

    def special(self, text: str) -> int:
        """The id of a special token."""
        return self.bpe.token_to_id(text)

    @property
    def size(self) -> int:
        return self.bpe.get_vocab_size()

    def stream(self) -> list[str]:
        """The vocabulary's strings in the order of their ids."""
        vocabulary = self.bpe.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    def merges(self) -> list[str]:
        """The merges as "left right", first learnt first."""
        merges = json.loads(self.bpe.to_str())["model"]["merges"]
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _without_specials(text: str) -> str:
    for special in SPECIALS:
        text = text.replace(special, "")
    return text
