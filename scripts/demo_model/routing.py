"""What the trained routers do on held-out text: a trace, and its statistics against uniform picking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from dataset import MIXTURE, Corpus
from model import Model


@torch.no_grad()
def trace(model: Model, corpus: Corpus, tokens: int = 20_000, length: int = 512) -> dict[str, np.ndarray]:
    """Expert ids of every token and layer over held-out windows, in the mixture's proportions."""
    ids_of, sequence_of, picks_of, count = [], [], [], 0
    for name, stream in corpus.validation.items():
        windows = max(1, round(tokens * MIXTURE[name][0] / length))
        windows = min(windows, (len(stream) - 1) // length)
        for window in range(windows):
            start = window * ((len(stream) - length) // windows)
            ids = torch.from_numpy(stream[start : start + length].astype(np.int64))[None]
            picks = model.hidden(ids)[3]
            picks_of.append(torch.stack(picks, dim=1).to(torch.uint8).numpy())
            ids_of.append(ids[0].numpy())
            sequence_of.append(np.full(length, count, dtype=np.int32))
            count += 1
    return {
        "expert_ids": np.concatenate(picks_of),
        "sequence_id": np.concatenate(sequence_of),
        "token_id": np.concatenate(ids_of).astype(np.int32),
        "num_experts": np.array(model.shape.experts),
        "first_moe_layer": np.array(0),
    }


def save(content: dict[str, np.ndarray], path: Path) -> None:
    np.savez_compressed(path, **content)


def statistics(content: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """Per layer: overlap of neighbouring tokens' picks, share of the busiest quarter, entropy in bits."""
    picks, sequence = content["expert_ids"], content["sequence_id"]
    experts, picked = int(content["num_experts"]), picks.shape[2]
    inside = sequence[1:] == sequence[:-1]
    rows = []
    for layer in range(picks.shape[1]):
        hot = np.zeros((len(picks), experts), dtype=bool)
        np.put_along_axis(hot, picks[:, layer].astype(np.int64), True, axis=1)
        shares = np.sort(hot.sum(0) / hot.sum())[::-1]
        seen = shares[shares > 0]
        rows.append(
            {
                "layer": layer,
                "overlap": float((hot[1:] & hot[:-1]).sum(1)[inside].mean() / picked),
                "overlap_by_popularity": float((np.square(shares * picked)).sum() / picked),
                "top_quarter": float(shares[: experts // 4].sum()),
                "entropy_bits": float(-(seen * np.log2(seen)).sum()),
            }
        )
    return rows


def table(rows: list[dict[str, float]], experts: int, picked: int) -> str:
    """The statistics as a Markdown table, with what uniform picking would give."""
    lines = [
        "| layer | overlap with the next token | if tokens were independent | top quarter's share | entropy, bits |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['layer']} | {row['overlap']:.3f} | {row['overlap_by_popularity']:.3f} | {row['top_quarter']:.3f} "
        f"| {row['entropy_bits']:.2f} |"
        for row in rows
    ]
    uniform = picked / experts
    lines.append(f"| uniform | {uniform:.3f} | {uniform:.3f} | 0.250 | {np.log2(experts):.2f} |")
    return "\n".join(lines)
