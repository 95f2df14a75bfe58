"""What would make the predictor `gate` find more: a mean shift (DALI), the state before attention, trained heads.

    python scripts/experiments/gate_shift.py TRACE [SECONDS of training a head, default 30]

TRACE is a routing trace of the demo model; its texts are evaluated again under the transformers engine, as
`promoe_hidden.py` does. The first 70 % of the tokens train, the rest judge: the share of a layer's picks that are among
the best 4 and 8 guesses. Known at the layer before, while its experts are read: its router's input u, normalised.

- gate: the next layer's router on u, with the norm's weights exchanged, as `--prefetch gate` does
- mean shift (DALI, arXiv 2602.03495): u plus the mean difference of the two layers' states
- head: two linear functions and a loss on ranks (2511.10676), on u

Known only when that layer's experts have been computed, so that attention alone is left for reads: the state before the
next layer's attention, which the pre-attention head of that paper reads.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from promoe_hidden import unpack
from torch.nn import functional

import flashmoe
from flashmoe.engines.transformers.routers import find_routers
from flashmoe.prefetch.gate_kernels import DOUBT, LATELY
from flashmoe.routing.trace import RoutingTrace
from flashmoe.storage.hub import demo_model

HIDDEN, BATCH, RATE, TRAINED_ON = 64, 512, 3e-3, 0.7


def evaluate(trace: RoutingTrace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Any]]:
    """States before attention and before the router, both normalised, [L, T, n]; the picks [L, T, E]; the routers."""
    with tempfile.TemporaryDirectory() as name:
        unpack(demo_model(), Path(name))
        with flashmoe.load(name, engine="transformers", cache="100%", n_ctx=512, prefetch="none") as model:
            engine: Any = model.engine
            layers = model.model.model.layers
            found: list[list[list[torch.Tensor]]] = [[[], [], []] for _ in layers]
            for kept, layer, experts in zip(found, layers, engine._experts, strict=True):

                def before(_: Any, __: Any, out: torch.Tensor, kept: Any = kept, layer: Any = layer) -> None:
                    kept[0].append(out.detach().flatten(0, 1).float() / layer.input_layernorm.weight.float())

                def route(_: Any, args: Any, kept: Any = kept, layer: Any = layer) -> None:
                    kept[1].append(args[0].detach().float() / layer.post_attention_layernorm.weight.float())
                    kept[2].append(args[1])

                layer.input_layernorm.register_forward_hook(before)
                model.model.get_submodule(experts).register_forward_pre_hook(route)
            routers = find_routers(model.model, engine._experts)
            for sequence in dict.fromkeys(trace.sequence_id.tolist()):
                model.decoder.rewind()
                model.decoder.evaluate(trace.token_id[trace.sequence_id == sequence].tolist(), decode=False)
            copied = [r._replace(weights=r.weights.copy(), norm=r.norm.copy()) for r in routers]
    early, late, picks = (torch.stack([torch.cat(layer[i]) for layer in found]) for i in range(3))
    many_hot = torch.zeros(*picks.shape[:2], trace.num_experts).scatter_(2, picks.long(), 1.0)
    return early.clone(), late.clone(), many_hot, copied


def head(x: torch.Tensor, y: torch.Tensor, rows: int, seconds: float) -> torch.Tensor:
    """Logits [L, T, E] of two linear functions, trained on the first rows by the softmax over the picks' ranks."""
    torch.manual_seed(0)
    w1 = (torch.randn(len(x), x.shape[2], HIDDEN) * x.shape[2] ** -0.5).requires_grad_()
    w2 = (torch.randn(len(x), HIDDEN, y.shape[2]) * HIDDEN**-0.5).requires_grad_()
    b = torch.zeros(len(x), 1, y.shape[2], requires_grad=True)
    optimizer = torch.optim.AdamW([w1, w2, b], RATE, weight_decay=0.05)
    began = time.monotonic()
    while (used := time.monotonic() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(0.02, 1 - used / seconds)
        for batch in torch.randperm(rows).split(BATCH):
            optimizer.zero_grad()
            logits = torch.baddbmm(b, torch.bmm(x[:, batch], w1), w2)
            share = y[:, batch] / y[:, batch].sum(2, keepdim=True)
            (-(share * functional.log_softmax(logits, 2)).sum(2).mean()).backward()
            optimizer.step()
    with torch.no_grad():
        return torch.baddbmm(b, torch.bmm(x, w1), w2)


def recall(logits: torch.Tensor, y: torch.Tensor, guesses: int) -> float:
    """Share of the picks that are among the best guesses."""
    best = logits.topk(guesses, dim=2).indices
    return float(y.gather(2, best).sum() / y.sum())


def main() -> None:
    trace = RoutingTrace.load(sys.argv[1])
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 30.0
    torch.set_num_threads(1)
    early, late, picks, routers = evaluate(trace)
    rows = int(TRAINED_ON * picks.shape[1])
    weights = torch.stack([torch.from_numpy(r.weights.astype(np.float32)) for r in routers])
    norms = torch.stack([torch.from_numpy(r.norm) for r in routers])[:, None]

    def route(states: torch.Tensor) -> torch.Tensor:
        """The routers of layers 1 to L - 1 on normalised states."""
        return torch.bmm(states * norms[1:], weights[1:].mT)

    y, own = picks[1:], late[1:]
    known = {"the layer before": late[:-1], "before attention": early[1:]}
    print(f"{rows} tokens trained, {picks.shape[1] - rows} judge\n")
    print("| known | guesses from | found 4 | found 8 |\n|---|---|---|---|")
    for name, x in known.items():
        shift = (own[:, :rows] - x[:, :rows]).mean(1, keepdim=True)
        learned = torch.zeros_like(x)  # as it goes, as `gate` does
        for t in range(1, x.shape[1]):
            rate = 1 / min(t + DOUBT, LATELY)
            learned[:, t] = torch.lerp(learned[:, t - 1], own[:, t - 1] - x[:, t - 1], rate)
        found = {
            "the router": route(x),
            "the router, mean shift": route(x + shift),
            "the router, mean shift, learned as it goes": route(x + learned),
            "a trained head": head(x, y, rows, seconds),
        }
        for kind, logits in found.items():
            shares = [recall(logits[:, rows:], y[:, rows:], guesses) for guesses in (4, 8)]
            print(f"| {name} | {kind} | {shares[0]:.1%} | {shares[1]:.1%} |", flush=True)


if __name__ == "__main__":
    main()
