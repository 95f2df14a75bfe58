"""`flashmoe plan`: its arithmetic on made-up machines, and models that are only on a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flashmoe.cache import sizing
from flashmoe.errors import BudgetError, FlashMoEWarning, ModelError
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.curve import HitCurve, hit_curve, nearest, shipped
from flashmoe.storage import disk
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import parse_part, parse_remote, read_gguf
from flashmoe.storage.hub import demo_model
from flashmoe.storage.remote import RemoteFile
from flashmoe.tools import plan as planning
from flashmoe.tools.plan import (
    ALIGN,
    Machine,
    active_bytes,
    fixed_bytes,
    make_plan,
)
from tests.cli.runner import flashmoe, own_process
from tests.conftest import Tiny
from tests.models import split
from tests.simulate.traces import made_up

CURVE = HitCurve("t", "m", 8, 2, 100, "lru", (0.25, 1.0), (0.5, 1.0))
MACHINE = Machine({"Q4_0": 10.0, "F32": 10.0}, {1: 1.0, 4: 2.0, 32: 2.0})


def context_bytes(tokens: int, ubatch: int) -> int:
    """Of a made-up context: a KV cache and compute buffers."""
    return 1000 * tokens + 50_000 * ubatch


def test_hit_rates_between_the_points() -> None:
    assert [CURVE.at(c) for c in (0, 0.125, 0.25, 0.625, 1)] == [0, 0.25, 0.5, 0.75, 1]


def test_read_rates_between_the_depths() -> None:
    assert [MACHINE.read_rate(d) for d in (0.1, 1, 2, 4, 20, 100)] == [1, 1, 1.5, 2, 2, 2]


def test_the_time_of_a_token(tiny: Tiny) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny("llama")))
    made = make_plan(catalog, MACHINE, CURVE, context_bytes)
    active = sum(active_bytes(catalog).values())
    experts = sum(layer.expert_bytes for layer in catalog.layers) * catalog.top_k
    assert experts < active < catalog.dense_bytes + experts
    for row in made.rows:
        missed = catalog.top_k * (1 - row.hit_rate)
        assert row.hit_rate == pytest.approx(CURVE.at(row.capacity))
        assert row.read_bytes_per_token == pytest.approx(experts * (1 - row.hit_rate))
        weights = len(catalog.layers[0].weights)
        assert row.read_seconds_per_token == pytest.approx(
            row.read_bytes_per_token / MACHINE.read_rate(missed * weights) / 1e9
        )
        assert row.compute_seconds_per_token == pytest.approx(active / 1e10 + 1e-4 * len(catalog.layers))
        assert row.tokens_per_second == pytest.approx(
            1 / (row.compute_seconds_per_token + row.read_seconds_per_token)
        )
    speeds = [row.tokens_per_second for row in made.rows]
    assert speeds == sorted(speeds)
    assert made.rows[-1].capacity == 1
    assert made.rows[0].budget_bytes == made.least_budget_bytes


def test_a_context_takes_slots(tiny: Tiny) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny("llama")))
    few, many = (make_plan(catalog, MACHINE, CURVE, context_bytes, n_ctx=n).rows[0] for n in (64, 512))
    assert (few.context, many.context) == (64, 512)
    assert few.slots == many.slots  # the smallest pool in both
    assert many.budget_bytes - few.budget_bytes == context_bytes(512, 1) - context_bytes(64, 1) > 0
    with pytest.warns(FlashMoEWarning, match="more than this model was trained for"):
        assert make_plan(catalog, MACHINE, CURVE, context_bytes, n_ctx=1024).rows[0].context == 1024


def test_the_micro_batch_is_what_loading_chooses(tiny: Tiny) -> None:
    """With the buffers that a real shape has, larger ones cost slots; every row has those that loading looks at."""
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny("llama")))
    made = make_plan(catalog, MACHINE, CURVE, context_bytes, n_ctx=512)
    for row in made.rows[1:]:
        left = row.budget_bytes - fixed_bytes(catalog) - context_bytes(512, 64)
        chosen = sizing.ubatches(catalog, 512, left, 50_000, ALIGN)
        assert list(row.ubatches) == chosen
        assert (row.ubatch, row.slots) == (chosen[0].tokens, chosen[0].slots)
    assert made.rows[0].ubatches == ()  # one token's experts
    assert made.rows[0].ubatch == 1
    assert made.rows[-1].ubatch == 512
    assert "all experts are resident" in made.ubatch_reason
    tight = make_plan(catalog, MACHINE, CURVE, context_bytes, [made.rows[0].budget_bytes], n_ctx=512)
    assert f"-ub auto is 1 at --ram {tight.rows[0].budget_bytes >> 20}MiB" in tight.ubatch_reason


def test_what_is_recommended(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny("llama")))
    everything = make_plan(catalog, MACHINE, CURVE, context_bytes).rows[-1].budget_bytes
    fast = Machine({"Q4_0": 0.001, "F32": 0.001}, {1: 100.0})
    made = make_plan(catalog, fast, CURVE, context_bytes)
    assert made.recommendation.startswith(
        f"--ram {made.least_budget_bytes >> 20}MiB"
    )  # reads cost nothing there
    slow = Machine({"Q4_0": 10.0, "F32": 10.0}, {1: 1e-4})
    assert make_plan(catalog, slow, CURVE, context_bytes).recommendation.startswith(
        f"--ram {everything >> 20}MiB"
    )
    monkeypatch.setattr(planning.memory, "default_ram", lambda: 1 << 20)
    assert "none of these budgets" in make_plan(catalog, slow, CURVE, context_bytes).recommendation
    with pytest.raises(BudgetError, match="smallest that works"):
        make_plan(catalog, slow, CURVE, context_bytes, [1 << 20])


def test_shipped_curves_and_the_nearest() -> None:
    curves = shipped()
    for curve in curves:
        assert list(curve.hit_rate) == sorted(curve.hit_rate)
        assert curve.capacity[-1] == curve.hit_rate[-1] == 1
    assert nearest(curves, "OLMoE-1B-7B-0924-Instruct", 64, 8).model == "OLMoE-1B-7B"
    assert nearest(curves, "somebody's model", 128, 8).model == "GLM-4.5-Air"
    assert nearest(curves, "somebody's model", 64, 6).model == "DeepSeek-V2-Lite"


def test_a_curve_of_ones_own_trace() -> None:
    trace = made_up(400, 3, 16, 2)
    curve = hit_curve(trace, "mine", "lru")
    assert curve.hit_rate[-1] == 1
    assert list(curve.hit_rate) == sorted(curve.hit_rate)
    assert isinstance(trace, RoutingTrace)
    assert min(curve.capacity) * 16 >= 2


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a header needs: /org/repo/resolve/main/FILE, with ranges; notes the bytes sent."""

    folder: Path
    sent: list[int]
    ranges = True

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.folder / self.path.rpartition("/")[2]
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = path.read_bytes(), 200
        asked = self.headers.get("Range")
        if asked and self.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        for name, value in (("ETag", '"1"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.sent.append(len(data))
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """A server for the files in tmp_path, and its class."""
    handler = type("Handler", (Hub,), {"folder": tmp_path, "sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def test_a_header_by_ranges(
    hub: tuple[str, type[Hub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = hub
    data = demo_model()
    (tmp_path / "m.gguf").symlink_to(data)
    local, size = parse_part(data), data.stat().st_size
    monkeypatch.setattr("flashmoe.storage.remote._PIECE", 1000)
    part = parse_remote(Path("m.gguf"), size, RemoteFile(f"{url}/m.gguf", size))
    assert part.metadata == local.metadata
    assert [t.offset for t in part.tensors] == [t.offset for t in local.tensors]
    assert local.data_offset <= sum(handler.sent) < size // 2
    handler.ranges = False
    with pytest.raises(ModelError, match="does not answer range requests"):
        parse_remote(Path("m.gguf"), size, RemoteFile(f"{url}/m.gguf", size))
    with pytest.raises(ModelError, match="cannot be read"):
        parse_remote(Path("n.gguf"), size, RemoteFile(f"{url}/n.gguf", size))


def at_hub(url: str, home: Path) -> dict[str, str]:
    """The environment of a process whose hub is at `url`."""
    return {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}


@pytest.mark.parametrize("parts", [1, 3])
def test_models_on_the_hub(parts: int, hub: tuple[str, type[Hub]], tiny: Tiny, tmp_path: Path) -> None:
    """Split or not: the same plan as of the file, but for its place; nothing is downloaded."""
    url, _ = hub
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny("llama").read_bytes())
    first = split(path, parts)[0] if parts > 1 else path
    home = tmp_path / "home"
    result = own_process(
        "plan",
        f"hf:org/repo:{first.name}",
        "--json",
        "-",
        "--drive",
        tmp_path,
        "-t",
        1,
        env=at_hub(url, home),
    )
    assert result.status == 0, result.err
    there, here = json.loads(result.out), json.loads(flashmoe("plan", first, "--json", "-", "-t", 1).out)
    same = (
        "architecture",
        "file_bytes",
        "dense_bytes",
        "total_expert_bytes",
        "layers",
        "least_budget_bytes",
        "statistics",
    )
    assert {name: there[name] for name in same} == {name: here[name] for name in same}
    assert not list(home.rglob("*.gguf"))


def test_a_file_that_is_not_on_the_hub(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    missing = own_process("plan", "hf:org/repo:none.gguf", env=at_hub(hub[0], tmp_path / "home"))
    assert missing.status == 1
    assert "no file 'none.gguf'" in missing.message


def test_the_table(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_LEAST_FILE", 32 << 20)
    result = flashmoe("plan", tiny("llama"), "-t", 1, "--ram", "1GiB,2GiB")
    assert result.status == 0
    assert "recommended: --ram" in result.out
    assert "-ub auto is" in result.out
    trace = tmp_path / "t.safetensors"
    made_up(50, 3, 8, 2).save(trace)
    own = flashmoe("plan", tiny("llama"), "-t", 1, "--trace", trace, "--json", "-")
    assert json.loads(own.out)["statistics"].startswith("made up")
    made_up(50, 5, 8, 2).save(trace)
    assert "record a trace with this model" in flashmoe("plan", tiny("llama"), "--trace", trace).message
