"""What goes to stderr: progress while weights load and while a prompt is read, and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from flashmoe.common.text import printable

_TITLES = {
    "load": "loading dense weights",
    "prefill": "reading the prompt",
    "pack": "packing experts",
    "check": "checking the pack",
    "batch": "answering requests",
    "verify": "hashing experts",
}


def stderr_console(quiet: bool) -> Console:
    """A console on stderr that says nothing when `quiet`. Brackets are text: file names have them."""
    return Console(stderr=True, quiet=quiet, soft_wrap=True, markup=False, highlight=False)


def stdout_console(quiet: bool = False) -> Console:
    """The same for what a command was asked for, in tables of the terminal's width."""
    return Console(quiet=quiet, markup=False, highlight=False)


def print_error(console: Console, error: Exception) -> None:
    """Print an error as one line."""
    console.print(Text.assemble(("error:", "bold red"), " ", printable(" ".join(str(error).split()))))


@contextmanager
def measuring(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar of which measurement runs, and how many are done; silent where the console is no terminal.

    Gives what is called with its name, the number that are done, and of how many.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=1,  # drawing takes processor time from what is measured
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


class LoadProgress:
    """A bar per stage, on a terminal only; gone with `stop`, and back with the next `update`.

    A context manager that can be entered again; outside of it, updates show nothing.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = False
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        """Called by what makes progress; stages are those of `_TITLES`."""
        if not (self._open and self._console.is_terminal):
            return
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._bars = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._bars.start()
            self._tasks.clear()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(_TITLES[stage], total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def stop(self) -> None:
        """Remove the bars: text is coming."""
        if self._bars:
            self._bars.stop()
            self._bars = None

    def __enter__(self) -> LoadProgress:
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self.stop()
