"""Eviction policies by name.

    from flashmoe.cache.policies import create
    policy = create("lru")                      # or "flashmoe:policy.safetensors", "lfu-aged", ...
    policy.bind(make_residency(...))

Another package adds a policy with an entry point in the group `flashmoe.policies`: its name is the policy's
name, its value a callable that returns an EvictionPolicy (for NAME:FILE, it is called with the path as
keyword `file`).
"""

from __future__ import annotations

from typing import Any

from flashmoe.cache.policies.base import EvictionPolicy, Kernels, Replay
from flashmoe.common.plugins import Registry
from flashmoe.errors import PolicyError

__all__ = [
    "BUILTIN",
    "EvictionPolicy",
    "Kernels",
    "Replay",
    "available",
    "create",
    "listed",
    "suggested",
    "without_file",
]

ENTRY_POINTS = "flashmoe.policies"

#: name -> module:class, imported when asked for (each module brings compiled kernels)
BUILTIN = {
    "lru": "lru:Lru",
    "lfu": "lfu:Lfu",
    "lfu-aged": "lfu_aged:LfuAged",
    "lfru": "lfru:Lfru",
    "least-stale": "least_stale:LeastStale",
    "arc": "arc:Arc",
    "lecar": "lecar:LeCaR",
    "moe-infinity": "moe_infinity:MoEInfinity",
    "finemoe": "finemoe:FineMoE",
    "flashmoe": "flashmoe:Flashmoe",
    "flashmoe+": "flashmoe_plus:FlashmoePlus",
    "online": "online:Online",
    "adaptive": "adaptive:Adaptive",
    "belady": "belady:Belady",
}


_REGISTRY = Registry(EvictionPolicy, "policy", PolicyError, __name__, BUILTIN, ENTRY_POINTS)
#: Names of all policies; and all with what a list says of each: see Registry.
available, listed = _REGISTRY.available, _REGISTRY.listed


def without_file() -> list[str]:
    """Names of the policies that need no trained file."""
    return _REGISTRY.names(lambda policy: not getattr(policy, "needs_file", False))


def suggested() -> list[str]:
    """Names of the policies that are worth trying where another does badly."""
    return _REGISTRY.names(lambda policy: getattr(policy, "suggested", False))


def create(spec: str, **options: Any) -> EvictionPolicy:
    """Make the policy of a spec NAME or NAME:FILE, not yet bound to a pool.

    options: keyword arguments of the policy's class (e.g. decay=0.97 for lfu-aged).
    Raises PolicyError for an unknown name, a file that is missing or damaged, or an option the policy does
    not have.
    """
    return _REGISTRY.create(spec, **options)
