"""A policy of another package: found by its entry point."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from flashmoe.cache import policies
from flashmoe.cache.residency import make_residency
from flashmoe.common import plugins
from flashmoe.errors import PolicyError
from flashmoe.simulate.replay import parse_policies

ROOT = Path(__file__).parents[2]


def example_of_the_documentation() -> str:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/policies.md").read_text(), re.DOTALL)
    assert code
    return code[1]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example of the documentation, installed as an entry point; numba takes its state's name once."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "fifo_plugin.py").write_text(example_of_the_documentation(), encoding="utf-8")
    points = [
        EntryPoint("fifo", "fifo_plugin:Fifo", policies.ENTRY_POINTS),
        EntryPoint("broken", "fifo_plugin:np", policies.ENTRY_POINTS),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(plugins, "entry_points", lambda group: EntryPoints(points).select(group=group))
        yield
    sys.modules.pop("fifo_plugin", None)


@pytest.mark.usefixtures("plugin")
def test_the_list_says_what_each_is_and_where_it_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_plugin.py").write_text("raise RuntimeError('no such device')")
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("failing", "failing_plugin:Policy", policies.ENTRY_POINTS),
        *plugins.entry_points(group=policies.ENTRY_POINTS),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: EntryPoints(points).select(group=group))
    rows = {row.name: row for row in policies.listed()}
    assert list(rows) == policies.available()
    assert (rows["fifo"].file, rows["fifo"].about, rows["fifo"].package) == ("", "", "fifo_plugin")
    assert "no such device" in rows["failing"].about
    assert [rows[name].file for name in ("lru", "adaptive", "flashmoe+")] == ["", "possible", "needed"]
    for name in policies.BUILTIN:
        assert rows[name].about
        assert len(rows[name].about) <= 80
        assert rows[name].package == "flashmoe"


@pytest.mark.usefixtures("plugin")
def test_a_policy_from_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fifo" in policies.available()
    assert "fifo" in parse_policies("all")
    assert "fifo" not in policies.suggested()
    made_by = type(policies.create("fifo"))
    with monkeypatch.context() as patch:
        patch.setattr(made_by, "needs_file", True)
        patch.setattr(made_by, "suggested", True)
        assert "fifo" not in parse_policies("all")
        assert "fifo" in policies.suggested()
    policy = policies.create("fifo")
    policy.bind(make_residency(1, 8, [2]))
    with pytest.raises((PolicyError, TypeError)):
        policies.create("broken")


def definitions(code: str) -> dict[str, list[str]]:
    """The functions and methods of a module: their arguments and statements, without docstrings."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef):
            body = [ast.dump(statement) for statement in node.body if not isinstance(statement, ast.Expr)]
            found[node.name] = [argument.arg for argument in node.args.args] + body
    return found


def test_example_of_the_documentation() -> None:
    """It does what the example beside it does, which checks itself (tests/test_examples.py)."""
    shown = definitions(example_of_the_documentation())
    own = definitions((ROOT / "examples/fifo_policy.py").read_text())
    assert {"record", "victim", "make_state"} <= shown.keys()
    assert shown == {name: own[name] for name in shown}


def test_what_the_built_in_policies_are() -> None:
    assert set(policies.BUILTIN) - set(policies.without_file()) == {"flashmoe", "flashmoe+"}
    assert set(policies.suggested()) == {"lfu-aged", "lfru", "lecar", "adaptive", "lru"}
