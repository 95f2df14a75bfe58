"""Residency: which expert is in which slot, as arrays that the runtime and the simulator share.

A pool has S slots. Slots come in size groups, because quantisation can differ from layer to layer: group g
owns the slot numbers [group_start[g], group_start[g+1]) and the layers with group[l] == g share them. All
state is in numpy arrays, so that the numba kernels of the policies read and write it in place; nothing here
reads bytes or knows files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PER_LAYER = 0
GLOBAL = 1
PARTITIONS = {"per-layer": PER_LAYER, "weighted": PER_LAYER, "global": GLOBAL}


class Residency(NamedTuple):
    """State of a pool: L MoE layers, E experts a layer, S slots, G size groups.

    A slot may be evicted when it is owned and not pinned (pin != step).
    """

    slot_of: NDArray[np.int32]  # [L, E] slot of an expert, -1 where absent
    owner: NDArray[np.int32]  # [S] layer * E + expert, -1 where free
    pin: NDArray[np.int64]  # [S] pinned while equal to step[0]
    place: NDArray[np.int32]  # [S] position of the slot's expert in members[layer]
    members: NDArray[np.int32]  # [L, E] resident experts of a layer in its first used[l] columns, in no order
    step: NDArray[np.int64]  # [1] number of accesses so far, all layers
    accesses: NDArray[np.int64]  # [L] number of accesses so far, each layer
    seen: NDArray[np.int64]  # [E] scratch: step in which an expert was last counted
    quota: NDArray[np.int32]  # [L] share of a layer (per-layer and weighted partition)
    used: NDArray[np.int32]  # [L] slots that a layer owns
    group: NDArray[np.int32]  # [L] size group of a layer
    group_start: NDArray[np.int32]  # [G+1] first slot of each group
    free: NDArray[np.int32]  # [S] free slots, one stack per group, starting at group_start[g]
    free_count: NDArray[np.int32]  # [G] height of each stack
    partition: NDArray[np.int32]  # [1] PER_LAYER or GLOBAL
    window: NDArray[
        np.int32
    ]  # [S] slots that prefill works in, one stack per group, starting at group_start[g]
    window_count: NDArray[np.int32]  # [G] height of each stack
    lent: NDArray[np.int32]  # [L] what a layer's share has lost to the window

    @property
    def n_layers(self) -> int:
        """L, the number of MoE layers."""
        return int(self.slot_of.shape[0])

    @property
    def n_experts(self) -> int:
        """E, the number of experts in a layer."""
        return int(self.slot_of.shape[1])

    @property
    def n_slots(self) -> int:
        """S, the number of slots in the pool."""
        return int(self.owner.shape[0])

    def resident(self, layer: int) -> NDArray[np.int64]:
        """Experts of a layer that own a slot, ascending."""
        return np.flatnonzero(self.slot_of[layer] >= 0)


def equal_quota(total_slots: int, n_layers: int, n_experts: int) -> NDArray[np.int32]:
    """Share `total_slots` equally: int32 [L], summing to min(total_slots, L * E).

    Remainders go to the first layers. Raises ValueError when a layer would get no slot.
    """
    total = min(int(total_slots), n_layers * n_experts)
    if total < n_layers:
        raise ValueError(f"{total} slots cannot be shared by {n_layers} layers: give at least {n_layers}")
    base, rest = divmod(total, n_layers)
    quota = np.full(n_layers, base, np.int32)
    quota[:rest] += 1
    return quota


def make_residency(
    n_layers: int,
    n_experts: int,
    quota: Sequence[int] | NDArray[np.int32],
    group: Sequence[int] | NDArray[np.int32] | None = None,
    partition: str = "per-layer",
    spare: Sequence[int] | None = None,
) -> Residency:
    """An empty pool with S = sum(quota) + sum(spare) slots.

    quota: [L] slots of each layer, 1..E (with partition "global" only the checksums over the groups matter).
    group: [L] size group of each layer, numbered 0..G-1 without gaps; None means one group.
    spare: [G] further slots at the end of each group that no policy knows: see `exchange` (default: none).
    Raises ValueError for shapes, quotas or groups that make no sense.
    """
    if n_layers < 1 or n_experts < 1:
        raise ValueError(f"a pool needs layers and experts, got {n_layers} x {n_experts}")
    if partition not in PARTITIONS:
        raise ValueError(f"unknown partition {partition!r}: use one of {', '.join(PARTITIONS)}")
    shares = np.ascontiguousarray(quota, np.int32)
    groups = np.zeros(n_layers, np.int32) if group is None else np.ascontiguousarray(group, np.int32)
    if shares.shape != (n_layers,) or groups.shape != (n_layers,):
        raise ValueError(f"quota and group must have one entry for each of the {n_layers} layers")
    if shares.min() < 0 or shares.max() > n_experts:
        raise ValueError(f"quotas must lie in 0..{n_experts}, got {shares.min()}..{shares.max()}")
    n_groups = int(groups.max()) + 1
    sizes = np.bincount(groups, weights=shares, minlength=n_groups).astype(np.int32)
    if groups.min() < 0 or (sizes == 0).any():
        raise ValueError(
            "every size group needs at least one slot, and groups are numbered 0..G-1 without gaps"
        )
    start = np.zeros(n_groups + 1, np.int32)
    np.cumsum(sizes + np.asarray(spare or [0] * n_groups, np.int32), out=start[1:])
    n_slots = int(start[-1])
    residency = Residency(
        slot_of=np.full((n_layers, n_experts), -1, np.int32),
        owner=np.full(n_slots, -1, np.int32),
        pin=np.full(n_slots, -1, np.int64),
        place=np.zeros(n_slots, np.int32),
        members=np.zeros((n_layers, n_experts), np.int32),
        step=np.zeros(1, np.int64),
        accesses=np.zeros(n_layers, np.int64),
        seen=np.zeros(n_experts, np.int64),
        quota=shares,
        used=np.zeros(n_layers, np.int32),
        group=groups,
        group_start=start,
        free=np.empty(n_slots, np.int32),
        free_count=np.zeros(n_groups, np.int32),
        partition=np.array([PARTITIONS[partition]], np.int32),
        window=np.full(n_slots, -1, np.int32),
        window_count=np.zeros(n_groups, np.int32),
        lent=np.zeros(n_layers, np.int32),
    )
    for g, size in enumerate(sizes.tolist()):
        set_free(residency, g, range(start[g], start[g] + size))
    return residency


def centre(res: Any, layer: int) -> int:
    """The middle of the slots that would be a layer's if its group's layers had theirs in order.

    Where there is a choice, a layer gets slots near it: what it uses at once then lies close together, and that is what
    a product of the engine's has to walk over.
    """
    group = res.group[layer]
    slot = res.group_start[group] + (res.quota[layer] + res.lent[layer]) // 2
    for other in range(layer):
        if res.group[other] == group:
            slot += res.quota[other] + res.lent[other]
    return slot


def middle(res: Residency, layer: int) -> int:
    """`centre` for Python, which gets at the numbers of lists faster than at those of arrays."""
    lists: Any = {name: getattr(res, name).tolist() for name in ("group", "quota", "lent")}
    return int(centre(res._replace(**lists), layer))


def exchange(res: Residency, layer: int, expert: int, slot: int) -> int:
    """Move a resident expert to a spare slot of its group; returns its old slot, which is spare from now on."""
    old = int(res.slot_of[layer, expert])
    res.slot_of[layer, expert] = slot
    for column in (res.owner, res.pin, res.place):
        column[slot] = column[old]
    res.owner[old] = res.pin[old] = -1
    return old


def renumber(res: Residency, layer: int, experts: NDArray[np.int64], slots: NDArray[np.int32]) -> None:
    """Put all resident `experts` of a layer into other `slots`, which have no other owner."""
    old = res.slot_of[layer, experts]
    place = res.place[old]
    res.owner[old] = res.pin[old] = -1
    res.slot_of[layer, experts] = slots
    res.owner[slots] = layer * res.n_experts + experts
    res.place[slots] = place


def take_free_slot(res: Residency, layer: int) -> int:
    """A free slot of a layer's group, from now on neither free nor owned; there must be one."""
    group = int(res.group[layer])
    stack = res.free[res.group_start[group] :][: res.free_count[group]]
    at = int(np.abs(stack - middle(res, layer)).argmin())
    slot = int(stack[at])
    stack[at] = stack[-1]
    res.free_count[group] -= 1
    return slot


