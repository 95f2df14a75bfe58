"""Eviction policies by name.

    from flashmoe.cache.policies import create
    policy = create("lru")                      # or "flashmoe:policy.safetensors", "lfu-aged", ...
    policy.bind(make_residency(...))

Another package adds a policy with an entry point in the group `flashmoe.policies`: its name is the policy's
name, its value a callable that returns an EvictionPolicy (for NAME:FILE, it is called with the path as
keyword `file`).
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from flashmoe.cache.policies.base import EvictionPolicy, Kernels, Replay
from flashmoe.errors import PolicyError

__all__ = ["BUILTIN", "EvictionPolicy", "Kernels", "Replay", "available", "create"]

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
    "flashmoe": "flashmoe:Flashmoe",
    "flashmoe+": "flashmoe_plus:FlashmoePlus",
    "adaptive": "adaptive:Adaptive",
    "belady": "belady:Belady",
}


def available() -> list[str]:
    """Names of all policies: built in first, then those of other packages."""
    others = {point.name for point in entry_points(group=ENTRY_POINTS)}
    return list(BUILTIN) + sorted(others - set(BUILTIN))


def create(spec: str, **options: Any) -> EvictionPolicy:
    """Make the policy of a spec NAME or NAME:FILE, not yet bound to a pool.

    options: keyword arguments of the policy's class (e.g. decay=0.97 for lfu-aged).
    Raises PolicyError for an unknown name, a file that is missing or damaged, or an option the policy does
    not have.
    """
    name, _, file = spec.partition(":")
    name = name.strip()
    if file:
        path = Path(file).expanduser()
        if not path.is_file():
            raise PolicyError(
                f"policy file {file} does not exist: give NAME:FILE with the path of a .safetensors file"
            )
        options = {**options, "file": path}
    factory = _find(name)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise PolicyError(f"policy {name!r} cannot be made from {spec!r}: {error}") from None
    policy = factory(**options)
    if not isinstance(policy, EvictionPolicy):
        raise PolicyError(
            f"entry point {name!r} returned {type(policy).__name__}, which is not an EvictionPolicy"
        )
    return policy


def _find(name: str) -> Any:
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return point.load()
    raise PolicyError(f"unknown policy {name!r}: use one of {', '.join(available())}")
