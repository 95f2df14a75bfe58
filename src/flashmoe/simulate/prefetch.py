"""How well predictors of routing guess, over a trace: among all experts, and among those that a cache misses."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.cache.maps import Embed
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.policies.default import create_for
from flashmoe.common.kept import kept
from flashmoe.common.plotting import new_figure, save_figure
from flashmoe.common.text import split_list
from flashmoe.errors import UsageError
from flashmoe.prefetch import create, needs_hidden, of_routing_alone
from flashmoe.prefetch.base import AHEAD, Predictor, PredictorError
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.partition import pool_for
from flashmoe.simulate.told import tell


@dataclass(frozen=True)
class PrefetchRow:
    """What the first `guesses` guesses for a layer were worth, over all tokens and layers that can be judged."""

    predictor: str
    ahead: int  # layers ahead; 0: from the token alone
    guesses: int
    recall: float  # share of the experts picked that were among the guesses
    precision: float  # share of the guesses that were picked
    missing_found: float  # the same share of the experts picked that were not resident, guessing only such
    missing_precision: float  # share of these guesses that were picked
    capacity: float  # share of all experts that have a slot
    policy: str


@kept()
def tally(chance, ids, absent, order, counts):
    """Judge one prediction. chance float32 [E] (destroyed); ids int [k], -1: none; absent uint8 [P, E]: 1 where pool
    p does not hold the expert; order int [M] scratch; counts int64 [P + 1, M + 1, 2] += (picked among the first g
    guesses, guesses), row M: (experts picked, 1). Row 0 of the first axis is for all experts, p + 1 for absent ones."""
    n_experts = chance.shape[0]
    n_pools = absent.shape[0]
    most = order.shape[0]
    picked = np.zeros(n_experts, np.uint8)
    for j in range(ids.shape[0]):
        if ids[j] >= 0:
            picked[ids[j]] = 1
    for p in range(n_pools + 1):
        for e in range(n_experts):
            if picked[e] and (p == 0 or absent[p - 1, e]):
                counts[p, most, 0] += 1
        counts[p, most, 1] += 1
    rank = np.argsort(-chance)
    for p in range(n_pools + 1):
        g = 0
        found = 0
        for i in range(n_experts):
            e = rank[i]
            if p > 0 and absent[p - 1, e] == 0:
                continue
            found += picked[e]
            counts[p, g, 0] += found
            counts[p, g, 1] += g + 1
            g += 1
            if g == most:
                break
        while g < most:  # fewer candidates than guesses
            counts[p, g, 0] += found
            counts[p, g, 1] += n_experts if p == 0 else absent[p - 1].sum()
            g += 1


def parse_predictors(text: str) -> list[str]:
    """Specs of a comma-separated list; "all" stands for every predictor that needs neither a file nor more than
    routing."""
    specs: list[str] = []
    for spec in split_list(text):
        specs += of_routing_alone() if spec == "all" else [spec]
    specs = [spec for spec in dict.fromkeys(specs) if spec != "none"]
    if not specs:
        raise UsageError("no predictor given: use --prefetch all, or names such as table,promoe:FILE")
    for spec in specs:
        if needs_hidden(spec):
            raise UsageError(
                f"predictor {spec!r} needs the hidden state, which no trace has: use flashmoe bench"
            )
    return specs


def judge(
    trace: RoutingTrace,
    predictor: Predictor,
    slots: Sequence[int],
    policy: str = "lfu-aged",
    partition: str = "per-layer",
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Run a predictor along a trace, as the runtime would, and judge it on every step of one token.

    A pool per number of slots is kept by demand alone: what prefetching would change in it is not simulated.
    Returns int64 [A, P + 1, 2k + 1, 2]: see `tally`. Raises PredictorError where the predictor does not fit.
    """
    n_layers, n_experts, k = trace.n_layers, trace.num_experts, trace.top_k
    predictor.bind(n_layers, n_experts, k)
    predictor.check_model(trace.model)
    pools = []
    for size in slots:
        pool = create_for(policy, trace.model, n_layers, n_experts)
        pool.bind(pool_for(trace, size, partition))
        if pool.oracle:
            each = np.tile(np.arange(trace.n_tokens), (len(pool.residency.window_count), 1))
            pool.prepare(trace.expert_ids, each)
        pools.append(pool)
    everyone: list[EvictionPolicy | Predictor] = [predictor, *pools]
    followers = [one for one in everyone if one.needs_ranking]
    most = min(2 * k, n_experts)
    counts = np.zeros((len(AHEAD), len(pools) + 1, most + 1, 2), np.int64)
    chance = np.zeros((len(AHEAD), n_layers, n_experts), np.float32)
    absent = np.ones((len(pools), n_experts), np.uint8)
    order = np.zeros(most, np.int64)
    steps, starts = trace.steps(), trace.starts()
    scratch = [np.zeros(k, np.int32) for _ in range(3)]
    ids32 = trace.expert_ids.astype(np.int32)
    for s, (a, b) in enumerate(zip(steps[:-1].tolist(), steps[1:].tolist(), strict=True)):
        if starts[s]:
            predictor.begin_sequence()
            for pool in pools:
                pool.begin_sequence()
        single = b - a == 1
        for pool in pools:
            pool.begin_step(trace.token_id[a:b].tolist())
        if single:
            predictor.begin_step(int(trace.token_id[a]))
            for target in range(n_layers):
                predictor.predict(-1, target, chance[0, target])
        for layer in range(n_layers):
            ids = ids32[a:b, layer]
            seen = ids[:, 0] >= 0
            if single and seen[0]:
                for p, pool in enumerate(pools):
                    np.less(pool.residency.slot_of[layer], 0, out=absent[p], casting="unsafe")
                for c, ahead in enumerate(AHEAD):
                    if layer >= ahead:
                        tally(chance[c, layer], ids[0], absent, order, counts[c])
            if single:
                for follower in followers:
                    tell(trace, a, layer, follower)
            for pool in pools:
                if pool.access_each(layer, ids, *scratch) < 0:
                    raise UsageError(f"a token of layer {layer} does not fit: raise the capacity")
            if single and seen[0]:
                predictor.observe(layer, ids[0])
            elif not single and seen.any():
                predictor.observe_many(layer, ids[seen], trace.token_id[a:b])
            if single:
                for c, ahead in enumerate(AHEAD):
                    if ahead and layer + ahead < n_layers:
                        predictor.predict(layer, layer + ahead, chance[c, layer + ahead])
        if progress and s % 100 == 0:
            progress(b)
    return counts


