"""Figures: what is said where one cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmoe.common.plotting import new_figure, save_figure
from flashmoe.errors import UsageError


@pytest.mark.parametrize("name", ["a file/f.png", "f.nothing"])
def test_figure_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'flashmoe-ssd[plot]'")
    (tmp_path / "a file").touch()
    with pytest.raises(UsageError, match="cannot write figure"):
        save_figure(new_figure(2, 2), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]
