"""`flashmoe engine`: compute kernels for this processor, in the place of those that the wheel has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from flashmoe.cli import options
from flashmoe.cli.progress import stderr_console, stdout_console
from flashmoe.errors import FlashMoEError

if TYPE_CHECKING:
    from flashmoe.cli.report import JsonFile
    from flashmoe.tools.kernels.build import Result
    from flashmoe.tools.kernels.trial import Trial

app = typer.Typer(
    help="Compute kernels: build llama.cpp's for this processor, add others, choose between them.",
    add_completion=False,
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(help="Name of the kernels, as `flashmoe engine list` shows it.")]
_TITLES = {"fetch": "downloading the source", "configure": "configuring", "time": "timing"}


@app.command("list")
def list_(json_file: options.Json = None) -> None:
    """List the kernels that this wheel and processor have."""
    from flashmoe.engines.llamacpp import kernels
    from flashmoe.engines.llamacpp.library import BUILT_IN

    used = kernels.in_use()
    rows: list[dict[str, Any]] = [{"name": BUILT_IN, "in_use": used is None, "source": "the library itself"}]
    rows += [{**one.facts, "in_use": one == used, "path": str(one.module)} for one in kernels.kept()]
    if json_file:
        json_file.write(rows)
    table = Table(box=None, pad_edge=False)
    for title in ("", "kernels", "from", "decoding", "prompts"):
        table.add_column(title, justify="right" if title in ("decoding", "prompts") else "left")
    for row in rows:
        origin = row["source"] + (f" ({row['compiler']})" if row.get("compiler") else "")
        origin += "" if row.get("repacks", True) else ", fails with repacked weights"
        speeds = (f"{row[name]:.2f}x" if name in row else "" for name in ("decode_ratio", "prompt_ratio"))
        table.add_row("in use" if row["in_use"] else "", row["name"], origin, *speeds)
    stdout_console().print(table, soft_wrap=True)


@app.command("build")
def build(
    archive: Annotated[
        Path | None,
        typer.Argument(
            help="Source archive of the installed xllamacpp (default: download it from the package index)."
        ),
    ] = None,
    json_file: options.Json = None,
    quiet: options.NoProgress = False,
) -> None:
    """Compile llama.cpp's kernels for this processor from the wheel's own source, and use them if they are faster."""
    from flashmoe.tools.kernels.build import build as make

    with _steps(stderr_console(quiet)) as progress:
        result = make(archive, progress)
    _report(result, json_file)


@app.command("add")
def add(
    file: Annotated[
        Path,
        typer.Argument(
            help="A module of ggml's (libggml-cpu-NAME.so), or an archive of several (an npm package's)."
        ),
    ],
    json_file: options.Json = None,
    quiet: options.NoProgress = False,
) -> None:
    """Add kernels that were compiled elsewhere, and use them if they are faster."""
    from flashmoe.tools.kernels.build import add as take

    with _steps(stderr_console(quiet)) as progress:
        result = take(file, progress)
    _report(result, json_file)


@app.command("use")
def use(name: Name) -> None:
    """Use kernels from the next start on; `built-in` are the library's own."""
    from flashmoe.engines.llamacpp import kernels
    from flashmoe.engines.llamacpp.library import BUILT_IN

    if name != BUILT_IN:
        kernels.find(name)
    _written(lambda: kernels.use(name))


@app.command("check")
def check(json_file: options.Json = None, quiet: options.NoProgress = False) -> None:
    """Test and time all kernels again. Exit status 1: some do not work."""
    from flashmoe.tools.kernels.build import check as examine

    with _steps(stderr_console(quiet)) as progress:
        trials = examine(progress)
    if json_file:
        json_file.write([_as_dict(trial) for trial in trials])
    console = stdout_console()
    for trial in trials:
        console.print(f"{trial.name}: {_in_words(trial)}", soft_wrap=True)
    if not trials:
        console.print("no kernels beside the built-in ones: `flashmoe engine build` makes some")
    if not all(trial.proof.plain for trial in trials):
        raise typer.Exit(1)


@app.command("remove")
def remove(name: Name) -> None:
    """Remove kernels; the built-in ones are used where they were in use."""
    from flashmoe.engines.llamacpp import kernels

    one = kernels.find(name)
    _written(lambda: kernels.remove(one))


def _written(act: Callable[[], Any]) -> None:
    from flashmoe.engines.llamacpp.kernels import folder

    try:
        act()
    except OSError as error:
        raise FlashMoEError(f"{folder()}: cannot be written ({error.strerror})") from None


def _report(result: Result, json_file: JsonFile | None) -> None:
    """The result in a line, and as JSON."""
    stdout_console().print(result.sentence(), soft_wrap=True)
    if json_file:
        json_file.write(
            {
                "compiler": result.compiler,
                "tried": [_as_dict(trial) for trial in result.tried],
                "in_use": result.in_use.name if result.in_use else "built-in",
            }
        )


def _in_words(trial: Trial) -> str:
    if not trial.proof.plain:
        return f"does not work ({trial.proof.failure})"
    speeds = f"{trial.decode_ratio:.2f}x in decoding, {trial.prompt_ratio:.2f}x in prompts"
    return (
        speeds if trial.proof.repacked else f"{speeds}; fails with repacked weights ({trial.proof.failure})"
    )


def _as_dict(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.name,
        **trial.proof._asdict(),
        "decode_ratio": trial.decode_ratio,
        "prompt_ratio": trial.prompt_ratio,
    }


@contextmanager
def _steps(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar of what is done now, and how much of it; silent where the console is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.remove_task(task)
                tasks.clear()
                tasks[what] = bar.add_task(_TITLES.get(what, what.replace("try", "testing")))
            bar.update(tasks[what], completed=done, total=total if done else None)

        yield update
