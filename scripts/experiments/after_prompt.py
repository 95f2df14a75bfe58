"""What a prompt should leave in the cache: hit rates of the tokens that follow it, by rule.

python scripts/experiments/after_prompt.py validation.safetensors --capacity 12.5%,25%,50%

Each sequence of a trace that is long enough is a prompt, except for its last tokens, which are decoded. Rules:

window: the policy sees the prompt token by token, as the runtime does (cache/window.py).
batch: the policy sees each micro-batch's distinct experts, in the order of their numbers.
last token: the prompt leaves the residents alone, and its last token's experts are let in (FlashMoE, arXiv 2601.17063).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from flashmoe.cache.policies import create
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.residency import equal_quota, make_residency
from flashmoe.routing.files import read
from flashmoe.routing.trace import RoutingTrace

RULES = ("window", "batch", "last token")


class Cache:
    """A policy with shares of equal size, that counts what single tokens miss."""

    def __init__(self, policy: str, layers: int, experts: int, slots: int) -> None:
        self.policy: EvictionPolicy = create(policy)
        self.policy.bind(make_residency(layers, experts, equal_quota(slots, layers, experts)))
        self._out = [np.zeros(experts, np.int32) for _ in range(3)]
        self._share = min(self.policy.residency.quota)
        self.misses = self.requests = 0

    def decode(self, token: NDArray[np.int32]) -> None:
        """Ask for a token's experts, int32 [L, k]."""
        for layer, ids in enumerate(token):
            self.misses += self.policy.access(layer, ids, *self._out)
            self.requests += len(ids)

    def prefill(self, prompt: NDArray[np.int32], rule: str, ubatch: int) -> None:
        """Let a prompt, int32 [T, L, k], pass. What it asks for is not counted."""
        counted = self.misses, self.requests
        if rule == "window":
            for token in prompt:
                self.decode(token)
        elif rule == "last token":
            self.decode(prompt[-1])
        else:
            for first in range(0, len(prompt), ubatch):
                batch = prompt[first : first + ubatch]
                for layer in range(batch.shape[1]):
                    ids = np.unique(batch[:, layer])
                    for start in range(0, len(ids), self._share):
                        self.policy.access(layer, ids[start : start + self._share], *self._out)
        self.misses, self.requests = counted


def hit_rate(
    trace: RoutingTrace, policy: str, rule: str, capacity: float, tokens: int, least: int, ubatch: int
) -> tuple[float, int]:
    """Hit rate of the `tokens` tokens after each prompt of `least` tokens or more, and the number of prompts."""
    ids = trace.expert_ids.astype(np.int32)
    layers = ids.shape[1]
    cache = Cache(policy, layers, trace.num_experts, round(capacity * layers * trace.num_experts))
    edges = np.flatnonzero(np.diff(trace.sequence_id)) + 1
    sequences = [s for s in np.split(ids, edges) if len(s) >= least + tokens]
    for sequence in track(sequences, f"{policy}, {rule}, {capacity:.1%}", transient=True):
        cache.policy.begin_sequence()
        cache.prefill(sequence[:-tokens], rule, ubatch)
        for token in sequence[-tokens:]:
            cache.decode(token)
    return 1 - cache.misses / max(1, cache.requests), len(sequences)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("--policy", default="lru,lfu-aged")
    parser.add_argument("--capacity", default="12.5%,25%,50%")
    parser.add_argument("--tokens", type=int, default=32, help="decoded after each prompt")
    parser.add_argument("--least", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--ubatch-size", type=int, default=128)
    options = parser.parse_args()
    trace = read(options.trace)
    for share in options.capacity.split(","):
        for policy in options.policy.split(","):
            for rule in RULES:
                rate, prompts = hit_rate(
                    trace,
                    policy,
                    rule,
                    float(share.strip().removesuffix("%")) / 100,
                    options.tokens,
                    options.least,
                    options.ubatch_size,
                )
                print(f"{share:>6} {policy:>10} {rule:>10}: {rate:.4f} ({prompts} prompts)", flush=True)


if __name__ == "__main__":
    main()
