"""Predictors of routing by name.

    from flashmoe.prefetch import create
    predictor = create("table")                 # or "table:FILE", "promoe:FILE", "moe-infinity"; None for "none"
    predictor.bind(n_layers=26, n_experts=64, top_k=6)

Another package adds a predictor with an entry point in the group `flashmoe.predictors`: its name is the
predictor's name, its value a callable that returns a Predictor (for NAME:FILE, it is called with the path as
keyword `file`).
"""

from __future__ import annotations

from typing import Any

from flashmoe.common.plugins import Registry
from flashmoe.prefetch.base import Predictor, PredictorError

__all__ = [
    "BUILTIN",
    "Predictor",
    "PredictorError",
    "available",
    "create",
    "create_all",
    "listed",
    "needs_hidden",
    "of_routing_alone",
]

ENTRY_POINTS = "flashmoe.predictors"

#: name -> module:class, imported when asked for (each module brings compiled kernels)
BUILTIN = {
    "gate": "gate:Gate",
    "table": "table:Table",
    "promoe": "promoe:ProMoE",
    "moe-infinity": "moe_infinity:MoEInfinity",
    "finemoe": "finemoe:FineMoE",
}

AUTO = ("gate", "table")


_REGISTRY = Registry(Predictor, "predictor", PredictorError, __name__, BUILTIN, ENTRY_POINTS, also=("none",))
#: Names of all predictors, "none" in front; and all with what a list says of each: see Registry.
available, listed = _REGISTRY.available, _REGISTRY.listed


def needs_hidden(spec: str) -> bool:
    """Whether the predictor of a spec needs the routers' inputs. Raises PredictorError for an unknown name."""
    return getattr(_REGISTRY.find(spec.partition(":")[0].strip()), "needs_hidden", False)


def of_routing_alone() -> list[str]:
    """Names of the predictors that need neither a trained file nor more than a trace has."""
    return _REGISTRY.names(
        lambda p: not (getattr(p, "needs_file", False) or getattr(p, "needs_hidden", False))
    )


def create_all(spec: str) -> list[Predictor]:
    """The predictors of a spec, to be tried in turn: none for "none", several for "auto". Raises as create."""
    specs = AUTO if spec.strip() == "auto" else (spec,)
    return [predictor for predictor in map(create, specs) if predictor is not None]


def create(spec: str, **options: Any) -> Predictor | None:
    """Make the predictor of a spec NAME or NAME:FILE, not yet bound to a model; None for "none".

    options: keyword arguments of the predictor's class. Raises PredictorError for an unknown name, a file that
    is missing or damaged, or an option the predictor does not have.
    """
    name, given = _REGISTRY.parse(spec)
    if name != "none":
        return _REGISTRY.create(spec, **options)
    if given or options:
        raise PredictorError(f"predictor 'none' takes nothing, got {spec!r}: write none")
    return None
