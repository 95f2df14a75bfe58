"""`flashmoe chat` without a terminal: lines in, plain text out."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from io import TextIOWrapper

from rich.console import Console

from flashmoe.cli.progress import LoadProgress, stderr_console
from flashmoe.errors import FlashMoEError, UsageError
from flashmoe.runtime.conversation import Piece


class Pipe:
    """Messages from standard input, one a line; answers to standard output, everything else to the console."""

    def __init__(self, console: Console) -> None:
        self.progress = LoadProgress(console)
        self._notes, self._replies = console, stderr_console(quiet=False)

    def lines(self, commands: list[str]) -> Iterator[str]:
        """Messages, as they come. `commands`: names of commands, which a terminal completes."""
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
        try:
            for line in sys.stdin or ():
                yield line.removesuffix("\n")
        except UnicodeDecodeError:
            raise UsageError("standard input is not UTF-8 text") from None

    def hear(self, answer: Generator[Piece, None, None]) -> None:
        """Show an answer as it is made."""
        with closing(answer), self.progress:
            for text in with_thoughts(answer):
                self.progress.stop()
                sys.stdout.write(text)
                sys.stdout.flush()
        sys.stdout.write("\n")

    def note(self, text: str) -> None:
        """Show a remark on the last answer."""
        self._notes.print(text, style="dim", highlight=False, markup=False)

    def reply(self, text: str) -> None:
        """Show the reply of a command."""
        self._replies.print(text, style="dim", highlight=False, markup=False)

    def fail(self, error: FlashMoEError) -> None:
        """A message or a command has failed, which ends the conversation: raises `error`."""
        raise error

    def stop(self) -> None:
        """Ctrl-C has stopped an answer, which ends the conversation: raises KeyboardInterrupt."""
        raise KeyboardInterrupt


def with_thoughts(answer: Iterable[Piece]) -> Iterator[str]:
    """An answer as one text, thoughts in <think>."""
    thinking = False
    for piece in answer:
        if piece.thought != thinking:
            thinking = piece.thought
            yield "<think>" if thinking else "</think>\n\n"
        yield piece.text
