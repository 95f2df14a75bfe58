"""The networks of the predictor promoe in torch, all layers and distances side by side, and their training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from flashmoe.common.machine import cores
from flashmoe.learn.train import Plan
from flashmoe.prefetch.base import AHEAD
from flashmoe.routing.trace import RoutingTrace

DECAYS = (0.5, 0.9)
VECTORS = 8192  # of tokens; more tokens share them
# tokens of a segment that are learned from, and those before that only feed the averages
LENGTH, BEFORE = (64, 24)
SEGMENTS = 8  # a batch, at most


class Net(nn.Module):
    """See prefetch.promoe: L layers, E experts, R numbers of the stand-in, H hidden units."""

    def __init__(self, n_layers: int, n_experts: int, r: int = 64, h: int = 96) -> None:
        super().__init__()
        self.r, self.h = r, h
        c, i = len(AHEAD), (1 + len(DECAYS)) * r
        self.token = nn.Parameter(torch.randn(VECTORS, r) * 0.3)
        self.embed = nn.Parameter(torch.randn(n_layers, n_experts, r) * 0.3)
        self.w1 = nn.Parameter(torch.randn(c, n_layers, i, h) * 0.5 * i**-0.5)
        self.b1 = nn.Parameter(torch.zeros(c, n_layers, h))
        self.w2 = nn.Parameter(torch.randn(c, n_layers, h, n_experts) * 0.5 * h**-0.5)
        self.b2 = nn.Parameter(torch.zeros(c, n_layers, n_experts))

    def forward(self, picked: Tensor, token: Tensor, past: Tensor) -> Tensor:
        """Logits [C, L, B, E]. picked [L, N, E] of 0 and 1; token int64 [N] (-1: unknown); past [A, B, N]: what each
        row of the batch takes from the others (averages); the B rows are the last LENGTH of each segment."""
        n_layers, n, _ = picked.shape
        first = self.token[token % VECTORS] * (token >= 0)[:, None]
        stream = torch.cat([first[None], torch.bmm(picked, self.embed)]).cumsum(0)  # [L + 1, N, R]
        averages = past @ stream[-1]  # [A, B, R]
        rows = torch.arange(n).reshape(-1, BEFORE + LENGTH)[:, BEFORE:].reshape(-1)
        here = stream[:, rows]
        context = averages.permute(1, 0, 2).reshape(1, len(rows), -1).expand(n_layers, -1, -1)
        logits = []
        for c, ahead in enumerate(AHEAD):
            at = (
                (torch.arange(n_layers) - ahead + 1).clamp(min=0)
                if c
                else torch.zeros(n_layers, dtype=torch.long)
            )
            x = torch.cat([here[at], context], 2)
            hidden = torch.relu(torch.baddbmm(self.b1[c][:, None], x, self.w1[c]))
            logits.append(torch.baddbmm(self.b2[c][:, None], hidden, self.w2[c]))
        return torch.stack(logits)


class Segments:
    """Pieces of a trace as inputs of the network."""

    def __init__(self, trace: RoutingTrace) -> None:
        self.ids, self.tokens, self.sequence = trace.expert_ids, trace.token_id, trace.sequence_id
        self.n_experts, self.k = trace.num_experts, trace.top_k
        self.begins = np.arange(0, max(1, trace.n_tokens - LENGTH + 1), LENGTH)

    def batch(self, which: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """picked [L, N, E], token [N], past [A, B, N], wanted [L, B, E], seen [L, B] of some segments."""
        rows = (self.begins[which][:, None] + np.arange(-BEFORE, LENGTH)[None]).reshape(-1)
        real = (rows >= 0) & (rows < len(self.ids))
        rows = rows.clip(0, len(self.ids) - 1)
        ids = np.where(real[:, None, None], self.ids[rows], -1).astype(np.int64)
        n, n_layers, _ = ids.shape
        picked = np.zeros((n, n_layers, self.n_experts + 1), np.float32)
        np.put_along_axis(picked, np.where(ids < 0, self.n_experts, ids), 1.0, 2)
        picked = np.ascontiguousarray(picked[..., :-1].transpose(1, 0, 2))
        width = BEFORE + LENGTH
        learned = np.arange(n).reshape(-1, width)[:, BEFORE:].reshape(-1)
        age = learned[:, None] - 1 - np.arange(n)[None]
        inside = (age >= 0) & (learned[:, None] // width == np.arange(n)[None] // width)
        inside &= (self.sequence[rows][learned][:, None] == self.sequence[rows][None]) & real[None]
        past = np.stack([np.where(inside, (1 - d) * d ** age.clip(0), 0.0) for d in DECAYS])
        parts = (
            picked,
            np.where(real, self.tokens[rows], -1).astype(np.int64),
            past.astype(np.float32),
            picked[:, learned],
            (ids[learned, :, 0] >= 0).T.astype(np.float32),
        )
        return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in parts)  # type: ignore[return-value]


def loss_of(net: Net, batch: tuple[Tensor, ...]) -> Tensor:
    """Binary cross-entropy per expert, mean over layers and distances where there is something to predict."""
    picked, token, past, wanted, seen = batch
    logits = net(picked, token, past)
    error = functional.binary_cross_entropy_with_logits(
        logits, wanted.expand_as(logits), reduction="none"
    ).mean(3)
    layers = torch.arange(len(wanted))
    valid = torch.stack([(layers >= ahead).float() for ahead in AHEAD])[:, :, None] * seen
    return (error * valid).sum() / valid.sum().clamp(min=1.0)


def fit(
    trace: RoutingTrace,
    held: RoutingTrace,
    plan: Plan,
    progress: Callable[[str, int, int, float | None], None] | None = None,
) -> tuple[dict[str, NDArray[Any]], dict[str, Any], list[list[float]]]:
    """Train; returns (arrays, constants) as prefetch.promoe reads them and the losses [[training, held out]] of each
    epoch. The learning rate falls to zero by the last step or by the end of the time, what comes first."""
    torch.set_num_threads(plan.threads or cores())
    torch.manual_seed(plan.seed)
    rng = np.random.default_rng(plan.seed)
    net = Net(trace.n_layers, trace.num_experts, **plan.sizes)
    with torch.no_grad():
        net.b2.fill_(float(np.log(trace.top_k / trace.num_experts)))
    data, check = Segments(trace), Segments(held)
    checks = check.batch(np.arange(0, len(check.begins), max(1, len(check.begins) // 8))[:8])
    epochs = plan.epochs or 3
    per_epoch = -(-len(data.begins) // min(SEGMENTS, 1 + len(data.begins) // 100))
    optimiser = torch.optim.Adam(net.parameters(), 4e-3, betas=(0.9, 0.98))
    started, step, history = time.monotonic(), 0, []
    done = 0.0
    for epoch in range(1, epochs + 1):
        losses: list[float] = []
        for which in np.array_split(rng.permutation(len(data.begins)), per_epoch):
            done = max(step / (epochs * per_epoch), (time.monotonic() - started) / (60 * plan.minutes))
            if done >= 1:
                break
            for group in optimiser.param_groups:
                group["lr"] = 4e-3 * min(1.0, (step + 1) / 50) * (1 - done)
            loss = loss_of(net, data.batch(which))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            step += 1
            if progress and step % 10 == 0:
                progress(f"epoch {epoch}/{epochs}", step, epochs * per_epoch, float(np.mean(losses[-50:])))
        with torch.no_grad():
            history.append([round(float(np.mean(losses or [0.0])), 6), round(loss_of(net, checks).item(), 6)])
        if done >= 1:
            break
    arrays = {name: value.detach().numpy().astype(np.float16) for name, value in net.named_parameters()}
    constants = {"R": net.r, "H": net.h, "V": VECTORS, "decays": list(DECAYS), "ahead": list(AHEAD)}
    return arrays, constants, history
