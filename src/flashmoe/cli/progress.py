"""Progress on stderr, while weights load and while a prompt is read."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_TITLES = {
    "load": "loading dense weights",
    "prefill": "reading the prompt",
    "pack": "packing experts",
    "check": "checking the pack",
}


def stderr_console(quiet: bool) -> Console:
    """A console on stderr that says nothing when `quiet`."""
    return Console(stderr=True, quiet=quiet, soft_wrap=True)


class LoadProgress:
    """One bar per stage, gone when the first token is there. A context manager."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._tasks: dict[str, TaskID] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        """Called by what makes progress; stages are those of `_TITLES`."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(_TITLES[stage], total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def stop(self) -> None:
        """Remove the bars: text is coming."""
        self._progress.stop()

    def __enter__(self) -> LoadProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
