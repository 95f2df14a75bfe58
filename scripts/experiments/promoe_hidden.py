"""ProMoE's predictor as in the paper, from hidden states, on the demo model under the transformers engine.

    python scripts/experiments/promoe_hidden.py TRACE [MINUTES, default 2]

TRACE is a routing trace of the demo model; its texts are evaluated again, by Hugging Face's OLMoE with the demo's
weights (unpacked from the GGUF into a checkpoint), and the input of every router is kept. Networks of two layers learn
to tell the experts of layer l + 1, l + 2 and l + 4 from the state at layer l, on the first 85 % of the sequences; the
last 15 % judge them, beside the model's own routers (`gate`), the stand-in for hidden states that `--prefetch promoe`
has, and `table`, both trained on the same routing. Prints a table in Markdown.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional

import flashmoe
from flashmoe.engines.transformers.routers import find_routers
from flashmoe.learn import prefetch as learning
from flashmoe.learn.train import Plan
from flashmoe.prefetch.base import Float32, Int32, Predictor
from flashmoe.prefetch.promoe import ProMoE
from flashmoe.prefetch.table import Table
from flashmoe.routing.files import split
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.prefetch import AHEAD, judge
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.hub import demo_model

WIDTH, BATCH, RATE = 256, 512, 2e-3
CAPACITY = 0.25
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def unpack(path: Path, folder: Path) -> None:
    """Write the demo model as a checkpoint of Hugging Face's OLMoE in float32."""
    weights: dict[str, torch.Tensor] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] in ENDS:
            weights[f"{ENDS[parts[0]]}.weight"] = values
            continue
        block, kind = f"model.layers.{parts[1]}.", parts[2]
        if kind in NAMES:
            weights[f"{block}{NAMES[kind]}.weight"] = values
        else:
            projection = kind.split("_")[1]
            for expert, slice_ in enumerate(values):
                weights[f"{block}mlp.experts.{expert}.{projection}_proj.weight"] = slice_.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = read_gguf(path)
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": found.arch_int("vocab_size", 0),
        "hidden_size": found.arch_int("embedding_length", 0),
        "intermediate_size": found.arch_int("expert_feed_forward_length", 0),
        "num_hidden_layers": found.arch_int("block_count", 0),
        "num_attention_heads": found.arch_int("attention.head_count", 0),
        "num_key_value_heads": found.arch_int("attention.head_count_kv", 0),
        "max_position_embeddings": found.arch_int("context_length", 0),
        "rms_norm_eps": found.arch_value("attention.layer_norm_rms_epsilon"),
        "rope_theta": found.arch_value("rope.freq_base"),
        "num_experts": found.arch_int("expert_count", 0),
        "num_experts_per_tok": found.arch_int("expert_used_count", 0),
        "norm_topk_prob": False,
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config))


def evaluate(trace: RoutingTrace) -> tuple[RoutingTrace, Float32, list[Any]]:
    """The routing of the trace's texts under the transformers engine, the routers' inputs [T, L, n], the routers."""
    states: list[list[torch.Tensor]] = [[] for _ in range(trace.n_layers)]
    ids: list[list[torch.Tensor]] = [[] for _ in range(trace.n_layers)]
    with tempfile.TemporaryDirectory() as name:
        unpack(demo_model(), Path(name))
        with flashmoe.load(name, engine="transformers", cache="100%", n_ctx=512, prefetch="none") as model:
            engine: Any = model.engine
            for layer, experts in enumerate(engine._experts):

                def keep(_: Any, args: Any, layer: int = layer) -> None:
                    states[layer].append(args[0].float())
                    ids[layer].append(args[1])

                model.model.get_submodule(experts).register_forward_pre_hook(keep)
            routers = find_routers(model.model, engine._experts)
            for sequence in dict.fromkeys(trace.sequence_id.tolist()):
                engine.clear()
                model.decoder.evaluate(trace.token_id[trace.sequence_id == sequence].tolist(), decode=False)
    found = torch.stack([torch.cat(layer) for layer in ids], 1).numpy().astype(np.int16)
    same = (np.sort(found, 2) == np.sort(trace.expert_ids, 2)).all(2).mean()
    print(f"{len(found)} tokens; all experts of a layer as llama.cpp chose them: {same:.1%}", flush=True)
    again = RoutingTrace(
        found, trace.num_experts, trace.token_id, trace.sequence_id, model=trace.model
    )  # every token is a step of its own
    return again, torch.stack([torch.cat(layer) for layer in states], 1).numpy(), routers


