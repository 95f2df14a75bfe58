"""The examples that are plug-ins check themselves. That of Ray: tests/batch/test_ray.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(
    path for path in (Path(__file__).parents[1] / "examples").glob("*.py") if path.stem != "ray_batch"
)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path) -> None:
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "as a" in done.stdout


def test_a_plugin_that_has_moved(tmp_path: Path) -> None:
    """Compiled code is kept for each module: what another one left must not be read for this one."""
    for module in ("fifo_before", "fifo_after"):
        copy = tmp_path / f"{module}.py"
        shutil.copy(EXAMPLES[0].with_name("fifo_policy.py"), copy)
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        program = (
            f"import {module}; policy = {module}.Fifo(); policy.bind({module}.make_residency(1, 8, [2])); "
            "policy.begin_sequence()"  # of the entry points, what compiles in the least time
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        copy.unlink()
