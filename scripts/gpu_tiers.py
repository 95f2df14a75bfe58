"""Experts in three tiers (GPU, pinned RAM, drive), measured on a machine with a CUDA GPU, with one command:

    python scripts/gpu_tiers.py FOLDER [--ram 100GiB] [--json REPORT.json] [--plot TIMELINE.png]

Makes checkpoints of OLMoE-1B-7B's and Qwen3-30B-A3B's shapes in FOLDER (13.8 and 61 GB, once), generates with 25 and
50 % of the experts on the GPU, and prints tokens/s, requests by tier, and GB/s over PCIe and from the drive beside what
each reaches alone. The figure shows one token: copies, what the GPU and the CPU computed, and waiting for the drive.
The baseline is accelerate's device map with offloading, given as much of the GPU as the run beside it took.

    python scripts/gpu_tiers.py FOLDER --device cpu --tiny

runs the same on tiny shapes without a GPU: for trying the script out, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import make_checkpoint

import flashmoe
from flashmoe.common.memory import default_ram
from flashmoe.common.plotting import new_figure, save_figure
from flashmoe.common.units import format_bytes
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.transformers import device as devices
from flashmoe.engines.transformers.experts import PooledExperts
from flashmoe.runtime.model import Model
from flashmoe.storage.disk import read_ceiling

PROMPT = list(range(100, 164))
VRAM = ("25%", "50%")
COPY, GPU, CPU, DRIVE = "copied", "GPU computes experts", "CPU computes experts", "waits for the drive"


def run(folder: Path, vram: str, ram: str | None, tokens: int) -> dict[str, Any]:
    """Generate with tiers, and record one token more."""
    _reset_peak()
    with flashmoe.load(folder, engine="transformers", vram=vram, ram=ram, n_ctx=1024) as model:
        made = model.start(PROMPT, max_tokens=tokens, sampling=SamplingParams(temperature=0))
        while not made.finished:
            made.step()
        stats = model.stats
        tiers = stats["tiers"]
        requests = max(1, sum(tiers[name] for name in ("vram_hits", "ram_hits", "ssd_misses")))
        return {
            "vram": vram,
            "tokens_per_second": stats["decode"]["tokens_per_second"],
            **{f"{name}_share": tiers[name] / requests for name in ("vram_hits", "ram_hits", "ssd_misses")},
            "tiers": tiers,
            "pcie_gb_per_s": tiers["pcie_bytes_per_second"] / 1e9,
            "pcie_ceiling_gb_per_s": copy_ceiling(),
            "ssd_gb_per_s": stats["io"]["read_bytes_per_second"] / 1e9,
            "ssd_ceiling_gb_per_s": read_ceiling(model.cache.reader, model.catalog.read_bytes, fresh=True),
            "stall_share": stats["io"]["stall_share"],
            "ram_slots": stats["cache"]["slots"],
            "vram_bytes": _peak(),
            "timeline": record(model, made.made[-1]),
            "tokens": made.made,
        }


def offloaded(folder: Path, vram_bytes: int, tokens: int, cuda: bool) -> dict[str, Any]:
    """Generate with accelerate: as many layers on the GPU as fit into `vram_bytes`, others in RAM or on the drive."""
    import transformers

    places: Any = "auto"
    if not cuda:
        ends = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        places = {**dict.fromkeys(ends, "cpu"), "model.layers": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=places,
        max_memory={0: vram_bytes, "cpu": default_ram()} if cuda else None,
        offload_folder=folder / "offload",
    )
    ids, past, seconds, made = torch.tensor([PROMPT], device="cuda" if cuda else "cpu"), None, [], []
    with torch.inference_mode():
        for _ in range(tokens):
            began = time.perf_counter()
            found = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, ids = found.past_key_values, found.logits[:, -1].argmax(-1, keepdim=True)
            made.append(int(ids))
            seconds.append(time.perf_counter() - began)
    return {"tokens_per_second": (tokens - 1) / sum(seconds[1:]), "tokens": made}


def copy_ceiling() -> float:
    """1e9 bytes per second of one large copy from pinned memory, at best of three."""
    device = devices.open_device()
    cuda = device.place.type == "cuda"
    source = torch.zeros(256 << 20 if cuda else 1 << 20, dtype=torch.uint8, pin_memory=cuda)
    target = torch.zeros_like(source, device=device.place)
    rates = []
    for _ in range(3):
        before = device.copy_seconds
        device.copy([(target, source)])
        device.settle()
        rates.append(source.nbytes / (device.copy_seconds - before) / 1e9)
    return max(rates)


class Clock:
    """Moments on the GPU's streams and on the CPU, in milliseconds from the start."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        if cuda:
            torch.cuda.synchronize()
        self._start = self.mark()
        self._began = time.perf_counter()

    def mark(self, stream: Any = None) -> Any:
        """Now: on a stream, when what is queued there before has ended."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream())
        return event

    def milliseconds(self, mark: Any) -> float:
        if isinstance(mark, float):
            return 1e3 * (mark - self._began)
        torch.cuda.synchronize()
        return float(self._start.elapsed_time(mark))


def record(model: Model, token: int) -> list[dict[str, Any]]:
    """Evaluate one token; what was done from when to when."""
    engine: Any = model.engine
    device = engine._front.device
    cuda = device.place.type == "cuda"
    marks: list[tuple[str, Any, Any]] = []
    clock = Clock(cuda)
    stream = device._copies if cuda else None

    def copy(pairs: Any, call: Callable[[Any], None] = device.copy) -> None:
        before = clock.mark(stream)
        call(pairs)
        marks.append((COPY, before, clock.mark(stream)))

    def compute(
        self: Any, expert: int, slot: Any, hidden: Any, weights: Any, call: Any = PooledExperts.compute
    ) -> Any:
        there = hidden.device.type == "cuda"
        before = clock.mark() if there else time.perf_counter()
        found = call(self, expert, slot, hidden, weights)
        marks.append(
            (GPU if there or not cuda else CPU, before, clock.mark() if there else time.perf_counter())
        )
        return found

    def wait(ticket: Any, call: Callable[[Any], None] = model.cache.reader.wait) -> None:
        before = time.perf_counter()
        call(ticket)
        marks.append((DRIVE, before, time.perf_counter()))

    with (
        _instead(device, "copy", copy),
        _instead(PooledExperts, "compute", compute),
        _instead(model.cache.reader, "wait", wait),
    ):
        model.decoder.evaluate([token], decode=True)
    return [
        {"kind": kind, "start_ms": clock.milliseconds(a), "end_ms": clock.milliseconds(b)}
        for kind, a, b in marks
    ]


def overlap(timeline: list[dict[str, Any]]) -> float:
    """Share of the time of copies during which the GPU computed experts."""
    copies, computes = ([s for s in timeline if s["kind"] == kind] for kind in (COPY, GPU))
    total = sum(s["end_ms"] - s["start_ms"] for s in copies)
    both = sum(
        max(0.0, min(a["end_ms"], b["end_ms"]) - max(a["start_ms"], b["start_ms"]))
        for a in copies
        for b in computes
    )
    return both / total if total else 0.0


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time lines of one token, one below the other."""
    figure = new_figure(9, 2.2 * len(rows))
    for axes, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        for y, kind in enumerate((COPY, GPU, CPU, DRIVE)):
            spans = [span for span in row["timeline"] if span["kind"] == kind]
            axes.broken_barh(
                [(span["start_ms"], span["end_ms"] - span["start_ms"]) for span in spans],
                (y - 0.4, 0.8),
                color=f"C{y}",
            )
        axes.set_yticks(range(4), (COPY, GPU, CPU, DRIVE))
        axes.invert_yaxis()
        axes.set_title(f"{row['shape']}, {row['vram']} of the experts on the GPU", fontsize=9)
        axes.set_xlabel("ms from the start of a token")
    save_figure(figure, path)


@contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ram", help="of the process (default: 70 %% of what is free)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args(arguments)
    if given.device == "cpu":
        devices.open_device = devices.HostDevice  # type: ignore[assignment]
    rows = []
    for shape in ("tiny-olmoe", "tiny-qwen3") if given.tiny else ("olmoe", "qwen3"):
        folder = given.folder / shape
        if not (folder / "model.safetensors.index.json").is_file():
            make_checkpoint(folder, shape)
        for vram in VRAM:
            row = {"shape": shape, **run(folder, vram, given.ram, given.tokens)}
            row["overlap"] = overlap(row["timeline"])
            _reset_peak()
            row["accelerate"] = offloaded(
                folder, row["vram_bytes"], max(2, given.tokens // 8), given.device == "cuda"
            )
            rows.append(row)
            print(
                f"{shape}, {vram} on the GPU ({format_bytes(row['vram_bytes'])} in all): "
                f"{row['tokens_per_second']:.2f} tokens/s, accelerate {row['accelerate']['tokens_per_second']:.2f}; "
                f"requests {row['vram_hits_share']:.1%} GPU, {row['ram_hits_share']:.1%} RAM, "
                f"{row['ssd_misses_share']:.1%} drive; "
                f"PCIe {row['pcie_gb_per_s']:.1f} of {row['pcie_ceiling_gb_per_s']:.1f} GB/s, "
                f"drive {row['ssd_gb_per_s']:.2f} of {row['ssd_ceiling_gb_per_s']:.2f} GB/s; "
                f"{row['overlap']:.0%} of the copies' time under computing",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    if given.plot:
        draw(rows, given.plot)
    return rows


if __name__ == "__main__":
    main()
