"""The experts function: computes a layer's experts where they lie in the pool, by the library's own code.

`use_experts_implementation` lets a registered function take the place of an experts module's forward. Ours asks for
the experts that the router picked and runs the module's *own* forward for each, with a slot as its weights: first those
that are resident, the others as they come in. The results are added in the order in which that forward adds them,
ascending by expert, so that they are the same to the last bit.

That holds where the forward adds in the data type that it returns, which all but a few do. What a forward does is
watched when it is first run; one that adds otherwise is run once for all experts, when all are in.

On a GPU the same steps are done without the forward: it asks the device twice for every expert which tokens are its
own, and each time the CPU would wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from flashmoe.engines.transformers.slots import Each, Weights
from flashmoe.errors import BudgetError

Int32 = NDArray[np.int32]
IMPLEMENTATION = "flashmoe"
_ADD = torch.ops.aten.index_add_.default
_CPU = torch.device("cpu")
_FEW = 64  # tokens; for more at once the CPU is never faster than a copy


class Residence(Protocol):
    """Where a layer's experts come from."""

    @property
    def computes(self) -> bool:
        """Whether weights may come in RAM to a model that computes elsewhere."""

    def route(
        self, layer: int, ids: Int32, hidden: torch.Tensor, weights: torch.Tensor
    ) -> tuple[Int32, torch.Tensor]:
        """The experts to run in place of those that the router picked, [tokens, top_k], and their weights; mostly just
        these. hidden: the router's input, [tokens, n]."""

    def ensure(
        self, layer: int, ids: Int32, weights: torch.Tensor | None, each: Each, *, anywhere: bool
    ) -> None:
        """Make experts resident; `each` gets every one and its weights as they are complete. Raises BudgetError.

        weights: of the router, [tokens, top_k]; None where this layer's routing has been seen already. anywhere: the
        experts' weights may be in RAM where `computes`, else they are where the model computes.
        """


