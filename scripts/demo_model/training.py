"""The training loop: two single-threaded workers that share the weights, on a schedule of elapsed time.

One process with two threads meets a barrier in every small operation and crawls as soon as anything else wants a
core. Here each worker computes the gradients of its own half of the batch, and then updates its own half of the
parameters in shared memory: two waits per step.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from dataset import MIXTURE, Corpus, Sampler
from model import Model, Shape
from optim import optimizers
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """How to train."""

    minutes: float
    workers: int = 2
    tokens_per_worker: int = 2048
    early_length: int = 256
    late_length: int = 512
    muon_lr: float = 0.015
    adam_lr: float = 0.003
    decay_from: float = 0.52
    balance: float = 0.01
    z: float = 0.001
    checkpoint_seconds: float = 300.0
    seed: int = 7


def rate(progress: float, plan: Plan) -> float:
    """The factor on the learning rates: short warm-up, constant, linear to nearly zero; by elapsed time."""
    if progress < 0.015:
        return 0.1 + 0.9 * progress / 0.015
    if progress < plan.decay_from:
        return 1.0
    return max(0.02, (1 - progress) / (1 - plan.decay_from))


def train(corpus: Corpus, shape: Shape, plan: Plan, work: Path) -> Path:
    """Train (or go on from the last checkpoint) and return the final checkpoint's path."""
    torch.manual_seed(plan.seed)
    model = Model(shape)
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint)["model"])
    model.share_memory()
    size = sum(param.numel() for param in model.parameters())
    gradients = [torch.zeros(size).share_memory_() for _ in range(plan.workers)]
    context = mp.get_context("fork")
    barrier = context.Barrier(plan.workers)
    others = [
        context.Process(target=_work, args=(rank, model, gradients, barrier, corpus, plan, work), daemon=True)
        for rank in range(1, plan.workers)
    ]
    for process in others:
        process.start()
    _work(0, model, gradients, barrier, corpus, plan, work)
    for process in others:
        process.join()
    return checkpoint


