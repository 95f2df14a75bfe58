"""Figures: made without a display, written with one message where that fails."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.common.files import write_atomically
from flashmoe.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raise UsageError where matplotlib is missing: for commands that work long before they draw."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("figures need matplotlib: pip install 'flashmoe-ssd[plot]'") from None


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches; it belongs to no window and need not be closed. Raises UsageError
    where matplotlib is missing."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a .png, .svg or .pdf. Raises UsageError where the place or the format will not do."""
    try:
        image = io.BytesIO()
        figure.savefig(image, dpi=150, format=Path(path).suffix[1:] or "png")
        write_atomically(Path(path), image.getvalue())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write figure {path}: {error}") from None
