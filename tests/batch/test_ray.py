"""examples/ray_batch.py on a Ray of this machine: two actors, one of which is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.batch.inputs import request, same, write
from tests.batch.kills import batch

EXAMPLE = Path(__file__).parents[2] / "examples/ray_batch.py"
LINES = 96
pytest.importorskip("ray", reason="ray is not installed: pip install 'flashmoe-ssd[ray]'")


def workers(driver: int) -> list[psutil.Process]:
    """Actors that have loaded the model."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "MapWorker" in (process.cmdline() or [""])[0] and any(
                "libllama" in part.path or "xllamacpp" in part.path for part in process.memory_maps()
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_an_actor_is_killed(demo: Path, tmp_path: Path) -> None:
    """Every line is answered once, as `flashmoe batch` answers it."""
    source = write(tmp_path / "in.jsonl", [request(f"number {i}", max_tokens=24) for i in range(LINES)])
    out = tmp_path / "out.jsonl"
    options = [
        "--workers",
        "2",
        "--parallel",
        "1",
        "--cache",
        "50%",
        "--threads",
        "1",
        "--n-ctx",
        "128",
        "--cpus",
        "0.5",
    ]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, str(EXAMPLE), str(demo), str(source), str(out), *options, "--n-ctx", "128"]
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True) as driver,
    ):
        killed = 0
        while driver.poll() is None:
            if not killed and len(found := workers(driver.pid)) == 2:
                time.sleep(1)  # they are at work, or about to be
                killed = found[0].pid
                os.kill(killed, signal.SIGKILL)
            time.sleep(0.05)
    said = (tmp_path / "log").read_text()
    assert driver.returncode == 0, said
    assert killed
    assert f"{LINES} lines answered by 2 workers" in said
    with batch(demo, source, tmp_path / "alone.jsonl", 1) as process:
        assert process.wait(120) == 0
    assert same(out) == same(tmp_path / "alone.jsonl")
