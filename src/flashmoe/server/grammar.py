"""Grammars: only tokens that can go on with the text may come. Made and matched by llguidance."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from flashmoe.engines.base import Engine
from flashmoe.errors import UsageError

# a small model can go on with blanks for ever
_JSON_OPTIONS = {"whitespace_pattern": r"\n? {0,20}"}


def json_rule(schema: dict[str, Any]) -> str:
    """JSON of a schema, as a part of a grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


def json_grammar(schema: dict[str, Any]) -> str:
    """Text that is JSON of a schema."""
    return f"%llguidance {{}}\nstart: {json_rule(schema)}"


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, engine: Engine) -> None:
        ends = [token for token in range(engine.n_vocab) if engine.is_end(token)]
        self.eos_token_id, self.bos_token_id = ends[0], None
        self.special_token_ids = (
            ends  # other control tokens are text here: templates write tool calls with them
        )
        self.tokens = [engine.piece(token, special=True) for token in range(engine.n_vocab)]
        self._engine = engine

    def __call__(self, text: bytes) -> list[int]:
        return self._engine.tokenize(text.decode(errors="replace"), special=True, begin=False)


class Grammars:
    """Makes the grammars of one model. Thread-safe."""

    def __init__(self, engine: Engine) -> None:
        vocabulary = _Vocabulary(engine)
        self._tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=vocabulary.special_token_ids)

    def make(self, text: str) -> Grammar:
        """A grammar in llguidance's notation, at its beginning. Raises UsageError where it makes no sense."""
        return Grammar(self._tokenizer, text)


class Grammar:
    """A grammar and how far the text has come in it. Belongs to one generation."""

    def __init__(self, tokenizer: LLTokenizer, text: str) -> None:
        self._matcher = LLMatcher(tokenizer, text)
        self._check()
        self._mask = allocate_token_bitmask(1, tokenizer.vocab_size)

    def apply(self, logits: NDArray[np.float32]) -> None:
        fill_next_token_bitmask(self._matcher, self._mask)
        self._check()
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(logits)]
        logits[allowed == 0] = -np.inf

    def accept(self, token: int) -> bool:
        self._matcher.consume_token(token)
        self._check()
        return not self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            # it goes on with lines of the grammar, which is ours and not the user's
            reason = re.split(r"\n +\d+ \|", self._matcher.get_error())[0].rpartition("JSON schema: ")[2]
            raise UsageError(f"this cannot be made a grammar: {' '.join(reason.split())}")