def free_slot(res: Residency, layer: int, slot: int) -> None:
    """Give back what `take_free_slot` gave."""
    group = int(res.group[layer])
    res.free[res.group_start[group] + res.free_count[group]] = slot
    res.free_count[group] += 1


def set_free(res: Residency, group: int, slots: Sequence[int]) -> None:
    """Let exactly `slots` be the free ones of a group; the lowest is taken first."""
    start = int(res.group_start[group])
    res.free[start : start + len(slots)] = sorted(slots, reverse=True)
    res.free_count[group] = len(slots)


def admit(res: Residency, layer: int, expert: int, slot: int) -> None:
    """Let an absent expert have a slot without an owner."""
    used = int(res.used[layer])
    res.slot_of[layer, expert] = slot
    res.owner[slot] = layer * res.n_experts + expert
    res.members[layer, used] = expert
    res.place[slot] = used
    res.used[layer] += 1


def check_residency(res: Residency, spare: Sequence[int] = ()) -> None:
    """Raise AssertionError where the arrays contradict each other (for tests and debugging).

    `spare`: slots that no policy owns; while they are exchanged for those of the window, these among them.
    """
    n_experts = res.n_experts
    for slot, key in enumerate(res.owner):
        if key >= 0:
            layer, expert = divmod(int(key), n_experts)
            assert res.slot_of[layer, expert] == slot, (slot, layer, expert)
            g = res.group[layer]
            assert res.group_start[g] <= slot < res.group_start[g + 1], (slot, layer)
    held = res.slot_of[res.slot_of >= 0]
    assert len(np.unique(held)) == len(held) == (res.owner >= 0).sum()
    assert ((res.slot_of >= 0).sum(axis=1) == res.used).all()
    for layer in range(res.n_layers):
        assert sorted(res.members[layer, : res.used[layer]].tolist()) == res.resident(layer).tolist(), layer
    for g in range(len(res.free_count)):
        stack = res.free[res.group_start[g] : res.group_start[g] + res.free_count[g]]
        unowned = np.flatnonzero(res.owner[res.group_start[g] : res.group_start[g + 1]] < 0)
        window = res.window[res.group_start[g] : res.group_start[g] + res.window_count[g]]
        free = set((unowned + res.group_start[g]).tolist()) - set(spare) - set(window.tolist())
        assert sorted(stack.tolist()) == sorted(free), g
