"""`flashmoe pack`: write a model's experts once more, in the layouts that are fastest on this processor."""

from __future__ import annotations

from flashmoe.cli import options
from flashmoe.cli.progress import LoadProgress, stderr_console
from flashmoe.common.units import format_bytes


def pack(
    model: options.Model,
    quiet: options.Silent = False,
) -> None:
    """Write MODEL.flashpack next to a model: its experts, repacked for the fastest kernels of this processor.

    Other commands use the pack automatically. An existing pack is checked, and written again if it does not match.
    The model itself is not changed.
    """
    from flashmoe.tools.packing import make_pack

    console = stderr_console(quiet)
    with LoadProgress(console) as progress:
        made, fresh = make_pack(model, progress.update)
    what = "written; other commands use it by themselves" if fresh else "is whole and fits"
    console.print(f"{made.path}: {format_bytes(made.size)}, {what}", highlight=False)
