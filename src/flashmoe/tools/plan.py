"""What a model will do on this machine before it is downloaded or run: the table behind `flashmoe plan`.

The time of a token is what the engine computes (active bytes by the measured rate of products with that type) plus what
it reads (missed experts by the measured rate of direct reads at that size and depth). Reads that prefetching hides are
not taken off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe.cache import sizing
from flashmoe.common import memory
from flashmoe.common.units import format_bytes
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.row_table import MOST_BYTES as TABLE_ROWS_BYTES
from flashmoe.engines.llamacpp.speed import product_rate
from flashmoe.errors import BudgetError
from flashmoe.runtime import budget
from flashmoe.runtime.telemetry import STALL_BOUND
from flashmoe.simulate.curve import HitCurve
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.disk import rate, sample
from flashmoe.storage.reader import ExpertReader

OVERHEAD_BYTES = 190 << 20  # interpreter, libraries, compute buffers of a small micro-batch
LAYER_SECONDS = 1e-4  # of a layer, beside its products with weights: attention, small nodes, the cache
DEPTHS = (1, 4, 32)
ALIGN = 4096  # of direct reads, on most drives
_GOOD = 0.9  # of the best speed within reach is good enough for the smallest budget that has it


@dataclass(frozen=True)
class Row:
    """The prediction for one budget."""

    budget_bytes: int
    context: int
    ubatch: int
    ubatches: tuple[sizing.Ubatch, ...]  # what loading chooses from, the best first
    slots: int
    capacity: float
    hit_rate: float
    read_bytes_per_token: float
    compute_seconds_per_token: float
    read_seconds_per_token: float
    tokens_per_second: float
    bound: str


@dataclass(frozen=True)
class Plan:
    """The predictions for a model. `rows` by ascending budget."""

    model: str
    architecture: str
    quantisation: str  # of most expert bytes
    file_bytes: int
    dense_bytes: int
    total_expert_bytes: int
    experts: int
    layers: int
    top_k: int
    statistics: str  # whose routing the hit rates are of
    compute_bytes_per_second: dict[str, float]  # by type of weights
    drive_bytes_per_second: dict[str, float]  # by depth
    rows: tuple[Row, ...]
    least_budget_bytes: int
    recommendation: str
    ubatch_reason: str  # of the recommended budget, or the largest


@dataclass(frozen=True)
class Machine:
    """Measured: 1e9 bytes per second of products by type, and of reads by depth at one size."""

    compute: dict[str, float]
    drive: dict[int, float]

    def read_rate(self, depth: float) -> float:
        """1e9 bytes per second at any depth: straight between the measured ones, by the logarithm."""
        depths = sorted(self.drive)
        return float(np.interp(np.log(max(depth, 1)), np.log(depths), [self.drive[d] for d in depths]))


def measure(catalog: ExpertCatalog, lib: Library, threads: int, place: Path) -> Machine:
    """Rates for this model: about a second. `place`: the model, or the folder that it would be in. Raises ReadError."""
    active = active_bytes(catalog)
    most = [name for name, n in active.items() if n > 0.02 * sum(active.values())]
    compute = {name: product_rate(lib, name, threads) for name in most}
    size = int(np.median([weight.nbytes for layer in catalog.layers for weight in layer.weights]))
    size = max(ALIGN, size // ALIGN * ALIGN)
    size = min(size, 8 << 20)
    with sample(place, size) as path, closing(ExpertReader([path])) as reader:
        return Machine(compute, {depth: rate(reader, size, depth) for depth in DEPTHS})


def active_bytes(catalog: ExpertCatalog) -> Counter[str]:
    """Bytes of weights that a token is multiplied with, by type."""
    gathered = {table.tensor.name for table in catalog.gathered}
    active: Counter[str] = Counter()
    for name, tensor in catalog.resident.items():
        if name not in gathered and len(tensor.shape) > 1:
            active[tensor.type] += tensor.nbytes
    for layer in catalog.layers:
        for weight in layer.weights:
            active[weight.tensor.type] += weight.nbytes * layer.top_k
    return active


def make_plan(
    catalog: ExpertCatalog,
    machine: Machine,
    curve: HitCurve,
    context_bytes: Callable[[int, int], int],
    rams: Sequence[int] = (),
    n_ctx: int | None = None,
) -> Plan:
    """The plan for budgets `rams` in bytes; without any, for what is least, quarters of the file, and all of it.

    context_bytes: what a context takes, by its tokens and those of a micro-batch (see `ContextSizes`). n_ctx: tokens of
    context; without, what a run that is not told takes.
    """
    gguf = catalog.gguf
    trained = gguf.arch_int("context_length", budget.DEFAULT_CONTEXT)
    budget.check_context(n_ctx, trained)
    wished = n_ctx or trained
    small = n_ctx or min(wished, budget.SMALL_CONTEXT)
    fixed = fixed_bytes(catalog)
    least = budget.plan_pool(catalog, 0, fixed + context_bytes(small, 1), ALIGN).least
    most = n_ctx or min(wished, budget.AGENT_CONTEXT)
    whole = (
        fixed
        + context_bytes(most, min(most, sizing.USUAL_UBATCH))
        + sum(
            size * int(n)
            for size, n in zip(sizing.slot_bytes(catalog, ALIGN), sizing.group_experts(catalog), strict=True)
        )
    )
    shares = [int(share * gguf.size) for share in (0.25, 0.5, 0.75)]
    wanted = sorted({*(rams or [least, *(ram for ram in shares if least < ram < whole), whole])})
    small_bytes = context_bytes(budget.SMALL_CONTEXT, 1)
    rows = []
    for ram in wanted:
        for context in (n_ctx or budget.default_context(wished, small_bytes, ram - fixed), small):
            pool = budget.plan_pool(catalog, ram, fixed + context_bytes(context, 1), ALIGN)
            if pool.slots:
                few, many = (min(context, n) for n in (sizing.UBATCHES[0], sizing.USUAL_UBATCH))
                taken = context_bytes(context, few)
                each = (context_bytes(context, many) - taken) / max(1, many - few)
                found = sizing.ubatches(catalog, context, ram - fixed - taken, max(0.0, each), ALIGN)
                rows.append(_row(catalog, machine, curve, ram, context, found, pool.slots))
                break
    if not rows:
        raise BudgetError(str(budget.too_small(max(wanted), least)))
    best = _recommended(rows, memory.default_ram())
    active = active_bytes(catalog)
    kinds = Counter[str]()
    for layer in catalog.layers:
        for weight in layer.weights:
            kinds[weight.tensor.type] += weight.tensor.nbytes
    return Plan(
        model=gguf.files[0].name,
        architecture=gguf.architecture,
        quantisation=kinds.most_common(1)[0][0],
        file_bytes=gguf.size,
        dense_bytes=catalog.dense_bytes,
        total_expert_bytes=catalog.expert_bytes,
        experts=catalog.n_experts,
        layers=len(catalog.layers),
        top_k=catalog.top_k,
        statistics=f"{curve.model} ({curve.policy}, {curve.tokens} tokens)",
        compute_bytes_per_second={
            name: 1e9 * machine.compute[name] for name in active if name in machine.compute
        },
        drive_bytes_per_second={str(depth): 1e9 * value for depth, value in machine.drive.items()},
        rows=tuple(rows),
        least_budget_bytes=least,
        recommendation=_describe(best) if best else _too_little(memory.default_ram()),
        ubatch_reason=_why(best or rows[-1]),
    )


def fixed_bytes(catalog: ExpertCatalog) -> int:
    """What takes memory beside context and slots."""
    rows = TABLE_ROWS_BYTES * len(catalog.row_tables)
    return catalog.dense_bytes + catalog.table_bytes + rows + OVERHEAD_BYTES


def _row(
    catalog: ExpertCatalog,
    machine: Machine,
    curve: HitCurve,
    ram: int,
    context: int,
    found: list[sizing.Ubatch],
    most: list[int],
) -> Row:
    """found: sizes of micro-batches that there is room for; most: slots of each size group with the smallest."""
    step = found[0].tokens if found else sizing.micro_batch(catalog, most, sizing.USUAL_UBATCH)
    slots = found[0].slots if found else sum(most)
    capacity = min(1.0, slots / catalog.total_experts)
    hit_rate = curve.at(capacity)
    slowest = min(machine.compute.values())
    compute = LAYER_SECONDS * len(catalog.layers) + sum(
        n / machine.compute.get(name, slowest) / 1e9 for name, n in active_bytes(catalog).items()
    )
    per_token = (1 - hit_rate) * sum(layer.top_k * layer.expert_bytes for layer in catalog.layers)
    together = (1 - hit_rate) * sizing.mean_top_k(catalog) * len(catalog.layers[0].weights)
    read = per_token / machine.read_rate(together) / 1e9
    return Row(
        budget_bytes=ram,
        context=context,
        ubatch=min(step, context),
        ubatches=tuple(found),
        slots=slots,
        capacity=capacity,
        hit_rate=hit_rate,
        read_bytes_per_token=per_token,
        compute_seconds_per_token=compute,
        read_seconds_per_token=read,
        tokens_per_second=1 / (compute + read),
        bound="ssd" if read > STALL_BOUND * (compute + read) else "compute",
    )


def _recommended(rows: Sequence[Row], available: int) -> Row | None:
    """The smallest budget that is nearly as good as the best that is available."""
    within = [row for row in rows if row.budget_bytes <= available]
    best = max((row.tokens_per_second for row in within), default=0.0)
    return next((row for row in within if row.tokens_per_second >= _GOOD * best), None)


def _too_little(available: int) -> str:
    return (
        f"none of these budgets leaves this machine usable: {format_bytes(available)} are free to take; "
        "end other programs, or take a smaller quantisation"
    )


def _describe(row: Row) -> str:
    more = "" if row.bound == "compute" else "; more memory or a faster drive would help most"
    return f"--ram {row.budget_bytes >> 20}MiB: about {row.tokens_per_second:.1f} tokens/s, {row.bound}-bound{more}"


def _why(row: Row) -> str:
    """Why the micro-batch has the size that it has, beside the next ones."""
    start = f"-ub auto is {row.ubatch} at --ram {row.budget_bytes >> 20}MiB"
    if not row.ubatches:
        return f"{start}: the pool holds what so many tokens ask a layer for at once, or the context no more"
    if not row.ubatches[0].reads:
        return f"{start}: no prompt reads anything, all experts are resident"
    sizes = sorted(row.ubatches, key=lambda u: u.tokens)
    at = sizes.index(row.ubatches[0])
    said = [
        f"{u.tokens}: {u.prompt_reads_per_token:.2f} + {u.decode_reads_per_token:.2f}"
        for u in sizes[max(0, at - 1) : at + 2]
    ]
    return f"{start}: the fewest experts of a layer read for a prompt's token and a decoded one ({', '.join(said)})"
