"""From tokens to text that can be shown: whole characters, and nothing that may become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from flashmoe.generation import Token


def held_back(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(len(mark) > n and mark.startswith(text[-n:]) for mark in marks):
            return n
    return 0


class TextStream:
    """Text of a growing list of tokens, up to the first of the stop strings."""

    def __init__(self, piece: Callable[[int], bytes], stops: Sequence[str] = ()) -> None:
        self._piece, self._stops = piece, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text that is not given out yet
        self._given = 0  # characters given out
        self._tokens: list[tuple[int, Token]] = []  # those not given out, with where their text begins
        self.stopped = False

    def feed(self, token: Token) -> tuple[str, list[Token]]:
        """Text that can be given out now, and the tokens that it begins in."""
        self._tokens.append((self._given + len(self._held), token))
        before = len(self._held)
        self._held += self._decoder.decode(self._piece(token.id))
        ends = [
            at for stop in self._stops if (at := self._held.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if ends:
            self.stopped = True
            return self._give(min(ends))
        return self._give(len(self._held) - held_back(self._held, self._stops))

    def flush(self) -> tuple[str, list[Token]]:
        """The rest, at the end."""
        if self.stopped:
            return "", []
        self._held += self._decoder.decode(b"", final=True)
        text, _ = self._give(len(self._held))
        tokens, self._tokens = [token for _, token in self._tokens], []
        return text, [*_, *tokens]

    def _give(self, n: int) -> tuple[str, list[Token]]:
        text, self._held = self._held[:n], self._held[n:]
        self._given += n
        given = [token for at, token in self._tokens if at < self._given]
        self._tokens = self._tokens[len(given) :]
        return text, given
