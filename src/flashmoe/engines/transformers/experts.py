"""The experts function: computes a layer's experts where they lie in the pool, by the library's own code.

`use_experts_implementation` lets a registered function take the place of an experts module's forward. Ours asks the
ExpertCache for the experts that the router picked and runs the module's *own* forward for each, with the pool's slot as
its weights: first those that are resident, the others as they come in. The results are added in the order in which that
forward adds them, ascending by expert, so that they are the same to the last bit.

That holds where the forward adds in the data type that it returns, which all but a few do. What a forward does is
watched when it is first run; one that adds otherwise is run once for all experts, when all are in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from flashmoe.cache.pool import Window
from flashmoe.errors import BudgetError

Int32 = NDArray[np.int32]
IMPLEMENTATION = "flashmoe"
_ADD = torch.ops.aten.index_add_.default


class Residence(Protocol):
    """Where a layer's experts come from."""

    def route(self, layer: int, ids: Int32) -> Int32:
        """The experts to run in place of those that the router picked, [tokens, top_k]; mostly just these."""
        ...

    def ensure(
        self, layer: int, ids: Int32, weights: torch.Tensor | None, each: Callable[[int, int], None]
    ) -> None:
        """Make experts resident; `each` gets every one and its slot as it is complete. Raises BudgetError.

        weights: of the router, [tokens, top_k]; None where this layer's routing has been seen already.
        """
        ...


def register() -> None:
    """Make the function known to the library as `flashmoe`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    pooled: PooledExperts = module.pooled_experts
    return pooled(hidden_states, top_k_index, top_k_weights)


def slot_view(window: Window, slots: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A plane of the pool as a tensor [slots, rows, columns]; valid as long as the pool."""
    nbytes = (slots - 1) * window.stride + window.plane.nbytes
    memory = (ctypes.c_char * nbytes).from_address(window.address)
    rows, columns = shape
    flat = torch.frombuffer(memory, dtype=dtype, count=nbytes // dtype.itemsize)
    return flat.as_strided((slots, rows, columns), (window.stride // dtype.itemsize, columns, 1))


class PooledExperts:
    """One layer's experts: `pool` are its weights by name, [slots, rows, columns] each."""

    def __init__(self, module: Any, layer: int, pool: dict[str, torch.Tensor], residence: Residence) -> None:
        self._module, self._layer, self._pool, self._residence = module, layer, pool, residence
        self._run = type(module).forward.__wrapped__  # the module's own
        self._resident = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim and len(parameter) == module.num_experts
        }
        self._apart: bool | None = None  # whether experts may be run one by one; None until it has been seen

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        picked = index.to(torch.int32).numpy()
        ids = self._residence.route(self._layer, picked)
        if ids is not picked:
            index = torch.from_numpy(ids).to(index.dtype)
        chosen = _Chosen(ids)
        parts: dict[int, torch.Tensor] = {}
        slots: dict[int, int] = {}
        watch = _Additions()

        def each(expert: int, slot: int) -> None:
            slots[expert] = slot
            if self._apart is False:
                return
            tokens, places = chosen.of(expert)
            arguments = hidden[tokens], torch.zeros_like(tokens)[:, None], weights[tokens, places][:, None]
            if self._apart:
                parts[expert] = self._run(self._one(expert, slot), *arguments)
            else:
                with watch:
                    parts[expert] = self._run(self._one(expert, slot), *arguments)

        whole = self._ensure(ids, weights, chosen.experts, each)
        if self._apart is None:
            self._apart = watch.dtypes == {hidden.dtype}
        if not self._apart:
            if not whole:
                raise BudgetError(
                    f"{len(chosen.experts)} experts of one layer do not fit into the pool at once: "
                    "give more memory, or a smaller micro-batch (-ub)"
                )
            return self._run(_Stand(self._module, self._all(slots)), hidden, index, weights)  # type: ignore[no-any-return]
        total = torch.zeros_like(hidden)
        for expert in chosen.experts:
            total.index_add_(0, chosen.of(expert)[0], parts[expert])
        return total

    def _ensure(
        self, ids: Int32, weights: torch.Tensor, experts: list[int], each: Callable[[int, int], None]
    ) -> bool:
        """Run `each` for all experts; at once if they fit into the pool, else some after the others."""
        try:
            self._residence.ensure(self._layer, ids, weights, each)
        except BudgetError:
            if len(experts) == 1:
                raise
        else:
            return True
        for half in _halves(experts):
            self._ensure_list(half, each)
        return False

    def _ensure_list(self, experts: list[int], each: Callable[[int, int], None]) -> None:
        try:
            self._residence.ensure(self._layer, np.array([experts], np.int32), None, each)
        except BudgetError:
            if len(experts) == 1:
                raise
            for half in _halves(experts):
                self._ensure_list(half, each)

    def _one(self, expert: int, slot: int) -> _Stand:
        """The module, as if it had this one expert."""
        weights = {name: pool[slot : slot + 1] for name, pool in self._pool.items()}
        rows = {name: table[expert : expert + 1] for name, table in self._resident.items()}
        return _Stand(self._module, {**weights, **rows, "num_experts": 1})

    def _all(self, slots: dict[int, int]) -> dict[str, Any]:
        return {name: _Renamed(pool, slots) for name, pool in self._pool.items()}


class _Stand:
    """Stands for a module whose forward is run: some attributes are others."""

    def __init__(self, module: Any, others: dict[str, Any]) -> None:
        self._module = module
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Renamed:
    """A weight, indexed by expert, in the pool, which is indexed by slot."""

    def __init__(self, pool: torch.Tensor, slots: dict[int, int]) -> None:
        self._pool, self._slots = pool, slots

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return self._pool[self._slots[int(expert)]]


class _Chosen:
    """What the router picked, expert by expert, in the order in which the library's forwards look it up."""

    def __init__(self, ids: Int32) -> None:
        flat = ids.T.ravel()  # first all tokens' first experts
        order = np.argsort(flat, kind="stable")
        experts, starts = np.unique(flat[order], return_index=True)
        self.experts: list[int] = experts.tolist()
        positions, tokens = np.divmod(order, len(ids))
        ends = [*starts[1:].tolist(), len(order)]
        self._of = {
            expert: (torch.from_numpy(tokens[a:b]), torch.from_numpy(positions[a:b]))
            for expert, a, b in zip(self.experts, starts.tolist(), ends, strict=True)
        }

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that picked an expert, and as which of their top-k."""
        return self._of[expert]


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
