"""A conversation with a model: messages in, answers out, and a turn costs only its new tokens."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmoe.errors import UsageError

if TYPE_CHECKING:
    from flashmoe.engines.base import SamplingParams
    from flashmoe.runtime.model import Model

Message = dict[str, Any]

LEFT_FREE = 1 / 4  # of the context, for an answer
KEPT = 1 / 2  # of the context, where that is not free: the rest is read anew, so do it seldom


@dataclass(frozen=True)
class Turn:
    """The figures of a turn."""

    read: int = 0  # tokens of the prompt that were evaluated
    reused: int = 0  # tokens of the prompt that were in the context already
    made: int = 0  # tokens of the answer
    tokens_per_second: float = 0.0  # while answering
    hit_rate: float = 0.0  # of the expert cache, while answering
    forgotten: int = 0  # older turns that were left out to make room
    finished: str = ""  # "stop" (the model's own end), "length" (a limit, a full context), "" (interrupted)


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it is made: of its text, or of the thoughts before it."""

    text: str
    thought: bool = False


class Conversation:
    """Messages and answers, over llama.cpp's server in this process (`Model.server`).

    The server keeps what it has read: a turn evaluates what follows the longest beginning that its prompt shares with
    what is there, as any client's does. Memories that cannot be cut (Mamba) go back to a checkpoint.

    When the context is too full for an answer, the oldest turns are left out; the system prompt stays.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str = "",
        max_tokens: int = -1,
        sampling: SamplingParams | None = None,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        """system: what the model is to follow throughout. max_tokens: of each answer (-1: no limit).

        request: further fields of every request, see `Model.chat`. Raises LibraryError where the model's library has
        no server.
        """
        self._model, self._max_tokens, self._sampling = model, max_tokens, sampling
        self._request = dict(request or {})
        model.server()  # says why there is none
        #: Takes effect with the next message.
        self.system = system
        self.reset()

    def reset(self, messages: Sequence[Message] = ()) -> None:
        """Begin anew, or go on from other `messages` ("user" and "assistant" in turns)."""
        #: All that was said, also what the model does not see any more.
        self.messages = list(messages)
        self.turn = Turn()
        self._first = 0  # of the messages that the model sees
        self._begun = False
        #: Tokens in the context after the last turn.
        self.used = 0

    def say(self, message: str) -> Generator[str, None, None]:
        """Answer `message`: yields text as it is made; see `stream`."""
        for piece in self.stream(message):
            if not piece.thought:
                yield piece.text

    def stream(self, message: str) -> Generator[Piece, None, None]:
        """Answer `message`: yields thoughts and text as they are made; afterwards `turn` has the figures.

        Stopping in the middle (Ctrl-C, or closing the iterator) leaves the answer so far in the conversation; a message
        without any answer is not kept. Raises UsageError where the message alone does not fit into the context or the
        chat template refuses it, and ReadError.
        """
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()  # a second Ctrl-C has kept the last turn from tidying up
        self.messages.append({"role": "user", "content": message})
        first, self.turn = self._first, Turn()
        said, thought, made = "", "", 0
        timings: Mapping[str, Any] = {}
        finished = ""
        try:
            self._make_room()
            decode = self._model.cache_stats["decode"]
            hits, requests = decode.hits, decode.requests
            deltas = self._model.stream_chat(
                self._shown(),
                max_tokens=self._max_tokens,
                sampling=self._sampling,
                goes_on=self._begun,
                **self._request,
            )
            self._begun = True
            try:
                for delta in deltas:
                    for name in ("reasoning_content", "content"):
                        if piece := delta.get(name):
                            made += 1
                            if name == "content":
                                said += piece
                            else:
                                thought += piece
                            yield Piece(piece, thought=name != "content")
                    finished = delta.get("finish_reason", "")
                    timings = delta.get("timings", {})
            finally:
                deltas.close()  # type: ignore[attr-defined]
                decode = self._model.cache_stats["decode"]
                self.turn = Turn(
                    read=timings.get("prompt_n", 0),
                    reused=timings.get("cache_n", 0),
                    made=timings.get("predicted_n", made),
                    tokens_per_second=timings.get("predicted_per_second", 0.0),
                    hit_rate=(decode.hits - hits) / max(1, decode.requests - requests),
                    forgotten=(self._first - first) // 2,
                    finished=finished,
                )
                self.used = self.turn.read + self.turn.reused + self.turn.made
        finally:
            if said or thought or finished:
                thoughts = {"reasoning_content": thought} if thought else {}
                self.messages.append({"role": "assistant", "content": said, **thoughts})
            else:
                self.messages.pop()

    def _shown(self, first: int | None = None) -> list[Message]:
        """What the model sees, or would from message `first` on."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages[self._first if first is None else first :]]

    def _make_room(self) -> None:
        """Leave the oldest turns out where the context is too full for an answer. Raises UsageError."""
        n_ctx = self._model.engine.n_ctx
        room = int(n_ctx * LEFT_FREE)
        if self._max_tokens >= 0:
            room = min(room, self._max_tokens)
        tokens = self._count(self._first)
        if tokens + room > n_ctx:
            while tokens > n_ctx * KEPT and self._first + 2 < len(self.messages):
                self._first += 2
                tokens = self._count(self._first)
        if tokens >= n_ctx:
            raise UsageError(f"the prompt has {tokens} tokens, the context {n_ctx}: shorten it or raise -c")

    def _count(self, first: int) -> int:
        """Tokens of the prompt from message `first` on."""
        return self._model.server().count_tokens({"messages": self._shown(first), **self._request})
