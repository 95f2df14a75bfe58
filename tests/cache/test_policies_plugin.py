"""A policy of another package: found by its entry point, and as good as a built-in one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import numpy as np
import pytest

from flashmoe.cache import policies
from flashmoe.cache.residency import check_residency, make_residency
from flashmoe.common import plugins
from flashmoe.errors import PolicyError
from flashmoe.simulate.replay import parse_policies

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example of the documentation, installed as an entry point."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    (tmp_path / "fifo_plugin.py").write_text(code[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("fifo", "fifo_plugin:Fifo", policies.ENTRY_POINTS),
        EntryPoint("broken", "fifo_plugin:np", policies.ENTRY_POINTS),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: EntryPoints(points).select(group=group))
    yield
    sys.modules.pop("fifo_plugin", None)


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
    ids = np.array([0, 1, 0, 2, 0, 1], np.int16).reshape(-1, 1, 1)
    assert policy.replay(ids, want_bits=True).bits.ravel().tolist() == [1, 1, 2, 1, 1, 1]
    check_residency(policy.residency)
    with pytest.raises((PolicyError, TypeError)):
        policies.create("broken")


def test_what_the_built_in_policies_are() -> None:
    assert set(policies.BUILTIN) - set(policies.without_file()) == {"flashmoe", "flashmoe+"}
    assert set(policies.suggested()) == {"lfu-aged", "lfru", "lecar", "adaptive", "lru"}
