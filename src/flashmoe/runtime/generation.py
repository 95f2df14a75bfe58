"""One prompt being continued, a step at a time, by the engine's own loop: what `Model.start` gives."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from flashmoe.engines.base import SamplingParams
from flashmoe.errors import UsageError
from flashmoe.runtime.decoder import Decoder

#: Called with what is going on ("load" or "prefill"), how much is done, and of how much.
Progress = Callable[[str, int, int], None]


def split(tokens: Sequence[int], step: int) -> list[tuple[int, ...]]:
    """`tokens` in micro-batches of `step`."""
    return [tuple(tokens[i : i + step]) for i in range(0, len(tokens), step)]


class Generation:
    """A prompt and what is made after it. Call `step` until `finished`; another prompt ends it."""

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        progress: Progress,
        *,
        max_tokens: int = -1,
        sampling: SamplingParams | None = None,
    ) -> None:
        """Continue `prompt` (token ids), with at most `max_tokens` tokens (-1: as many as the context takes).

        Nothing is evaluated yet. Raises UsageError for an empty or too long prompt.
        """
        check_prompt(prompt, decoder.engine.n_ctx)
        self.prompt = list(prompt)
        room = decoder.engine.n_ctx - len(prompt) + 1
        self._limit = room if max_tokens < 0 else min(room, max_tokens)
        self._decoder, self._progress = decoder, progress
        self._sampler = decoder.engine.sampler(sampling or SamplingParams())
        self._todo: deque[tuple[int, ...]] | None = None
        self._turn = 0  # the decoder's, while the context is this generation's
        self.made: list[int] = []
        #: Why it ended: "stop" (the model's end token) or "length" (`max_tokens`, or the context is full).
        self.finished: str | None = None

    def step(self) -> int | None:
        """Evaluate the next micro-batch of the prompt, or the last token, and choose the next one.

        Returns it, or None while the prompt is being read and at the end token. Raises what the engine's `decode`
        raises, and UsageError where another prompt has begun since or the model is closed; the generation is over then.
        """
        with self._decoder.access.alone:
            return self._step()

    def _step(self) -> int | None:
        if self._todo is None:
            self._decoder.rewind()
            self._turn = self._decoder.turn
            self._todo = deque(split(self.prompt, self._decoder.engine.n_ubatch))
        self._decoder.access.check()
        if self._turn != self._decoder.turn:
            raise UsageError("another prompt has begun meanwhile: a model continues one at a time")
        chunk = self._todo.popleft()
        if self.made:
            self._decoder.evaluate(chunk, decode=True)
            return self._choose(self._todo)
        self._progress("prefill", self._decoder.engine.past(), len(self.prompt))
        self._decoder.evaluate(chunk, decode=False)
        if self._todo:
            return None
        self._progress("prefill", len(self.prompt), len(self.prompt))
        return self._choose(self._todo)

    def stream(self) -> Iterator[str]:
        """Run to the end: yields text as it is made, and closes. Raises what `step` raises."""
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        try:
            while not self.finished:
                token = self.step()
                if token is not None and (piece := text.decode(self._decoder.engine.piece(token))):
                    yield piece
        finally:
            self.close()
        if rest := text.decode(b"", final=True):
            yield rest

    def close(self) -> None:
        """Free the sampler."""
        self._sampler.close()

    def _choose(self, todo: deque[tuple[int, ...]]) -> int | None:
        if not self._limit:
            self.finished = "length"
            return None
        token = self._sampler.sample()
        self._decoder.telemetry.token_made()
        if self._decoder.engine.is_end(token):
            self.finished = "stop"
            return None
        self.made.append(token)
        todo.append((token,))
        if len(self.made) == self._limit:
            self.finished = "length"
        return token


def check_prompt(prompt: Sequence[int], n_ctx: int) -> None:
    """Raise UsageError where a prompt is empty or does not fit into the context."""
    if not prompt:
        raise UsageError("the prompt is empty")
    if len(prompt) > n_ctx:
        raise UsageError(f"the prompt has {len(prompt)} tokens, the context {n_ctx}: shorten it or raise -c")
