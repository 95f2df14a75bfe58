"""Muon for the matrices (one orthogonal step per expert), AdamW for everything else."""

from __future__ import annotations

import torch
from model import Model
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised by Newton-Schulz; 3-d parameters are stacks of matrices."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                buffer = state["momentum"]
                buffer.lerp_(param.grad, 1 - group["momentum"])
                update = orthogonal(param.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, param.shape[-2] / param.shape[-1]) ** 0.5
                param.mul_(1 - group["lr"] * group["decay"])
                param.add_(update.to(param.dtype), alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest half-orthogonal matrix, roughly (quintic Newton-Schulz in bf16)."""
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    x = x.contiguous()
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.mT if tall else x


def optimizers(model: Model, muon_lr: float, adam_lr: float, mine: set[int]) -> list[torch.optim.Optimizer]:
    """The two optimizers for the parameters whose id is in `mine`."""
    matrices, small, embedding = [], [], []
    for name, param in model.named_parameters():
        if id(param) not in mine:
            continue
        if name == "embedding":
            embedding.append(param)
        elif param.ndim >= 2 and name != "output" and not name.endswith("router"):
            matrices.append(param)
        else:
            small.append(param)
    groups = [{"params": embedding, "lr": adam_lr * 3}, {"params": small, "lr": adam_lr}]
    adam = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=0.0,
        fused=True,
    )
    both = [Muon(matrices, muon_lr, decay=0.02), adam]
    for optimizer in both:
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return both