def register() -> None:
    """Make the function known to the library as `flashmoe`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    pooled: PooledExperts = module.pooled_experts
    return pooled(hidden_states, top_k_index, top_k_weights)


class PooledExperts:
    """One layer's experts, whose weights come from `residence`."""

    def __init__(self, module: Any, layer: int, residence: Residence, *, exact: bool) -> None:
        """exact: compute with the library's own forward, else by `compute_one`."""
        self._module, self._layer, self._residence, self._exact = module, layer, residence, exact
        self._whole = type(module).forward.__wrapped__  # the module's own
        self._tables = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim and len(parameter) == module.num_experts
        }
        self._tables_on: dict[torch.device, dict[str, torch.Tensor]] = {}
        # whether experts may be run one by one; None until it has been seen
        self._apart: bool | None = None if exact else True

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        picked = index.to(_CPU, torch.int32).numpy()
        ids, weights = self._residence.route(self._layer, picked, hidden, weights)
        if ids is not picked:
            index = torch.from_numpy(ids).to(index)
        chosen = _Chosen(ids)
        # a norm among the weights is where the module is
        anywhere = self._apart is True and len(ids) <= _FEW and not _has_norm(self._module)
        inputs = {hidden.device: (hidden, weights)}
        if anywhere and self._residence.computes and hidden.device != _CPU:
            # now: later it would have to wait for what is queued on the device
            inputs[_CPU] = hidden.to(_CPU), weights.to(_CPU)
        parts: dict[int, torch.Tensor] = {}
        slots: dict[int, Weights] = {}
        watch = _Additions()

        def each(expert: int, slot: Weights) -> None:
            slots[expert] = slot
            if self._apart is False:
                return
            device = next(iter(slot.values())).device
            tokens, places = chosen.of(expert, device)
            states, scores = inputs[device]
            arguments = states[tokens], scores[tokens, places][:, None]
            if self._apart:
                parts[expert] = self.compute(expert, slot, *arguments).to(hidden.device)
            else:
                with watch:
                    parts[expert] = self.compute(expert, slot, *arguments)

        whole = self._ensure(ids, weights, chosen.experts, each, anywhere)
        if self._apart is None:
            self._apart = watch.dtypes == {hidden.dtype}
        if not self._apart:
            if not whole:
                raise BudgetError(
                    f"{len(chosen.experts)} experts of one layer do not fit into the pool at once: "
                    "give more memory, or a smaller micro-batch (-ub)"
                )
            names = next(iter(slots.values()))
            pool = {name: _ByExpert({e: slot[name][0] for e, slot in slots.items()}) for name in names}
            return self._whole(_Stand(self._module, pool), hidden, index, weights)  # type: ignore[no-any-return]
        total = torch.zeros_like(hidden)
        for expert in chosen.experts:
            total.index_add_(0, chosen.of(expert, hidden.device)[0], parts[expert])
        return total

    def compute(
        self, expert: int, slot: Weights, hidden: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What one expert adds to each of its tokens: hidden [n, size], the router's weights [n, 1]."""
        device = hidden.device
        if device not in self._tables_on:
            self._tables_on[device] = {name: table.to(device) for name, table in self._tables.items()}
        rows = {name: table[expert : expert + 1] for name, table in self._tables_on[device].items()}
        module = _Stand(self._module, {**slot, **rows, "num_experts": 1})
        if self._exact:
            index = torch.zeros((len(hidden), 1), dtype=torch.long)
            return self._whole(module, hidden, index, weights)  # type: ignore[no-any-return]
        return compute_one(module, hidden, weights)

    def example(self, slot: Weights, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs to `compute` of the right shape, where the weights `slot` are."""
        down = slot["down_proj"]
        size = down.shape[2 if self._module.is_transposed else 1]
        return down.new_zeros((n_tokens, size)), down.new_ones((n_tokens, 1))

    def _ensure(
        self, ids: Int32, weights: torch.Tensor, experts: list[int], each: Each, anywhere: bool
    ) -> bool:
        """Run `each` for all experts; at once if they fit into the pool, else some after the others."""
        try:
            self._residence.ensure(self._layer, ids, weights, each, anywhere=anywhere)
        except BudgetError:
            if len(experts) == 1:
                raise
        else:
            return True
        for half in _halves(experts):
            self._ensure_list(half, each)
        return False

    def _ensure_list(self, experts: list[int], each: Each) -> None:
        try:
            self._residence.ensure(self._layer, np.array([experts], np.int32), None, each, anywhere=False)
        except BudgetError:
            if len(experts) == 1:
                raise
            for half in _halves(experts):
                self._ensure_list(half, each)


def compute_one(module: Any, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What an experts module of one expert adds to its tokens, hidden [n, size], by the interface's flags.

    Follows `batched_mm_experts_forward` in the library's `integrations/moe.py`, with products of matrices.
    """

    def linear(states: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(module, name)[0]
        bias = getattr(module, f"{name}_bias")[0] if module.has_bias else None
        return functional.linear(states, weight.T if module.is_transposed else weight, bias)

    states = linear(hidden, "gate_up_proj" if module.has_gate else "up_proj")
    states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
    states = linear(states, "down_proj")
    if _has_norm(module):
        states = module.post_expert_norm(states)
    return (states * weights).to(hidden.dtype)


def _has_norm(module: Any) -> bool:
    return getattr(module, "has_post_expert_norm", False)  # not in the first versions of the interface


class _Stand:
    """Stands for a module whose forward is run: some attributes are others."""

    def __init__(self, module: Any, others: dict[str, Any]) -> None:
        self._module = module
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _ByExpert:
    """A weight of an experts module, indexed by expert."""

    def __init__(self, slots: dict[int, torch.Tensor]) -> None:
        self._slots = slots

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return self._slots[int(expert)]


class _Chosen:
    """What the router picked, expert by expert, in the order in which the library's forwards look it up."""

    def __init__(self, ids: Int32) -> None:
        flat = ids.T.ravel()  # first all tokens' first experts
        order = np.argsort(flat, kind="stable")
        experts, starts = np.unique(flat[order], return_index=True)
        self.experts: list[int] = experts.tolist()
        positions, tokens = np.divmod(order, len(ids))
        self._host = torch.from_numpy(tokens), torch.from_numpy(positions)
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {_CPU: self._host}
        ends = [*starts[1:].tolist(), len(order)]
        self._range = dict(zip(self.experts, zip(starts.tolist(), ends, strict=True), strict=True))

    def of(self, expert: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that picked an expert, and as which of their top-k."""
        if device not in self._on:
            tokens, positions = self._host
            self._on[device] = tokens.to(device), positions.to(device)
        tokens, positions = self._on[device]
        begin, end = self._range[expert]
        return tokens[begin:end], positions[begin:end]


class _Additions(TorchDispatchMode):
    """Sees in which data types results are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ADD:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _halves(experts: list[int]) -> Iterator[list[int]]:
    middle = (len(experts) + 1) // 2
    yield experts[:middle]
    yield experts[middle:]
