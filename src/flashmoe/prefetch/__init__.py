"""Predictors of routing by name.

    from flashmoe.prefetch import create
    predictor = create("table")                 # or "table:FILE", "promoe:FILE", "moe-infinity"; None for "none"
    predictor.bind(n_layers=26, n_experts=64, top_k=6)

Another package adds a predictor with an entry point in the group `flashmoe.predictors`: its name is the
predictor's name, its value a callable that returns a Predictor (for NAME:FILE, it is called with the path as
keyword `file`).
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from flashmoe.prefetch.base import Predictor, PredictorError

__all__ = ["BUILTIN", "Predictor", "PredictorError", "available", "create", "create_all"]

ENTRY_POINTS = "flashmoe.predictors"

#: name -> module:class, imported when asked for (each module brings compiled kernels)
BUILTIN = {
    "gate": "gate:Gate",
    "table": "table:Table",
    "promoe": "promoe:ProMoE",
    "moe-infinity": "moe_infinity:MoEInfinity",
}

AUTO = ("gate", "table")


def available() -> list[str]:
    """Names of all predictors: "none", then those built in, then those of other packages."""
    others = {point.name for point in entry_points(group=ENTRY_POINTS)}
    return ["none", *BUILTIN, *sorted(others - set(BUILTIN) - {"none"})]


def create_all(spec: str) -> list[Predictor]:
    """The predictors of a spec, to be tried in turn: none for "none", several for "auto". Raises as create."""
    specs = AUTO if spec.strip() == "auto" else (spec,)
    return [predictor for predictor in map(create, specs) if predictor is not None]


def create(spec: str, **options: Any) -> Predictor | None:
    """Make the predictor of a spec NAME or NAME:FILE, not yet bound to a model; None for "none".

    options: keyword arguments of the predictor's class. Raises PredictorError for an unknown name, a file that
    is missing or damaged, or an option the predictor does not have.
    """
    name, _, file = spec.partition(":")
    name = name.strip()
    if file:
        path = Path(file).expanduser()
        if not path.is_file():
            raise PredictorError(
                f"predictor file {file} does not exist: give NAME:FILE with the path of a .safetensors file"
            )
        options = {**options, "file": path}
    if name == "none":
        if options:
            raise PredictorError(f"predictor 'none' takes nothing, got {spec!r}: write none")
        return None
    factory = _find(name)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise PredictorError(f"predictor {name!r} cannot be made from {spec!r}: {error}") from None
    except ValueError:  # a callable that does not say what it takes
        pass
    predictor = factory(**options)
    if not isinstance(predictor, Predictor):
        raise PredictorError(
            f"entry point {name!r} returned {type(predictor).__name__}, which is not a Predictor"
        )
    return predictor


def _find(name: str) -> Any:
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return point.load()
    raise PredictorError(f"unknown predictor {name!r}: use one of {', '.join(available())}")
