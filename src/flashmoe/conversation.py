"""A conversation with a model: messages in, answers out, and a turn costs only its new tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashmoe.engines.base import Sampling
from flashmoe.generation import Generation, Reuse, check_prompt

if TYPE_CHECKING:
    from flashmoe.model import Model

Message = dict[str, str]

LEFT_FREE = 1 / 4  # of the context, for an answer
KEPT = 1 / 2  # of the context, where that is not free: the rest is read anew, so do it seldom
_THINK = "<think>"


@dataclass(frozen=True)
class Turn:
    """What a turn took."""

    read: int = 0  # tokens of the prompt that were evaluated
    reused: int = 0  # tokens of the prompt that were in the context already
    made: int = 0  # tokens of the answer
    tokens_per_s: float = 0.0  # while answering
    hit_rate: float = 0.0  # of the expert cache, while answering
    forgotten: int = 0  # older turns that were left out to make room
    finished: str = (
        ""  # "stop" (the model's own end), "length" (a limit, or the context is full), "" (interrupted)
    )


class Conversation:
    """Messages and answers, in the first sequence of a model's engine.

    The engine keeps what it has read: a turn evaluates what follows the longest beginning that its prompt shares with
    what is there. Answers are those of llama.cpp evaluating the same tokens in the same steps. A memory that cannot
    be cut (Mamba) reads everything anew where an earlier token changes.

    When the context is too full for an answer, the oldest turns are left out; the system prompt stays.
    """

    def __init__(
        self, model: Model, *, system: str = "", max_tokens: int = -1, sampling: Sampling | None = None
    ) -> None:
        """system: what the model is to follow throughout. max_tokens: of each answer (-1: no limit).

        Raises ModelError where the model has no chat template.
        """
        self._model, self._max_tokens, self._sampling = model, max_tokens, sampling
        #: Takes effect with the next message.
        self.system = system
        model.engine.chat_prompt([{"role": "user", "content": "-"}])
        self.reset()

    def reset(self, messages: Sequence[Message] = ()) -> None:
        """Begin anew, or go on from other `messages` ("user" and "assistant" in turns)."""
        #: All that was said, also what the model does not see any more.
        self.messages = list(messages)
        self.turn = Turn()
        self._first = 0  # of the messages that the model sees
        self._begun = False
        self._text, self._tokens = "", list[int]()  # what the last turn has left in the context

    @property
    def used(self) -> int:
        """Tokens in the context."""
        return self._model.engine.past() if self._begun else 0

    def say(self, message: str) -> Generator[str, None, None]:
        """Answer `message`: yields text as it is made; afterwards `turn` has the figures.

        Stopping in the middle (Ctrl-C, or closing the iterator) leaves the answer so far in the conversation; a message
        without any answer is not kept. Raises UsageError where the message alone does not fit into the context,
        ModelError where the chat template refuses it, and ReadError.
        """
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()  # a second Ctrl-C has kept the last turn from tidying up
        self.messages.append({"role": "user", "content": message})
        self.turn, said = Turn(), ""
        try:
            first = self._first
            text, tokens = self._prompt()
            generation = self._model.start(
                tokens,
                max_tokens=self._max_tokens,
                sampling=self._sampling,
                reuse=Reuse.ANY if self._begun else Reuse.NONE,
            )
            self._begun = True
            before = self._counters()
            # a template may open the thinking itself: then the answer begins inside
            opening = f"{_THINK}\n" if text.rstrip().endswith(_THINK) else ""
            try:
                for piece in generation.pieces():
                    piece, opening = opening + piece, ""
                    said += piece
                    yield piece
            finally:
                self._text, self._tokens = text + said, tokens + generation.made
                self.turn = self._figures(generation, before, (self._first - first) // 2)
        finally:
            if said or self.turn.finished:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def _prompt(self) -> tuple[str, list[int]]:
        """What the model is to continue, as text and as tokens; without the oldest turns if need be."""
        n_ctx, first = self._model.engine.n_ctx, self._first
        room = int(n_ctx * LEFT_FREE)
        if self._max_tokens >= 0:
            room = min(room, self._max_tokens)
        text, tokens = self._render(first)
        if len(tokens) + room > n_ctx:
            while len(tokens) > n_ctx * KEPT and first + 2 < len(self.messages):
                first += 2
                text, tokens = self._render(first)
        check_prompt(tokens, n_ctx)
        self._first = first
        return text, tokens

    def _render(self, first: int) -> tuple[str, list[int]]:
        """The messages from `first` on in the model's template, as text and as tokens."""
        engine = self._model.engine
        system = [{"role": "system", "content": self.system}] if self.system else []
        text = engine.chat_prompt([*system, *self.messages[first:]])
        if self._text and text.startswith(self._text):
            # an answer's own tokens may be others than those that its text would give
            rest = engine.tokenize(text[len(self._text) :], special=True, begin=False)
            if rest and not engine.piece(rest[0]):  # a control token: no word goes across
                return text, self._tokens + rest
        return text, engine.tokenize(text, special=True)

    def _counters(self) -> tuple[float, float, int, int]:
        decode, cache = self._model.telemetry.decode, self._model.cache.stats["decode"]
        return decode.tokens, decode.seconds, cache.hits, cache.requests

    def _figures(self, generation: Generation, before: tuple[float, float, int, int], forgotten: int) -> Turn:
        tokens, seconds, hits, requests = (
            now - then for now, then in zip(self._counters(), before, strict=True)
        )
        return Turn(
            read=len(generation.prompt) - generation.reused,
            reused=generation.reused,
            made=len(generation.made),
            tokens_per_s=tokens / seconds if seconds else 0.0,
            hit_rate=hits / max(1, requests),
            forgotten=forgotten,
            finished=generation.finished or "",
        )