def keep_memory() -> None:
    """Tell malloc to keep freed blocks: fresh pages for every activation cost a fifth of the time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 * 1024 * 1024)  # M_MMAP_THRESHOLD, the largest that is allowed
        libc.mallopt(-2, 64 * 1024 * 1024)  # M_TOP_PAD


def _views(flat: Tensor, model: Model) -> list[Tensor]:
    """One view of a flat gradient buffer per parameter."""
    views, at = [], 0
    for param in model.parameters():
        views.append(flat[at : at + param.numel()].view_as(param))
        at += param.numel()
    return views


def _owners(model: Model, workers: int) -> list[int]:
    """Which worker updates which parameter: the largest go round in turn."""
    load = [0] * workers
    owners = [0] * len(list(model.parameters()))
    for index, param in sorted(enumerate(model.parameters()), key=lambda item: -item[1].numel()):
        owners[index] = load.index(min(load))
        load[owners[index]] += param.numel()
    return owners


def _work(
    rank: int, model: Model, gradients: list[Tensor], barrier, corpus: Corpus, plan: Plan, work: Path
) -> None:
    """One worker."""
    torch.set_num_threads(1)
    keep_memory()
    params = list(model.parameters())
    for param, view in zip(params, _views(gradients[rank], model), strict=True):
        param.grad = view
    owners = _owners(model, plan.workers)
    mine = {id(param) for param, owner in zip(params, owners, strict=True) if owner == rank}
    opts = optimizers(model, plan.muon_lr, plan.adam_lr, mine)
    sampler = Sampler(corpus.train, rank, plan.workers, plan.seed + int(time.time()))
    elapsed, step, tokens = _resume(work, rank, opts)
    own_views = [_views(flat, model) for flat in gradients]
    log = Log(work / "log.jsonl") if rank == 0 else None
    last, saved = time.monotonic(), elapsed
    # Worker 0's clock decides; the others read it from shared memory behind the barrier.
    clock = _clock(work, rank, plan, elapsed, barrier)
    while True:
        barrier.wait()
        if rank == 0:
            elapsed += time.monotonic() - last
            last = time.monotonic()
            clock[0] = elapsed
        barrier.wait()
        progress = float(clock[0]) / (plan.minutes * 60)
        if progress >= 1:
            break
        late = progress >= plan.decay_from
        length = plan.late_length if late else plan.early_length
        ids = torch.from_numpy(sampler.batch(plan.tokens_per_worker // length, length, float(late)))
        gradients[rank].zero_()
        ce, balance, z = model.losses(ids[:, :-1], ids[:, 1:])
        (ce + plan.balance * balance + plan.z * z).backward()
        barrier.wait()
        factor = rate(progress, plan)
        with torch.no_grad():
            for index, owner in enumerate(owners):
                if owner == rank:
                    params[index].grad = sum(views[index] for views in own_views) / plan.workers
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor
            optimizer.step()
        for param, view in zip(params, own_views[rank], strict=True):
            param.grad = view
        step += 1
        tokens += plan.tokens_per_worker * plan.workers
        if log:
            log.step(step, tokens, elapsed, factor, ce.item(), balance.item(), z.item())
        if float(clock[0]) - saved > plan.checkpoint_seconds:
            saved = float(clock[0])
            barrier.wait()
            _save(work, rank, model, opts, saved, step, tokens)
            if log:
                log.validation(step, tokens, elapsed, validate(model, corpus, windows=20))
    _save(work, rank, model, opts, float(clock[0]), step, tokens)
    if log:
        log.validation(step, tokens, elapsed, validate(model, corpus, windows=20))


def _clock(work: Path, rank: int, plan: Plan, elapsed: float, barrier) -> np.ndarray:
    """A number in a small mapped file that worker 0 writes and all read."""
    path = work / "clock"
    if rank == 0:
        np.array([elapsed]).tofile(path)
    barrier.wait()
    return np.memmap(path, dtype=np.float64, mode="r+", shape=(1,))


def _resume(work: Path, rank: int, opts: list[torch.optim.Optimizer]) -> tuple[float, int, int]:
    """Elapsed seconds, steps and tokens of the checkpoint, its optimizer states loaded; zeros without one."""
    path = work / f"worker-{rank}.pt"
    if not path.exists() or not (work / "checkpoint.pt").exists():
        return 0.0, 0, 0
    state = torch.load(path)
    for optimizer, saved in zip(opts, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["elapsed"], state["step"], state["tokens"]


def _save(work: Path, rank: int, model: Model, opts: list, elapsed: float, step: int, tokens: int) -> None:
    """Write this worker's optimizer state, and by worker 0 the model; each file replaced in one move."""
    state = {"optimizers": [optimizer.state_dict() for optimizer in opts], "elapsed": elapsed, "step": step}
    _replace(state | {"tokens": tokens}, work / f"worker-{rank}.pt")
    if rank == 0:
        content = {"model": {name: value.clone() for name, value in model.state_dict().items()}}
        content |= {"shape": asdict(model.shape), "step": step, "tokens": tokens, "elapsed": elapsed}
        _replace(content, work / "checkpoint.pt")


def _replace(content: dict, path: Path) -> None:
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


@torch.no_grad()
def validate(model: Model, corpus: Corpus, windows: int, length: int = 512) -> dict[str, float]:
    """Mean loss per token on held-out windows: per source, and weighted by the early mixture."""
    losses = {}
    for name, stream in corpus.validation.items():
        count = max(1, round(windows * MIXTURE[name][0]))
        starts = np.linspace(0, max(0, len(stream) - length - 2), count).astype(int)
        ids = np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64)
        batch = torch.from_numpy(ids)
        losses[name] = model.losses(batch[:, :-1], batch[:, 1:])[0].item()
    weights = {name: MIXTURE[name][0] for name in losses}
    losses["mixture"] = sum(losses[name] * weights[name] for name in weights) / sum(weights.values())
    return losses


class Log:
    """Losses to the terminal and, one JSON object a line, to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recent: list[float] = []

    def step(
        self, step: int, tokens: int, elapsed: float, factor: float, ce: float, balance: float, z: float
    ) -> None:
        self.recent = (self.recent + [ce])[-25:]
        if step % 25 == 0:
            self._write(
                {
                    "step": step,
                    "tokens": tokens,
                    "seconds": round(elapsed, 1),
                    "rate": round(factor, 3),
                    "loss": round(float(np.mean(self.recent)), 4),
                    "balance": round(balance, 3),
                    "z": round(z, 3),
                }
            )

    def validation(self, step: int, tokens: int, elapsed: float, losses: dict[str, float]) -> None:
        rounded = {name: round(loss, 4) for name, loss in losses.items()}
        self._write({"step": step, "tokens": tokens, "seconds": round(elapsed, 1), "validation": rounded})

    def _write(self, record: dict) -> None:
        line = json.dumps(record)
        print(f"[train] {line}", flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")
