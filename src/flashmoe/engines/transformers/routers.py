"""Finds the routers of a model, so that they can be applied ahead of time (see prefetch.gate)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashmoe.prefetch.gate import Router

_NORM = "post_attention_layernorm"  # before the router, in nearly all architectures


def find_routers(model: Any, experts: tuple[str, ...]) -> list[Router]:
    """The routers beside the experts modules named `experts`; none where one is not found.

    A router is known by its shape: the weight [experts, n] in the module that holds the experts. The weights are the
    model's own memory, where that is the processor's; what is small is copied.
    """
    found = [_find(model, name) for name in experts]
    return [] if None in found else [router for router in found if router is not None]


def find_matrices(model: Any, experts: tuple[str, ...]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The routers' weights [experts, n], and their biases where they have one; none where one is not found, or where
    something else decides the choice."""
    found = []
    for name in experts:
        matrix, added = _tensors(model, name)
        if matrix is None or added.keys() - {"bias"}:
            return []
        found.append((matrix.detach(), added["bias"].detach() if added else None))
    return found


def _tensors(model: Any, name: str) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """The router's matrix beside an experts module, if there is one, and what has a number for each expert, by name."""
    block_name, _, own = name.rpartition(".")
    block, count = model.get_submodule(block_name), model.get_submodule(name).num_experts
    tensors = {
        key: tensor
        for key, tensor in [*block.named_parameters(), *block.named_buffers()]
        if not key.startswith(f"{own}.") and tensor.ndim in (1, 2) and len(tensor) == count
    }
    matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    added = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if tensor.ndim == 1}
    return matrices[0] if len(matrices) == 1 else None, added


def _find(model: Any, name: str) -> Router | None:
    matrix, added = _tensors(model, name)
    if matrix is None:
        return None
    block_name = name.rpartition(".")[0]
    n, count = matrix.shape[1], len(matrix)
    layer = model.get_submodule(block_name.rpartition(".")[0])
    norm = getattr(getattr(layer, _NORM, None), "weight", None)
    return Router(
        _bits(matrix),
        np.ones(n, np.float32) if norm is None or norm.shape != (n,) else _floats(norm),
        _floats(added["bias"]) if "bias" in added else np.zeros(count, np.float32),
        _floats(added["e_score_correction_bias"])
        if "e_score_correction_bias" in added
        else np.zeros(0, np.float32),
    )


def _bits(matrix: torch.Tensor) -> NDArray[Any]:
    """In its own type, as a Router has it; in float32 where that is another."""
    matrix = matrix.detach().to("cpu").contiguous()
    if matrix.dtype in (torch.bfloat16, torch.float16):
        bits: NDArray[Any] = matrix.view(torch.int16).numpy()
        return bits.view(np.uint16) if matrix.dtype == torch.bfloat16 else bits
    return matrix.to(torch.float32).numpy()


def _floats(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy().copy()
