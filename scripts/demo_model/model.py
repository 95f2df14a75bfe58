"""The OLMoE architecture in PyTorch, as llama.cpp's `olmoe` graph computes it, shaped for quick CPU training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    vocabulary: int = 4096
    width: int = 256
    layers: int = 8
    heads: int = 4
    experts: int = 32
    picked: int = 4
    expert_width: int = 128
    context: int = 512
    rope_base: float = 10000.0
    epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Grouped(torch.autograd.Function):
    """y[s:t] = x[s:t] @ w[e].T for consecutive row groups, one per expert; dense products, no padding."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.ends = ends
        y = x.new_empty(x.shape[0], w.shape[1])
        start = 0
        for expert, end in enumerate(ends):
            if end > start:
                torch.mm(x[start:end], w[expert].t(), out=y[start:end])
            start = end
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, w = ctx.saved_tensors
        dx = torch.empty_like(x)
        dw = torch.empty_like(w)
        start = 0
        dy = dy.contiguous()
        for expert, end in enumerate(ctx.ends):
            if end > start:
                torch.mm(dy[start:end], w[expert], out=dx[start:end])
                torch.mm(dy[start:end].t(), x[start:end], out=dw[expert])
            else:
                dw[expert].zero_()
            start = end
        return dx, dw, None


class Dispatch(torch.autograd.Function):
    """Rows of x in the experts' order; the way back is a gather and a sum, never a scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, inverse: Tensor, picked: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.picked = picked
        return x[rows]

    @staticmethod
    def backward(ctx, dy: Tensor):
        (inverse,) = ctx.saved_tensors
        dx = dy[inverse].view(-1, ctx.picked, dy.shape[-1]).float().sum(1)
        return dx.to(dy.dtype), None, None, None


class Combine(torch.autograd.Function):
    """The experts' rows back in the tokens' order, summed over each token's picks (f32)."""

    @staticmethod
    def forward(ctx, y: Tensor, rows: Tensor, inverse: Tensor, picked: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.kind = y.dtype
        places = inverse.view(-1, picked)
        total = y[places[:, 0]].float()
        for pick in range(1, picked):
            total += y[places[:, pick]]
        return total

    @staticmethod
    def backward(ctx, dy: Tensor):
        (rows,) = ctx.saved_tensors
        return dy.to(ctx.kind)[rows], None, None, None


class CausalAttention(torch.autograd.Function):
    """Plain attention on [heads, length, width] with the probabilities kept; on CPU faster than the fused kernel."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.baddbmm(mask, q, k.mT, alpha=q.shape[-1] ** -0.5)
        weights = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, weights = ctx.saved_tensors
        dv = weights.mT @ dy
        ds = torch._softmax_backward_data(dy @ v.mT, weights, -1, weights.dtype) * q.shape[-1] ** -0.5
        return ds @ k, ds.mT @ q, dv, None


class Norm(nn.Module):
    """RMS normalisation with a learnt scale; statistics in f32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.epsilon)


