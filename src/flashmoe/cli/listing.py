"""`flashmoe policies` and `flashmoe predictors`: what there is to choose from, other packages' included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from flashmoe.cli import options
from flashmoe.cli.progress import stdout_console
from flashmoe.common.text import printable

if TYPE_CHECKING:
    from flashmoe.cli.report import JsonFile
    from flashmoe.common.plugins import Listed


def policies(json_file: options.Json = None, quiet: options.Silent = False) -> None:
    """List the eviction policies, those of plug-ins included."""
    from flashmoe.cache.policies import listed

    _show(listed(), json_file, quiet)


def predictors(json_file: options.Json = None, quiet: options.Silent = False) -> None:
    """List the predictors for prefetching, those of plug-ins included."""
    from flashmoe.prefetch import listed

    _show(listed(), json_file, quiet)


def _show(rows: Sequence[Listed], json_file: JsonFile | None, quiet: bool) -> None:
    if json_file:
        json_file.write([asdict(row) for row in rows])
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("name", "what it does", "from"):
        table.add_column(name)
    spelled = {"needed": ":FILE", "possible": "[:FILE]", "": ""}
    for row in rows:
        cells = (row.name + spelled[row.file], row.about, row.package)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    stdout_console(quiet).print(table)
