"""The networks of the learned policies in torch, all layers side by side, and their export to arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from flashmoe.cache.policies.flashmoe import HIDDEN
from flashmoe.learn.plus_shape import CHANNEL_DECAYS, DECAYS, DROPOUT, HORIZONS
from flashmoe.learn.samples import Batch


def _normal(*shape: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * scale)


class PaperNet(nn.Module):
    """2E -> 64 -> 64 -> E per layer, SiLU, absolute value: predicted distance, scaled to [0, 1]."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor

    def __init__(self, n_layers: int, n_experts: int) -> None:
        super().__init__()
        self.limit = round(0.75 * n_experts)  # K: farther is all the same
        sizes = (2 * n_experts, HIDDEN, HIDDEN, n_experts)
        for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
            bound = a**-0.5
            self.register_parameter(f"w{i}", nn.Parameter((torch.rand(n_layers, a, b) * 2 - 1) * bound))
            self.register_parameter(f"b{i}", nn.Parameter((torch.rand(n_layers, 1, b) * 2 - 1) * bound))

    def forward(self, x: Tensor) -> Tensor:
        """x [L, B, 2E] -> [L, B, E]."""
        h = functional.silu(torch.baddbmm(self.b1, x, self.w1))
        h = functional.silu(torch.baddbmm(self.b2, h, self.w2))
        return torch.baddbmm(self.b3, h, self.w3).abs()

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the scaled distance."""
        target = (batch.distance.clip(1, self.limit) - 1).astype(np.float32) / (self.limit - 1)
        error = (self(torch.from_numpy(batch.inputs)) - torch.from_numpy(target)).square().mean(2)
        return (error * torch.from_numpy(batch.present)).sum() / max(1, batch.present.sum())

    def export(self) -> dict[str, NDArray[np.float32]]:
        """Arrays as policies.flashmoe reads them."""
        arrays = {name: value.detach().numpy() for name, value in self.named_parameters()}
        return {name: value[:, 0] if name[0] == "b" else value for name, value in arrays.items()}


class PlusNet(nn.Module):
    """Context over all layers and a tiny network per expert: see policies.flashmoe_plus."""

    def __init__(
        self,
        n_layers: int,
        n_experts: int,
        decays: Sequence[float] = DECAYS,
        channels: Sequence[int] = CHANNEL_DECAYS,
        r: int = 96,
        h: int = 192,
        k: int = 6,
        m: int = 24,
    ) -> None:
        super().__init__()
        self.n_layers, self.n_experts, self.channels = n_layers, n_experts, tuple(channels)
        self.d, self.r, self.h, self.k, self.m = len(decays), r, h, k, m
        c, i, j = len(channels) + 1, len(decays) + 1 + k, len(HORIZONS)
        self.embed = _normal(n_layers, n_experts, r, scale=0.3)
        self.w1 = _normal(n_layers, c * r, h, scale=(c * r) ** -0.5)
        self.b1 = nn.Parameter(torch.zeros(n_layers, 1, h))
        self.w2 = _normal(n_layers, h, n_experts * k, scale=0.5 * h**-0.5)
        self.b2 = nn.Parameter(torch.zeros(n_layers, 1, n_experts * k))
        self.v1 = _normal(n_layers, i, m, scale=i**-0.5)
        self.c1 = nn.Parameter(torch.zeros(n_layers, 1, m))
        self.v2 = _normal(n_layers, m, j, scale=m**-0.5)
        self.v0 = nn.Parameter(torch.zeros(n_layers, i, j))
        self.c2 = nn.Parameter(torch.full((n_layers, 1, j), -2.0))

    def encode(self, picked: Tensor, averages: Tensor) -> Tensor:
        """Each layer's part of the context: [L, B, E], [L, B, E, D] -> [L, B, C * R]."""
        n_layers, b, e = picked.shape
        x = torch.stack([picked, *(2.0 * averages[..., d] for d in self.channels)], 2)
        return torch.bmm(x.reshape(n_layers, -1, e), self.embed).reshape(n_layers, b, -1)

    def forward(
        self, averages: Tensor, recency: Tensor, picked: Tensor, previous: Tensor, now: Tensor
    ) -> Tensor:
        """Logits [L, J, N, E] for rows `now` [N] of a batch whose rows before them are `previous` [N]."""
        parts = self.encode(picked, averages)
        before, here = parts[:, previous], parts[:, now]
        # layer l knows the current token from layers 0..l, and the token before from the layers ahead
        context = before.sum(0, keepdim=True) + torch.cumsum(here - before, 0)
        hidden = torch.relu(torch.baddbmm(self.b1, context * 0.2, self.w1))
        hidden = functional.dropout(hidden, DROPOUT, self.training)
        n, e = len(now), self.n_experts
        # From here on rows (N * E) come last: matrices of 20 columns and 200,000 rows are slow the other way round.
        for_expert = torch.baddbmm(self.b2, hidden, self.w2).reshape(self.n_layers, n, e, self.k)
        logs = torch.log(averages[:, now] + 1e-3) * 0.3 + 1.0
        x = torch.cat(
            [
                logs.permute(0, 3, 1, 2).reshape(self.n_layers, self.d, n * e),
                recency[:, now].reshape(self.n_layers, 1, n * e),
                for_expert.permute(0, 3, 1, 2).reshape(self.n_layers, self.k, n * e),
            ],
            1,
        )
        y = torch.relu(torch.baddbmm(self.c1.mT, self.v1.mT, x))
        logits = torch.baddbmm(self.c2.mT, torch.cat([self.v2, self.v0], 1).mT, torch.cat([y, x], 1))
        return logits.reshape(self.n_layers, -1, n, e)

    def loss(self, batch: Batch) -> Tensor:
        """Binary cross-entropy of "used within h steps", mean over experts and horizons."""
        now = np.flatnonzero(~batch.first)
        tensors = (torch.from_numpy(x) for x in (batch.inputs, batch.recency, batch.picked))
        logits = self(*tensors, torch.from_numpy(now - 1), torch.from_numpy(now))
        limits = np.array(HORIZONS, np.int64)[:, None, None]
        target = torch.from_numpy((batch.distance[:, None, now] <= limits).astype(np.float32))
        present = batch.present[:, now]
        if present.all():
            return functional.binary_cross_entropy_with_logits(logits, target)
        error = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 3))
        return (error * torch.from_numpy(present)).sum() / max(1, present.sum())

    def export(self) -> dict[str, NDArray[np.float16]]:
        """Arrays as policies.flashmoe_plus reads them; the context's scale goes into w1."""
        arrays = {name: value.detach().numpy().copy() for name, value in self.named_parameters()}
        arrays["w1"] *= np.float32(0.2)
        e, k = self.n_experts, self.k
        arrays["w2"] = arrays["w2"].reshape(self.n_layers, self.h, e, k).transpose(0, 2, 3, 1)
        arrays["b2"] = arrays["b2"].reshape(self.n_layers, e, k)
        for name in ("b1", "c1", "c2"):
            arrays[name] = arrays[name][:, 0]
        return {name: np.ascontiguousarray(value, np.float16) for name, value in arrays.items()}
