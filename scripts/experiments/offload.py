"""FlashMoE's transformers engine against accelerate's disk offload: the same checkpoint under the same memory limit.

    python scripts/experiments/offload.py FOLDER [RAM, default 5GiB] [TURNS, default 2]

Each run is a process of its own in a memory cgroup (page cache included), in turns; the page cache is dropped before.
Needs the right to make a cgroup. Accelerate gets all layers on disk and the ends of the model in memory. Prints
tokens/s of greedy decoding, the peak of the group, and whether both made the same tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flashmoe.bench.baseline import drop_from_page_cache
from flashmoe.bench.cgroup import memory_group
from flashmoe.common.units import parse_bytes

PROMPT = list(range(100, 116))
TOKENS = {"flashmoe": 24, "accelerate": 3}


def flashmoe(folder: str, ram: str) -> dict[str, object]:
    import flashmoe
    from flashmoe.engines.base import SamplingParams

    with flashmoe.load(folder, engine="transformers", ram=ram, n_ctx=1024) as model:
        made = model.start(PROMPT, max_tokens=TOKENS["flashmoe"], sampling=SamplingParams(temperature=0))
        while not made.finished:
            made.step()
        stats, seconds = model.cache.stats["decode"], model.telemetry.decode.seconds
        return {
            "tokens_per_second": model.telemetry.decode.tokens_per_second,
            "hit_rate": round(stats.hit_rate, 3),
            "read_gb": round(stats.bytes_read / 1e9, 2),
            "stalled": round(stats.stall_seconds / seconds, 3),
            "tokens": made.made,
        }


def accelerate(folder: str, _ram: str) -> dict[str, object]:
    import torch
    import transformers

    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    with tempfile.TemporaryDirectory(dir=folder) as offload:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            device_map=places | {"model.layers": "disk"},
            offload_folder=offload,
            experts_implementation="eager",
        )
        seconds: list[float] = []
        tokens: list[int] = []
        ids, past = torch.tensor([PROMPT]), None
        with torch.inference_mode():
            for _ in range(TOKENS["accelerate"]):
                began = time.perf_counter()
                found = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                past, ids = found.past_key_values, found.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(ids))
                seconds.append(time.perf_counter() - began)
        return {"tokens_per_second": (len(seconds) - 1) / sum(seconds[1:]), "tokens": tokens}


def measure(name: str, folder: str, ram: str) -> dict[str, object]:
    drop_from_page_cache(sorted(Path(folder).glob("*.safetensors")))
    group = memory_group(parse_bytes(ram))
    if group is None:
        sys.exit("no right to make a memory cgroup")
    with group:
        command = group.command([sys.executable, __file__, "--child", name, folder, ram])
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        usage = group.usage()
    if done.returncode:
        return {"failed": done.returncode, "oom_kills": usage.oom_kills}
    return {**json.loads(done.stdout.splitlines()[-1]), "peak_mib": usage.peak >> 20}


def main(folder: str, ram: str = "5GiB", turns: str = "2") -> None:
    results: dict[str, list[dict[str, object]]] = {name: [] for name in TOKENS}
    for _ in range(int(turns)):
        for name, rows in results.items():
            rows.append(measure(name, folder, ram))
            print(name, json.dumps({k: v for k, v in rows[-1].items() if k != "tokens"}), flush=True)
    ours, theirs = results.values()
    for one, other in zip(ours, theirs, strict=True):
        if "failed" not in one and "failed" not in other:
            ratio = float(str(one["tokens_per_second"])) / float(str(other["tokens_per_second"]))
            first = TOKENS["accelerate"]
            same = list(one["tokens"])[:first] == other["tokens"]  # type: ignore[call-overload]
            print(f"ratio {ratio:.1f}, the same first {first} tokens: {same}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run = {"flashmoe": flashmoe, "accelerate": accelerate}[sys.argv[2]]
        print(json.dumps(run(*sys.argv[3:])))
    elif sys.argv[1:]:
        main(*sys.argv[1:])
    else:
        sys.exit(__doc__)
