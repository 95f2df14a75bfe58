"""Makes the demo model from nothing: texts, tokenizer, training, export, evaluation.

    python scripts/demo_model/train.py --minutes 75 --out src/flashmoe/data/demo.gguf

Runs on Debian 12 (the texts come from its packages through apt-get) with the packages of requirements.txt.
Interrupted, the same command goes on from the last checkpoint in the work folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import export
import llama_check
import routing
import torch
from dataset import Corpus, prepare
from model import Model, Shape
from packages import DEFAULT_CACHE
from training import Plan, train, validate

CANDIDATES = [("q5_1", "q8_0"), ("q5_0", "q8_0"), ("q4_1", "q8_0"), ("q4_0", "q8_0")]
LARGEST = 24_000_000


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=75.0, help="training time, everything else comes on top"
    )
    parser.add_argument("--out", type=Path, default=Path("src/flashmoe/data/demo.gguf"))
    parser.add_argument(
        "--work", type=Path, default=DEFAULT_CACHE.parent / "demo-work", help="tokens and checkpoints"
    )
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=2, help="training processes, one core each")
    parser.add_argument("--hf-out", type=Path, help="also write unquantised safetensors and config.json here")
    parser.add_argument(
        "--trace-out", type=Path, help="also write the routing trace of validation text here (npz)"
    )
    parser.add_argument(
        "--skip-training", action="store_true", help="only export and evaluate the last checkpoint"
    )
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(1)
    corpus = prepare(chosen.work, chosen.vocabulary)
    checkpoint = chosen.work / "checkpoint.pt"
    if not chosen.skip_training:
        shape = Shape(vocabulary=corpus.tokenizer.size)
        checkpoint = train(corpus, shape, Plan(minutes=chosen.minutes, workers=chosen.workers), chosen.work)
    model = export.load(checkpoint)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"quantisation": write_best(model, corpus, chosen.out)}
    report["llama.cpp"] = check(model, corpus, chosen.work / "exact.gguf")
    report["routing"] = routing_report(model, corpus, chosen.trace_out)
    if chosen.hf_out:
        export.write_hf(model, corpus.tokenizer, chosen.hf_out)
    report["samples"] = llama_check.samples(llama_check.Llama(chosen.out))
    (chosen.work / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for prompt, text in report["samples"]:
        print(f"--- {prompt}\n{text}")


def write_best(model: Model, corpus: Corpus, out: Path) -> list[dict]:
    """Write every candidate that fits the size limit, keep the one with the lowest validation loss."""
    rows = [{"experts": "f32", "dense": "f32", "loss": measured(model, corpus)}]
    best = float("inf")
    for experts, dense in CANDIDATES:
        draft = out.with_suffix(".part")
        size = export.write_gguf(model, corpus.tokenizer, draft, experts, dense)
        loss = measured(export.quantised(model, experts, dense), corpus)
        rows.append({"experts": experts, "dense": dense, "loss": loss, "bytes": size})
        if size <= LARGEST and loss["mixture"] < best:
            best = loss["mixture"]
            draft.replace(out)
        draft.unlink(missing_ok=True)
        print(f"[export] {experts} {dense}: {size} bytes, loss {loss['mixture']:.4f}", flush=True)
    return rows


def measured(model: Model, corpus: Corpus) -> dict[str, float]:
    """Validation losses with f32 products."""
    model.kind = torch.float32
    return validate(model, corpus, windows=60)


def check(model: Model, corpus: Corpus, exact: Path) -> dict:
    """llama.cpp against PyTorch on an unquantised file: tokens and log-probabilities."""
    export.write_gguf(model, corpus.tokenizer, exact, "f32", "f32")
    llama = llama_check.Llama(exact)
    texts = llama_check.TEXTS
    result = {
        "same_tokens": llama_check.same_tokens(llama, corpus.tokenizer, texts + llama_check.chat_texts()),
        "largest_gap": llama_check.largest_gap(llama, model, corpus.tokenizer, texts),
    }
    print(f"[check] {result}", flush=True)
    return result


def routing_report(model: Model, corpus: Corpus, out: Path | None) -> str:
    """The routing statistics on held-out text; optionally the trace itself."""
    content = routing.trace(model, corpus)
    if out:
        routing.save(content, out)
    text = routing.table(routing.statistics(content), model.shape.experts, model.shape.picked)
    print(text, flush=True)
    return text


if __name__ == "__main__":
    main()
