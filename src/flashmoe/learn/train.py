"""Training of the learned eviction policies from routing traces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.policies import flashmoe, flashmoe_plus
from flashmoe.cache.policies.flashmoe import Flashmoe
from flashmoe.cache.policies.flashmoe_plus import FlashmoePlus
from flashmoe.cache.policies.learned import PolicyFile
from flashmoe.common.machine import cores
from flashmoe.common.plotting import new_figure, save_figure
from flashmoe.errors import FlashMoEError, TraceError, UsageError
from flashmoe.learn.plus_shape import DECAYS, Sizes
from flashmoe.learn.samples import SEGMENT, Samples, ahead
from flashmoe.routing.files import split
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.replay import replay

KINDS = ("flashmoe", "flashmoe+")


@dataclass(frozen=True)
class Plan:
    """How to train. None: the default of the kind."""

    epochs: int | None = None  # most epochs: 200 for flashmoe, 5 for flashmoe+
    patience: int = 5  # epochs without a better held-out loss before stopping (flashmoe)
    minutes: float = 10.0  # stop after that time, at the end of an epoch
    held_out: float = 0.05  # share of the sequences, the last ones
    threads: int | None = None  # of torch; None: the cores that this process may use
    seed: int = 0
    sizes: dict[str, Any] = field(default_factory=dict)  # r, h, k, m of flashmoe+


#  Called after some steps with (epoch, epochs, steps done in this epoch, steps, mean loss, held-out loss or
# None).
Progress = Callable[[int, int, int, int, float, float | None], None]


def train(
    trace: RoutingTrace, kind: str = "flashmoe+", plan: Plan | None = None, progress: Progress | None = None
) -> PolicyFile:
    """Train a policy of a kind on a trace; returns what `PolicyFile.save` writes.

    Raises UsageError for an unknown kind or without torch, TraceError for a trace that is too short.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}: train one of {', '.join(KINDS)}")
    plan = plan or Plan()
    try:
        import torch

        from flashmoe.learn import networks
    except ImportError:
        raise UsageError("training needs torch: pip install 'flashmoe-ssd[train]'") from None
    if trace.n_tokens < 4 * SEGMENT:
        raise TraceError(f"{trace.n_tokens} tokens are too few to learn from: record at least {4 * SEGMENT}")
    torch.set_num_threads(plan.threads or cores())
    torch.manual_seed(plan.seed)
    started = time.monotonic()
    part, rest = split(trace, 1 - plan.held_out)
    net: Any
    if kind == "flashmoe":
        net = networks.PaperNet(trace.n_layers, trace.num_experts)
        decays, per_batch, rate = None, 4, 2e-3  # batches of 256 tokens
    else:
        net = networks.PlusNet(trace.n_layers, trace.num_experts, **plan.sizes)
        decays, per_batch, rate = DECAYS, 2, 5e-3
    data, held = Samples(part, decays), Samples(rest, decays)
    history = _fit(net, data, held, kind, plan, per_batch, rate, started, progress)
    constants: dict[str, Any]
    if kind == "flashmoe":
        features, constants = flashmoe.FEATURES, {"hidden": flashmoe.HIDDEN, "distance_limit": net.limit}
    else:
        features, constants = flashmoe_plus.FEATURES, Sizes(net.r, net.h, net.k, net.m).constants
    trained = PolicyFile(
        kind=kind,
        arrays=net.export(),
        n_layers=trace.n_layers,
        n_experts=trace.num_experts,
        top_k=trace.top_k,
        features=features,
        constants=constants,
        model=dict(trace.model),
        trained_on={
            "tokens": part.n_tokens,
            "sequences": part.n_sequences,
            "held_out_tokens": rest.n_tokens,
            "epochs": len(history) - 1,
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    trained.report.update(loss=history, held_out=judge(trained, rest))
    return trained


def _fit(
    net: Any,
    data: Samples,
    held: Samples,
    kind: str,
    plan: Plan,
    per_batch: int,
    rate: float,
    started: float,
    progress: Progress | None,
) -> list[list[float]]:
    """Train in place, leave the best weights; [[training loss, held-out loss] of each epoch], from epoch 0
    on."""
    import torch

    rng = np.random.default_rng(plan.seed)
    paper = kind == "flashmoe"
    epochs = plan.epochs or (200 if paper else 5)
    per_batch = min(per_batch, data.n_segments)
    steps = data.n_segments // per_batch
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01, fused=True)
    schedule = (
        None
        if paper
        else torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * steps, pct_start=0.1)
    )
    stride = max(1, held.n_segments // 40)
    checks = [held.batch([s]) for s in range(0, held.n_segments, stride)]

    def held_out_loss() -> float:
        net.eval()
        with torch.no_grad():
            losses = [net.loss(batch).item() for batch in checks if batch.present.shape[1] > 1]
        net.train()
        return float(np.mean(losses))

    best, best_epoch = held_out_loss(), 0
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    history = [[float("nan"), best]]
    for epoch in range(1, epochs + 1):
        losses: list[float] = []
        order = rng.permutation(data.n_segments)[: steps * per_batch].reshape(steps, per_batch)
        for step, batch in enumerate(ahead(data.batch, order)):
            loss = net.loss(batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if schedule is not None:
                schedule.step()
            losses.append(loss.item())
            if progress and step % 20 == 0:
                progress(epoch, epochs, step, steps, float(np.mean(losses[-50:])), None)
        now = held_out_loss()
        history.append([float(np.mean(losses)), now])
        if progress:
            progress(epoch, epochs, steps, steps, float(np.mean(losses)), now)
        if now < best:
            best, best_epoch = now, epoch
            weights = {name: value.clone() for name, value in net.state_dict().items()}
        minutes = (time.monotonic() - started) / 60
        if epoch - best_epoch >= plan.patience or minutes * (1 + 1 / epoch) > plan.minutes:
            break
    net.load_state_dict(weights)
    if not np.isfinite(best):
        raise TraceError("training did not converge (loss is not a number): use more tokens")
    return [[round(a, 6), round(b, 6)] for a, b in history]


def policy_of(trained: PolicyFile) -> Flashmoe | FlashmoePlus:
    """The policy that a trained file makes."""
    return Flashmoe(trained=trained) if trained.kind == "flashmoe" else FlashmoePlus(trained=trained)


def judge(trained: PolicyFile, trace: RoutingTrace) -> dict[str, dict[str, float]]:
    """Hit rates on a trace (per-layer, one session): {capacity: {policy: rate}}, by the runtime's kernels."""
    from flashmoe.cache.policies import create

    result: dict[str, dict[str, float]] = {}
    total = trace.n_layers * trace.num_experts
    for share in (0.125, 0.25, 0.5):
        policies = [create("lru"), create("lfu-aged"), policy_of(trained), create("belady")]
        try:
            result[f"{100 * share:g}%"] = {
                policy.name: round(replay(trace, policy, round(share * total)).hit_rate, 5)
                for policy in policies
            }
        except FlashMoEError:
            continue  # a token does not fit into so few slots
    return result


def plot(trained: PolicyFile, path: str | Path) -> None:
    """Losses by epoch and held-out hit rates by capacity, to a .png, .svg or .pdf. Needs matplotlib."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    loss: NDArray[np.float64] = np.array(trained.report["loss"])
    left.plot(np.arange(1, len(loss)), loss[1:, 0], marker=".", label="training")
    left.plot(np.arange(1, len(loss)), loss[1:, 1], marker=".", label="held out")
    left.set(title=f"{trained.kind}: loss", xlabel="epoch")
    left.legend()
    rates = trained.report["held_out"]
    for name in next(iter(rates.values()), {}):
        right.plot(list(rates), [row[name] for row in rates.values()], marker="o", label=name)
    right.set(title="held-out sequences", xlabel="capacity", ylabel="hit rate")
    right.grid(alpha=0.3)
    right.legend()
    save_figure(figure, path)
