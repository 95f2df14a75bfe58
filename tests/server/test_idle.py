"""`serve --learn-when-idle`: trains while no request runs, stands still while one does, and ends with the server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flashmoe.cache.policies.default import default_for
from flashmoe.cache.remembered import Remembered
from flashmoe.routing.trace import RoutingTrace
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from tests.cli.runner import flashmoe as command
from tests.server.process import ServerProcess, serving


@pytest.fixture(autouse=True)
def own_cache(own_home: Path) -> Path:
    return own_home


def songs(model: Path, tokens: int) -> Remembered:
    """The model's history: experts that come in songs of eight notes, which no average can tell."""
    catalog = ExpertCatalog.from_gguf(read_gguf(str(model)))
    rng = np.random.default_rng(0)
    n_layers, k, experts = len(catalog.layers), catalog.top_k, catalog.n_experts
    melodies = rng.random((6, 8, n_layers, experts)).argsort(axis=3)[..., :k].astype(np.int16)
    ids = melodies[rng.integers(0, 6, tokens // 8)].reshape(-1, n_layers, k)
    sequence = np.arange(len(ids), dtype=np.int32) // 80
    trace = RoutingTrace(ids, experts, sequence_id=sequence, model=catalog.identity)
    remembered = Remembered(catalog.identity)
    remembered.add_history(trace.expert_ids, trace.sequence_id, experts)
    return remembered


def ask(server: ServerProcess, tokens: int) -> None:
    server.client().completions.create(
        model="demo", prompt="The lighthouse", max_tokens=tokens, extra_body={"ignore_eos": True}
    )


def until(holds: Callable[[], object], seconds: float = 300) -> None:
    late = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < late
        time.sleep(0.05)


def trainers(server: ServerProcess) -> list[int]:
    """Processes that the server has started."""
    tasks = Path(f"/proc/{server.pid}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def state_of(pid: int) -> str:
    """R, S, T (stopped), ...; "" where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_what_is_learnt_while_idle_is_the_next_start_s(demo: Path, tmp_path: Path) -> None:
    """And nothing on the way imports torch."""
    remembered = songs(demo, 2400)
    (tmp_path / "torch.py").write_text("import pathlib; pathlib.Path(__file__).with_name('imported').touch()")
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))}
    with serving(demo, "--cache", "25%", "--learn-when-idle", 0.1, env=paths) as server:
        ask(server, 8)
        until(lambda: any("learnt from" in line for line in server.messages))
        said = next(line for line in server.messages if "learnt from" in line)
        assert not trainers(server)
    assert "better: the next start uses it" in said
    assert not (tmp_path / "imported").exists()
    history = remembered.history()
    assert history
    assert history.n_tokens > 2400  # the request's are in it, once
    assert default_for(remembered.model) == f"adaptive:{remembered.policy}"


def test_stands_still_while_a_request_runs_and_ends_with_the_server(demo: Path) -> None:
    songs(demo, 20_000)
    with serving(demo, "--cache", "25%", "--learn-when-idle", 0.1) as server:
        ask(server, 8)
        until(lambda: trainers(server))
        (child,) = trainers(server)
        assert os.getpriority(os.PRIO_PROCESS, child) in (0, 19)  # 0 until it has begun
        stream = server.client().completions.create(
            model="demo", prompt="The", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        until(lambda: state_of(child) == "T")
        stream.close()
        until(lambda: state_of(child) in ("R", "S", "D"))
        assert server.stop() == 0
    assert state_of(child) == ""


def test_a_budget_without_room_is_kept(demo: Path) -> None:
    songs(demo, 2400)
    with serving(demo, "--ram", "300MiB", "--learn-when-idle", 0.1) as server:
        ask(server, 8)
        until(lambda: any("more than the budget has left" in line for line in server.messages))
        assert not trainers(server)


def test_is_refused_where_nothing_is_remembered(demo: Path) -> None:
    for other in (("--no-learn",), ("--approx", "cache:0.5")):
        run = command("serve", demo, "--learn-when-idle", 1, *other)
        assert run.status == 2
        assert "--learn-when-idle" in run.err
