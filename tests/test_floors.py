"""Imports point down: no module imports one of a higher floor, and no two floors import each other."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src/flashmoe"
#: From the top; those of one line stand side by side. docs/architecture.md shows the same order.
FLOORS = (
    ("cli",), ("server",), ("bench", "tools"), ("runtime",), ("learn", "simulate"), ("engines",), ("prefetch",),
    ("cache",), ("routing",), ("storage",), ("common",), ("errors",),
)  # fmt: skip
HEIGHT = {name: -number for number, floor in enumerate(FLOORS) for name in floor}


def imported(path: Path) -> set[str]:
    """Floors that a module imports, wherever in it; the package's face, `flashmoe` itself, is above all."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *inside = name.split(".")
            if package == "flashmoe" and inside and inside[0] in HEIGHT:
                found.add(inside[0])
    return found


def test_imports_point_down() -> None:
    arrows = {
        (path.relative_to(SOURCE).parts[0].removesuffix(".py"), other, str(path.relative_to(SOURCE)))
        for path in SOURCE.rglob("*.py")
        if path != SOURCE / "__init__.py"
        for other in imported(path)
    }
    up = sorted((path, other) for own, other, path in arrows if HEIGHT[other] > HEIGHT[own])
    assert not up
    pairs = {(own, other) for own, other, _ in arrows if own != other}
    assert not [pair for pair in pairs if pair[::-1] in pairs]


def test_every_module_has_a_room() -> None:
    loose = {path.name for path in SOURCE.iterdir() if path.suffix == ".py"}
    assert loose == {"__init__.py", "errors.py"}
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == (HEIGHT.keys() - {"errors"}) | {"data"}
