"""`flashmoe chat` in a terminal: a line editor with history, answers as Markdown."""

from __future__ import annotations

import sys
import termios
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from flashmoe.cli.markdown import StreamedMarkdown
from flashmoe.cli.pipe import Pipe, with_thoughts
from flashmoe.cli.progress import print_error, stdout_console
from flashmoe.common.files import state_folder
from flashmoe.errors import FlashMoEError
from flashmoe.runtime.conversation import Piece


class Terminal(Pipe):
    """A user at a terminal. Ctrl-C stops an answer, or clears the line; Ctrl-D leaves."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._replies = stdout_console()

    def lines(self, commands: list[str]) -> Iterator[str]:
        session: PromptSession[str] = PromptSession(
            "> ",
            history=_history(),
            completer=WordCompleter(commands, sentence=True),
            complete_while_typing=False,
            key_bindings=_keys(),
        )
        self.note("/help lists the commands; Alt-Enter begins a new line")
        while True:
            try:
                yield session.prompt().encode(errors="replace").decode()
            except KeyboardInterrupt:
                self.note("Ctrl-D or /quit leaves")
            except EOFError:
                return

    def hear(self, answer: Generator[Piece, None, None]) -> None:
        with closing(answer), _silent_keys(), self.progress:
            text = with_thoughts(answer)
            first = next(text, "")
            self.progress.stop()
            with StreamedMarkdown(self._replies) as markdown:
                markdown.add(first)
                for piece in text:
                    markdown.add(piece)

    def fail(self, error: FlashMoEError) -> None:
        """Say what went wrong; the user may try again."""
        print_error(self._replies, error)

    def stop(self) -> None:
        """Ctrl-C has stopped an answer; the user may go on."""
        self.note("(stopped)")


@contextmanager
def _silent_keys() -> Iterator[None]:
    """Do not show what is typed meanwhile, nor "^C": it would stand in the middle of the answer."""
    before = termios.tcgetattr(sys.stdin)
    silent = before[:3] + [before[3] & ~termios.ECHO] + before[4:]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """What was typed in earlier sessions; where that cannot be kept, in this one."""
    path = state_folder() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with open(path, "ab"):
            return FileHistory(str(path))
    except OSError:
        return InMemoryHistory()
