"""One prompt being continued, a step at a time: what `Model.generate` runs to its end and a server runs in turns."""

from __future__ import annotations

import codecs
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.base import Sampling
from flashmoe.errors import UsageError

if TYPE_CHECKING:
    from flashmoe.model import Model

Chunk = tuple[int, ...]  # tokens that were evaluated, or will be, at once


class Reuse(Enum):
    """What a new prompt may take from the tokens that its sequence holds already."""

    NONE = "none"
    #: Whole micro-batches that the new prompt would evaluate just so: the result is the same to the last bit.
    EXACT = "exact"
    #: The longest common beginning. Kernels for one token round otherwise than kernels for several, so the logits can
    #: differ in their last bits from those of a prompt that is read anew.
    ANY = "any"


class Rule(Protocol):
    """Changes logits before a token is chosen: a grammar, a penalty."""

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Change `logits`, float32 [vocabulary], in place."""
        ...

    def accept(self, token: int) -> bool:
        """`token` was chosen. Returns False where nothing may follow it."""
        ...


@dataclass(frozen=True)
class Token:
    """A token that was made. With logprobs: its own, and the likeliest tokens with theirs, before any rule."""

    id: int
    logprob: float = math.nan
    top: tuple[tuple[int, float], ...] = ()


class Held:
    """The tokens that one sequence of the engine holds, in the chunks in which they were evaluated."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        #: Number of the prompt among all of this model's, for traces.
        self.number = -1

    def common(self, prompt: Sequence[int], step: int, reuse: Reuse) -> int:
        """How many tokens of `prompt` need not be evaluated; always less than all, because the last gives logits."""
        if reuse is Reuse.EXACT:
            plan, n = split(prompt, step), 0
            for chunk, held in zip(plan[:-1], self.chunks, strict=False):
                if chunk != held:
                    break
                n += len(chunk)
            return n
        if reuse is Reuse.ANY:
            held_tokens = [token for chunk in self.chunks for token in chunk]
            n = 0
            for token, other in zip(prompt[:-1], held_tokens, strict=False):
                if token != other:
                    break
                n += 1
            return n
        return 0

    def cut(self, n: int) -> None:
        """Keep the first `n` tokens."""
        kept, left = [], n
        for chunk in self.chunks:
            if left <= 0:
                break
            kept.append(chunk[:left])
            left -= len(chunk)
        self.chunks = kept


def split(tokens: Sequence[int], step: int) -> list[Chunk]:
    """`tokens` in micro-batches of `step`."""
    return [tuple(tokens[i : i + step]) for i in range(0, len(tokens), step)]


class Generation:
    """A prompt and what is made after it, in one sequence of a model's engine. Call `step` until `finished`."""

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        *,
        sequence: int = 0,
        max_tokens: int = -1,
        sampling: Sampling | None = None,
        reuse: Reuse = Reuse.NONE,
        rules: Iterable[Rule] = (),
        logprobs: int | None = None,
    ) -> None:
        """Continue `prompt` (token ids), with at most `max_tokens` tokens (-1: as many as the context takes).

        logprobs: give each token its logarithm of probability, and those of so many of the likeliest.
        Nothing is evaluated yet. Raises UsageError for an empty or too long prompt.
        """
        check_prompt(prompt, model.engine.n_ctx)
        self.prompt, self.sequence = list(prompt), sequence
        room = model.engine.n_ctx - len(prompt) + 1
        self._limit = room if max_tokens < 0 else min(room, max_tokens)
        self._model, self._reuse, self._rules, self._logprobs = model, reuse, list(rules), logprobs
        self._sampler = model.engine.sampler(sampling or Sampling())
        self._todo: deque[Chunk] | None = None
        self.made: list[int] = []
        #: Tokens of the prompt that were there already.
        self.reused = 0
        #: Why it ended: "stop" (the model's end token, or a rule) or "length" (`max_tokens`, or the context is full).
        self.finished: str | None = None

    def step(self) -> Token | None:
        """Evaluate the next micro-batch of the prompt, or the last token, and choose the next one.

        Returns it, or None while the prompt is being read and at the end token. Raises what the engine's `decode`
        raises; the generation is over then.
        """
        if self._todo is None:
            self._todo = self._begin()
        chunk = self._todo.popleft()
        if self.made:
            self._model.evaluate(chunk, self.sequence, decode=True)
            return self._choose()
        self._model.progress("prefill", self._model.engine.past(self.sequence), len(self.prompt))
        self._model.evaluate(chunk, self.sequence, decode=False)
        if self._todo:
            return None
        self._model.progress("prefill", len(self.prompt), len(self.prompt))
        return self._choose()

    def pieces(self) -> Iterator[str]:
        """Run to the end: yields text as it is made, and closes. Raises what `step` raises."""
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        try:
            while not self.finished:
                token = self.step()
                if token and (piece := text.decode(self._model.engine.piece(token.id))):
                    yield piece
        finally:
            self.close()
        if rest := text.decode(b"", final=True):
            yield rest

    def close(self) -> None:
        """Free the sampler. What the sequence holds stays for the next prompt."""
        self._sampler.close()

    def _begin(self) -> deque[Chunk]:
        held, step = self._model.held[self.sequence], self._model.engine.n_ubatch
        common = held.common(self.prompt, step, self._reuse)
        goes_on = self._reuse is Reuse.ANY and common > 0
        self.reused = self._model.keep(self.sequence, common, goes_on=goes_on)
        return deque(split(self.prompt[self.reused :], step))

    def _choose(self) -> Token | None:
        engine = self._model.engine
        assert self._todo is not None
        if not self._limit:
            self.finished = "length"
            return None
        scores = self._scores(engine.live_logits()) if self._logprobs is not None else None
        for rule in self._rules:
            rule.apply(engine.live_logits())
        token = self._sampler.sample()
        self._model.telemetry.token_made()
        if engine.is_end(token):
            self.finished = "stop"
            return None
        self.made.append(token)
        heard = [rule.accept(token) for rule in self._rules]
        if not all(heard):
            self.finished = "stop"
        elif len(self.made) == self._limit:
            self.finished = "length"
        self._todo.append((token,))
        if scores is None:
            return Token(token)
        top = np.argsort(-scores, kind="stable")[: self._logprobs]
        return Token(token, float(scores[token]), tuple((int(i), float(scores[i])) for i in top))

    @staticmethod
    def _scores(logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logarithms of probabilities at temperature 1, [vocabulary]."""
        x = logits.astype(np.float64)
        x -= x.max()
        return x - np.log(np.exp(x).sum())


def check_prompt(prompt: Sequence[int], n_ctx: int) -> None:
    """Raise UsageError where a prompt is empty or does not fit into the context."""
    if not prompt:
        raise UsageError("the prompt is empty")
    if len(prompt) > n_ctx:
        raise UsageError(f"the prompt has {len(prompt)} tokens, the context {n_ctx}: shorten it or raise -c")