def simulate_prefetch(
    trace: RoutingTrace,
    predictors: Sequence[str],
    slots: Sequence[int],
    policy: str = "lfu-aged",
    partition: str = "per-layer",
    progress: Callable[[str, int], None] | None = None,
    embed: Embed | None = None,
) -> list[PrefetchRow]:
    """Judge predictors (specs NAME or NAME:FILE) with 1, 2, 4, k and 2k guesses, one row for each with each
    distance and capacity. embed: the model's embeddings, for those that follow them.

    Raises UsageError, PredictorError, PolicyError.
    """
    rows = []
    total = trace.n_layers * trace.num_experts
    for spec in predictors:
        predictor = create(spec)
        if predictor is None:
            continue
        if embed is not None:
            predictor.use_embeddings(embed)
        show = (lambda done, spec=spec: progress(spec, done)) if progress else None
        try:
            counts = judge(trace, predictor, slots, policy, partition, show)
        except PredictorError as error:
            raise PredictorError(f"{spec}: {error}") from None
        most = counts.shape[2] - 1
        for c, ahead in enumerate(AHEAD):
            for p, size in enumerate(slots, 1):
                for g in sorted({1, 2, 4, trace.top_k, 2 * trace.top_k}):
                    if g > most or ahead >= trace.n_layers:
                        continue
                    every, missing = counts[c, 0], counts[c, p]
                    rows.append(
                        PrefetchRow(
                            predictor=spec,
                            ahead=ahead,
                            guesses=g,
                            recall=_share(every[g - 1, 0], every[most, 0]),
                            precision=_share(every[g - 1, 0], every[g - 1, 1]),
                            missing_found=_share(missing[g - 1, 0], missing[most, 0]),
                            missing_precision=_share(missing[g - 1, 0], missing[g - 1, 1]),
                            capacity=size / total,
                            policy=policy,
                        )
                    )
    return rows


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else 0.0


def label(spec: str) -> str:
    """NAME, or NAME:FILE without folder and suffix."""
    kind, _, file = spec.partition(":")
    return f"{kind}:{Path(file).stem}" if file else kind


def plot(rows: Sequence[PrefetchRow], path: str | Path, title: str = "") -> None:
    """Precision of guesses among absent experts against the share of the misses found, a panel per distance, at the
    first capacity; to a .png, .svg or .pdf. Needs matplotlib."""
    distances = list(dict.fromkeys(row.ahead for row in rows))
    capacity = rows[0].capacity
    figure = new_figure(3.4 * len(distances), 3.6)
    panels = figure.subplots(1, len(distances), sharey=True, squeeze=False)
    for axes, ahead in zip(panels[0], distances, strict=True):
        for name in dict.fromkeys(row.predictor for row in rows):
            points = [
                (100 * r.missing_found, 100 * r.missing_precision)
                for r in rows
                if (r.predictor, r.ahead, r.capacity) == (name, ahead, capacity)
            ]
            axes.plot(*zip(*points, strict=True), label=label(name), marker="o", ms=3)
        known = "token alone" if ahead == 0 else f"{ahead} ahead"
        axes.set(xlabel="misses found, %", title=known)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("guesses that were right, %")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"{title}: experts absent at {100 * capacity:.4g} % under {rows[0].policy}")
    save_figure(figure, path)