class Attention(nn.Module):
    """Causal attention; queries and keys are normalised over the whole projection, then rotated (NEOX halves)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Parameter(torch.randn(shape.width, shape.width) * shape.width**-0.5))
        nn.init.zeros_(self.o)
        self.q_norm = Norm(shape.width, shape.epsilon)
        self.k_norm = Norm(shape.width, shape.epsilon)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        kind = x.dtype
        heads = (batch, length, self.shape.heads, self.shape.head_width)
        q, k, v = F.linear(x, torch.cat([self.q, self.k, self.v]).to(kind)).split(width, dim=-1)
        q = rotate(self.q_norm(q).view(heads), cos, sin).to(kind).transpose(1, 2)
        k = rotate(self.k_norm(k).view(heads), cos, sin).to(kind).transpose(1, 2)
        v = v.reshape(heads).transpose(1, 2)
        flat = (batch * self.shape.heads, length, self.shape.head_width)
        mask = torch.full((length, length), float("-inf"), dtype=kind).triu(1)
        y = CausalAttention.apply(q.reshape(flat), k.reshape(flat), v.reshape(flat), mask)
        y = y.view(batch, self.shape.heads, length, self.shape.head_width)
        return F.linear(y.transpose(1, 2).reshape(batch, length, width), self.o.to(kind))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the two halves of each head."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Experts(nn.Module):
    """The routed feed-forward layer: softmax over all experts, the best few weighted by it, not renormalised."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        e, f, d = shape.experts, shape.expert_width, shape.width
        self.router = nn.Parameter(torch.randn(e, d) * 0.02)
        self.gate = nn.Parameter(torch.randn(e, f, d) * d**-0.5)
        self.up = nn.Parameter(torch.randn(e, f, d) * d**-0.5)
        self.down = nn.Parameter(torch.zeros(e, d, f))

    def forward(self, x: Tensor, exact: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: [tokens, width] for the products, exact: the same in f32 for the router.

        Returns the output, the load-balancing loss, the router's z-loss and the picked ids.
        """
        shape = self.shape
        logits = F.linear(exact, self.router)
        probabilities = logits.softmax(dim=-1)
        weights, picked = probabilities.topk(shape.picked, dim=-1)
        order = picked.reshape(-1).argsort(stable=True)
        counts = torch.bincount(picked.reshape(-1), minlength=shape.experts)
        ends = counts.cumsum(0).tolist()
        rows = order // shape.picked
        kind = x.dtype
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        sorted_x = Dispatch.apply(x, rows, inverse, shape.picked)
        inner = Grouped.apply(sorted_x, torch.cat([self.gate, self.up], dim=1).to(kind), ends)
        gate, up = inner.chunk(2, dim=-1)
        hidden = F.silu(gate) * up * weights.reshape(-1)[order].to(kind).unsqueeze(1)
        y = Grouped.apply(hidden, self.down.to(kind), ends)
        y = Combine.apply(y, rows, inverse, shape.picked)
        share = counts.float() / counts.sum()
        balance = shape.experts * (share * probabilities.mean(0)).sum()
        return y, balance, logits.logsumexp(-1).square().mean(), picked


class Model(nn.Module):
    """The language model; embeddings and output matrix are separate."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.kind = torch.bfloat16
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, shape.width) * 0.5)
        self.output = nn.Parameter(torch.zeros(shape.vocabulary, shape.width))
        self.attention_norms = nn.ModuleList(Norm(shape.width, shape.epsilon) for _ in range(shape.layers))
        self.attentions = nn.ModuleList(Attention(shape) for _ in range(shape.layers))
        self.expert_norms = nn.ModuleList(Norm(shape.width, shape.epsilon) for _ in range(shape.layers))
        self.experts = nn.ModuleList(Experts(shape) for _ in range(shape.layers))
        self.final_norm = Norm(shape.width, shape.epsilon)
        positions = torch.arange(shape.context).float()
        rates = shape.rope_base ** (-torch.arange(0, shape.head_width, 2).float() / shape.head_width)
        angles = torch.outer(positions, rates)[None, :, None, :]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The final hidden states, the two router losses (means over layers), and the picks of every layer."""
        batch, length = ids.shape
        cos, sin = self.cos[:, :length], self.sin[:, :length]
        x = F.embedding(ids, self.embedding)
        balances, zs, picks = [], [], []
        for layer in range(self.shape.layers):
            x = x + self.attentions[layer](self.attention_norms[layer](x).to(self.kind), cos, sin).float()
            exact = self.expert_norms[layer](x).view(-1, self.shape.width)
            y, balance, z, picked = self.experts[layer](exact.to(self.kind), exact)
            x = x + y.view(batch, length, -1)
            balances.append(balance)
            zs.append(z)
            picks.append(picked)
        return self.final_norm(x), torch.stack(balances).mean(), torch.stack(zs).mean(), picks

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.kind), self.output.to(self.kind))

    def losses(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, load balancing and z-loss of a batch."""
        hidden, balance, z, _ = self.hidden(ids)
        flat, wanted = hidden.view(-1, self.shape.width), targets.reshape(-1)
        total = flat.new_zeros(())
        for rows, labels in zip(flat.split(2048), wanted.split(2048), strict=True):
            total = total + F.cross_entropy(self.logits(rows).float(), labels, reduction="sum")
        return total / wanted.numel(), balance, z

    def parameters_active(self) -> int:
        """Parameters that one token uses, embeddings counted once."""
        total = sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for layer in self.experts for p in (layer.gate, layer.up, layer.down))
        return total - experts + experts * self.shape.picked // self.shape.experts - self.embedding.numel()