def train(states: torch.Tensor, wanted: torch.Tensor, ahead: int, rows: int, seconds: float) -> torch.Tensor:
    """Logits [T, L - ahead, E] for the layers from `ahead` on, by networks that the first `rows` tokens trained."""
    torch.manual_seed(0)
    x, y = states[:, : states.shape[1] - ahead].transpose(0, 1), wanted[:, ahead:].transpose(0, 1)
    n_layers, _, n = x.shape
    w1 = (torch.randn(n_layers, n, WIDTH) * n**-0.5).requires_grad_()
    w2 = (torch.randn(n_layers, WIDTH, y.shape[2]) * WIDTH**-0.5).requires_grad_()
    b1, b2 = (torch.zeros(n_layers, 1, size, requires_grad=True) for size in (WIDTH, y.shape[2]))
    scale = x[:, :rows].pow(2).mean((1, 2), keepdim=True).rsqrt()

    def logits(part: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(b2, torch.relu(torch.baddbmm(b1, part * scale, w1)), w2)

    optimizer = torch.optim.AdamW([w1, b1, w2, b2], RATE, weight_decay=0.01)
    began, epochs = time.monotonic(), 0
    while (used := time.monotonic() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(0.02, 1 - used / seconds)
        for batch in torch.randperm(rows).split(BATCH):
            optimizer.zero_grad()
            functional.binary_cross_entropy_with_logits(logits(x[:, batch]), y[:, batch]).backward()
            optimizer.step()
        epochs += 1
    print(f"{ahead} ahead: {epochs} epochs in {used:.0f} s", flush=True)
    with torch.no_grad():
        return logits(x).transpose(0, 1)


class Known(Predictor):
    """Says what was worked out before: chances [T, L, E] by distance."""

    def __init__(self, chances: dict[int, NDArray[Any]]) -> None:
        super().__init__()
        self._chances, self._row = chances, -1

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> Any:
        return None

    def check_model(self, model: Any) -> None: ...
    def begin_sequence(self) -> None: ...
    def observe(self, layer: int, ids: Int32) -> None: ...

    def begin_step(self, token: int) -> None:
        self._row += 1

    def predict(self, layer: int, target: int, out: Float32) -> None:
        out[:] = self._chances[target - layer][self._row, target] if layer >= 0 else 0


def main(path: str, minutes: str = "2") -> None:
    trace, states, routers = evaluate(RoutingTrace.load(path))
    first, last = split(trace, 0.85)
    rows, k = first.n_tokens, trace.top_k
    wanted = np.zeros((*trace.expert_ids.shape[:2], trace.num_experts), np.float32)
    np.put_along_axis(wanted, trace.expert_ids.astype(np.int64), 1, 2)
    hidden: dict[int, NDArray[Any]] = {}
    gate: dict[int, NDArray[Any]] = {}
    for ahead in AHEAD[1:]:
        made = train(torch.from_numpy(states), torch.from_numpy(wanted), ahead, rows, 60 * float(minutes))
        hidden[ahead] = np.zeros_like(wanted)
        hidden[ahead][:, ahead:] = torch.sigmoid(made).numpy()
        gate[ahead] = np.zeros_like(wanted)
        for target in range(ahead, trace.n_layers):
            state = states[:, target - ahead] * (routers[target].norm / routers[target - ahead].norm)
            gate[ahead][:, target] = functional.softmax(
                torch.from_numpy(state @ routers[target].weights.T + routers[target].bias), -1
            ).numpy()
    stand_in = learning.train(first, "promoe", Plan(minutes=3 * float(minutes), held_out=0.05))
    counted = learning.train(first, "table", Plan())
    predictors = {
        "promoe, hidden states": Known({a: c[rows:] for a, c in hidden.items()}),
        "`gate`": Known({a: c[rows:] for a, c in gate.items()}),
        "`promoe:FILE`": ProMoE(trained=stand_in),
        "`table:FILE`": Table(trained=counted),
    }
    slots = [round(CAPACITY * trace.n_layers * trace.num_experts)]
    print(f"{rows} tokens to learn from, {last.n_tokens} to judge by")
    print(f"| predictor | ahead | found {k} | found {2 * k} | right 1 | right 2 | right 4 | misses {k} |")
    print("|---|---|---|---|---|---|---|---|")
    for name, predictor in predictors.items():
        counts = judge(last, predictor, slots)
        for c, ahead in enumerate(AHEAD):
            if ahead:
                every, missing = counts[c, 0], counts[c, 1]
                cells = [every[k - 1, 0] / every[-1, 0], every[2 * k - 1, 0] / every[-1, 0]]
                cells += [missing[g - 1, 0] / missing[g - 1, 1] for g in (1, 2, 4)]
                cells.append(missing[k - 1, 0] / missing[-1, 0])
                print(f"| {name} | {ahead} | " + " | ".join(f"{100 * cell:.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
