"""Compiled code on disk: a second start compiles nothing, a change compiles all that it changes and no more."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest

SOURCE = Path(__file__).parents[2] / "src"

#: `outcome`, of functions that call another module's: their results, and whether they were compiled.
CALLER = """
import numpy as np
from flashmoe.common.kept import kept, kept_callback
import callee
from callee import Pair, double

@kept()
def own(x):
    return double(x) + callee.OFFSET

@kept()
def apart(pair):
    return pair.left[0] - pair.right[0]

@kept_callback("int64(int64)")
def back(x):
    return own(x)

class Later:
    pair = Pair(np.array([5]), np.array([3]))

results = [own(10), int(apart(Later.pair)), back.ctypes(10)]
compiled = [bool(f.stats.cache_misses) for f in (own, apart)] + [not back.cache_hits]
outcome = [results, compiled]
"""
CALLEE = """
from typing import Any, NamedTuple
from numba import njit

OFFSET, FACTOR = 1, 2

class Pair(NamedTuple):
    left: Any
    right: Any

def times(x, factor):
    return factor * x

times = njit(times)

@njit
def double(x):
    return times(x, FACTOR)
"""


def python(folder: Path, program: str) -> Any:
    """What a program prints that finds its modules in a folder and keeps compiled code there."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{SOURCE}",
        "NUMBA_CACHE_DIR": str(folder / "compiled"),
        "PYTHONDONTWRITEBYTECODE": "1",  # see `outcome`
    }
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


#: Edits of the callee, one after the other, and what then comes out: results, and what was compiled.
EDITS: tuple[tuple[str, str, list[int], list[bool]], ...] = (
    ("@njit\n", "\n\n# a comment\n@njit\n", [21, 2, 21], [False, False, False]),
    (
        "OFFSET, FACTOR = 1, 2",
        "OFFSET, FACTOR = 5, 2",
        [25, 2, 25],
        [True, False, True],
    ),  # named by the caller
    (
        "OFFSET, FACTOR = 5, 2",
        "OFFSET, FACTOR = 5, 3",
        [35, 2, 35],
        [True, False, True],
    ),  # named by the callee
    ("factor * x", "factor * x * x", [305, 2, 305], [True, False, True]),  # in the callee's callee
    ("times = njit(times)", "times = njit(times, fastmath=True)", [305, 2, 305], [True, False, True]),
    ("    left: Any\n    right: Any", "    right: Any\n    left: Any", [305, -2, 305], [False, True, False]),
)


@pytest.fixture
def outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Imports the caller anew: nothing but the disk connects one time with the next."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        sys, "dont_write_bytecode", True
    )  # two edits of a size within a second would look the same
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "compiled"))
    (tmp_path / "caller.py").write_text(CALLER)
    (tmp_path / "callee.py").write_text(CALLEE)

    def get() -> Any:
        for name in ("caller", "callee"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("caller").outcome

    return get


def test_change_of_another_module(tmp_path: Path, outcome: Callable[[], Any]) -> None:
    assert outcome() == [[21, 2, 21], [True, True, True]]
    for old, new, results, compiled in EDITS:
        edit(tmp_path / "callee.py", old, new)
        assert outcome() == [results, compiled], new
        assert outcome() == [results, [False, False, False]], new


@pytest.mark.parametrize("left", [0, 60])
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_files_that_were_cut_off(tmp_path: Path, kind: str, left: int, outcome: Callable[[], Any]) -> None:
    """A full drive, or a power cut: what cannot be read is compiled again."""
    assert outcome() == [[21, 2, 21], [True, True, True]]
    for path in (tmp_path / "compiled").rglob(f"*.{kind}"):
        os.truncate(path, left)
    assert outcome() == [[21, 2, 21], [True, True, True]]
    assert outcome() == [[21, 2, 21], [False, False, False]]


#: Prints, by policy: what `release` returns where nothing is resident (of lru only: it takes long to compile), a sum
#: over the state after a sequence has begun, and which entry points were compiled.
POLICIES = """
import json
import numpy as np
from flashmoe.cache.policies import create
from flashmoe.cache.residency import make_residency
found = {}
for name in ("lru", "lfu", "lecar"):
    policy = create(name)
    policy.bind(make_residency(2, 8, [4, 4]))
    policy.begin_sequence()
    missing = policy.release(0, 0) if name == "lru" else None
    entries = {"begin": policy.kernels.begin, "release": policy.kernels.release}
    compiled = [entry for entry, kernel in entries.items() if kernel.stats.cache_misses]
    found[name] = [missing, sum(float(array.sum()) for array in policy.state().values()), compiled]
print(json.dumps(found))
"""


def test_change_of_a_policy_or_of_what_policies_share(tmp_path: Path) -> None:
    package = tmp_path / "flashmoe"
    shutil.copytree(SOURCE / "flashmoe", package, ignore=shutil.ignore_patterns("__pycache__", "data"))
    policies = package / "cache/policies"
    first = python(tmp_path, POLICIES)
    assert {name: found[2] for name, found in first.items()} == {
        "lru": ["begin", "release"], "lfu": ["begin"], "lecar": ["begin"],
    }  # fmt: skip
    kept: dict[str, Any] = {name: [*found[:2], []] for name, found in first.items()}

    begin = "def begin(st):\n    st.last[0, 0] += 7.0\n\n\ndef victim"
    edit(policies / "lru.py", "def victim", begin)
    edit(policies / "lru.py", "record, victim)", "record, victim, begin=begin)")
    edit(
        policies / "base.py",
        "        return self._res",
        "        assert self._state\n        return self._res",
    )
    assert python(tmp_path, POLICIES) == {**kept, "lru": [-1, kept["lru"][1] + 7, ["begin", "release"]]}
    kept["lru"][1] += 7

    edit(policies / "lfu.py", "COUNT = float(1 << 36)", "COUNT = float(1 << 35)")  # lecar's too
    recompiled = {name: [*found[:2], [] if name == "lru" else ["begin"]] for name, found in kept.items()}
    assert python(tmp_path, POLICIES) == recompiled

    at = "slot = np.int64(res.slot_of[layer, expert])\n    if slot < 0:\n        return -"
    edit(package / "cache/kernels/loops.py", at + "1", at + "2")
    assert python(tmp_path, POLICIES) == {**kept, "lru": [-2, kept["lru"][1], ["release"]]}


#: All entry points of two policies, as the runtime and the simulator call them.
SECOND_START = """
import sys
import numpy as np
from flashmoe.cache.policies import create
from flashmoe.cache.residency import make_residency
misses = 0
for name in ("lru", "lfu-aged"):
    policy = create(name)
    policy.bind(make_residency(2, 8, [4, 4]))
    policy.replay(np.arange(8, dtype=np.int16).reshape(2, 2, 2))
    policy.access(0, np.zeros(2, np.int32), *(np.zeros(2, np.int32) for _ in range(3)))
    misses += sum(sum(k.stats.cache_misses.values()) for k in (policy.kernels.access, policy.kernels.replay))
print(misses, "numba.cpython.setobj" in sys.modules)
"""


def test_a_second_start_does_not_compile() -> None:
    """Nor does it load what numba compiles with."""
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", SECOND_START], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0 False", run.stderr
