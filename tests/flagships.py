"""The largest models' shapes, as files that are mostly holes: what loading and running them takes beside their weights.

    python -m tests.flagships FOLDER [NAME ...]

Weights are zeros, in 1.6 bits (IQ1_S); numbers of layers, experts and parameters are those of the models, or near them.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashmoe.bench.cgroup import memory_group
from tests.models.families import DEEPSEEK4, INDEXER, KDA, KIMI, MLA, QWEN4, SHARED, Family, Shape, base
from tests.models.library import wanted
from tests.models.sparse import write_sparse
from tests.models.spec import U64

_PLAIN = re.compile(r"norm|conv|_ape|hc_|ssm_(a|dt|beta)|probs_b|tid2eid|\.bias$")
_TABLE = "per_layer_token_embd.weight"


@dataclass(frozen=True)
class Flagship(Family):
    """A family at a real shape; its matrices are as small as its experts."""

    rows: int = 0  # of a table of per-layer embeddings

    def tensors(self) -> Iterator[tuple[str, Shape, str]]:
        for name, shape, _ in super().tensors():
            if len(shape) == 1 or _PLAIN.search(name):
                kind = "F32"
            elif shape[0] % 256:
                kind = "Q8_0"
            else:
                kind = "Q4_K" if "embd" in name else "IQ1_S"
            yield name, (shape[0], self.rows) if self.rows and name == _TABLE else shape, kind


LARGE_MLA = MLA | {
    "attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512, "attention.key_length": 576,
    "attention.value_length": 512, "attention.key_length_mla": 192, "attention.value_length_mla": 128,
    "rope.dimension_count": 64,
}  # fmt: skip
LONG = {"context_length": 1 << 18}
HASH_ROWS = 22_000_000

FLAGSHIPS: dict[str, Flagship] = {
    "Qwen3.8-Flash-Next": Flagship(
        "qwen4exp",
        base(
            48, embedding_length=2048, attention__head_count=16, attention__key_length=256,
            attention__value_length=256, expert_count=256, expert_used_count=8, expert_feed_forward_length=512,
        )
        | LONG
        | QWEN4
        | {
            "full_attention_interval": 4, "attention.compress_ratios": [4] * 48, "ssm.inner_size": 4096,
            "ssm.state_size": 128, "ssm.time_step_rank": 32, "ssm.group_count": 16,
            "rope.dimension_sections": [11, 11, 10, 0], "rope.dimension_count": 64,
            "expert_shared_feed_forward_length": 512,
            "attention.indexer.key_length": 128, "embedding_length_per_layer_input": 256,
            "hyper_connection.low_rank": 64, "ple.heads_per_ngram": 4,
            "ple.head_offsets": [U64(head * HASH_ROWS) for head in range(8)],
            "ple.head_vocab_sizes": [U64(HASH_ROWS)] * 8,
        },
        rows=11 * HASH_ROWS,
    ),
    "DeepSeek-V4": Flagship(
        "deepseek4",
        base(
            61, embedding_length=7168, attention__head_count=128, expert_count=384, expert_used_count=6,
            expert_feed_forward_length=3072,
        )
        | LONG
        | {key: value for key, value in DEEPSEEK4.items() if key != "nextn_predict_layers"}
        | {
            "attention.key_length": 512, "attention.value_length": 512, "attention.q_lora_rank": 1536,
            "attention.sliding_window": 128, "rope.dimension_count": 64, "attention.indexer.head_count": 64,
            "attention.indexer.key_length": 128, "attention.indexer.top_k": 1024,
            "attention.output_group_count": 16, "attention.output_lora_rank": 1024, "hash_layer_count": 3,
            "attention.compress_ratios": [128, 128, *[4, 128] * 29, 4],
        },
    ),
    "Kimi-K3": Flagship(
        "kimi-k3",
        base(
            93, embedding_length=7168, feed_forward_length=18432, attention__head_count=64, expert_count=896,
            expert_used_count=16, expert_feed_forward_length=3072, expert_latent_length=3584,
        )
        | LONG
        | LARGE_MLA
        | SHARED
        | KDA
        | KIMI
        | {
            # latent attention in every fourth block, linear in the others
            "attention.head_count_kv": [int(block % 4 == 3) for block in range(93)],
            "kda.head_dim": 128, "attn_res.block_size": 16,
        },
    ),
    "GLM-5": Flagship(
        "glm-dsa",
        base(
            78, embedding_length=6144, feed_forward_length=12288, attention__head_count=64, expert_count=256,
            expert_used_count=8, expert_feed_forward_length=2048,
        )
        | LONG
        | LARGE_MLA
        | SHARED
        | INDEXER
        | {
            "leading_dense_block_count": 3, "attention.indexer.head_count": 32,
            "attention.indexer.key_length": 128, "attention.indexer.top_k": 2048,
        },
    ),
}  # fmt: skip


def run(path: Path, ram: str) -> dict[str, Any]:
    """Load and decode in this process; figures in seconds and bytes."""
    import flashmoe
    from flashmoe.common.memory import status_bytes
    from flashmoe.engines.llamacpp.library import find_library, open_library
    from flashmoe.engines.llamacpp.sizes import ContextSizes
    from flashmoe.storage.catalog import ExpertCatalog
    from flashmoe.storage.gguf import read_gguf

    began = time.perf_counter()
    catalog = ExpertCatalog.from_gguf(read_gguf(path))
    header_seconds = time.perf_counter() - began
    began = time.perf_counter()
    with ContextSizes(open_library(find_library()), catalog.gguf) as sizes:
        contexts = {n: sizes.nbytes(n, 1) for n in (1024, 32768, 1 << 18)}
    plan_seconds = time.perf_counter() - began
    began = time.perf_counter()
    with flashmoe.load(path, ram=ram, threads=2, n_ctx=1024, layout="plain") as model:
        load_seconds = time.perf_counter() - began
        model.engine.decode([1, 2, 3, 4][: model.engine.n_ubatch])
        began = time.perf_counter()
        for _ in range(4):
            model.engine.decode([5])
        token_seconds = (time.perf_counter() - began) / 4
        pool_bytes = sum(size for _, size in model.cache.pool.regions)
        beside = status_bytes("RssAnon") - catalog.dense_bytes - pool_bytes - contexts[1024]
        return {
            "file_bytes": catalog.gguf.size,
            "parameters": sum(math.prod(tensor.shape) for tensor in catalog.gguf.tensors.values()),
            "layers": len(catalog.layers),
            "total_experts": catalog.total_experts,
            "dense_bytes": catalog.dense_bytes,
            "slots": model.cache.policy.residency.n_slots,
            "pool_bytes": pool_bytes,
            "context_bytes": contexts,
            "header_seconds": header_seconds,
            "plan_seconds": plan_seconds,
            "load_seconds": load_seconds,
            "token_seconds": token_seconds,
            "peak_bytes": status_bytes("VmHWM"),
            "beside_bytes": beside,
        }


def main() -> None:
    """Write each model, run it in a process of its own within 8 GiB (Qwen: 2 GiB), and print its figures as JSON."""
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or FLAGSHIPS:
        path = folder / f"{name}.gguf"
        if not path.is_file():
            write_sparse(replace(FLAGSHIPS[name], wanted=wanted), path, router="IQ1_S")
        gib = 2 if FLAGSHIPS[name].rows else 8
        command = [sys.executable, "-m", "tests.flagships", "--run", str(path), f"{gib}GiB"]
        group = memory_group(gib << 30)
        done = subprocess.run(group.command(command) if group else command, capture_output=True, text=True)
        figures = {"model": name, "budget_bytes": gib << 30}
        figures |= json.loads(done.stdout) if not done.returncode else {"failed": done.stderr[-2000:]}
        if group:
            figures["cgroup_peak_bytes"] = group.usage().peak
            group.close()
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        print(json.dumps(run(Path(sys.argv[2]), sys.argv[3])))
    else:
        main()
