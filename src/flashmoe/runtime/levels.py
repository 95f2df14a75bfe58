"""What `--approx 1` to `3` stand for on a model, as `flashmoe quality --calibrate` has measured it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from flashmoe.common.files import cache_folder, write_atomically
from flashmoe.errors import UsageError
from flashmoe.routing.approximation import LEVELS, parse


def levels_of(identity: Mapping[str, str]) -> Mapping[str, str]:
    """The levels of the model with this identity; the default ones where it was not calibrated."""
    try:
        found = json.loads(_path(identity).read_text())
        levels = {level: str(found[level]) for level in LEVELS}
        for rule in levels.values():
            parse(rule, {})
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return LEVELS  # none, or damaged: calibrated anew some day
    return levels


def save_levels(identity: Mapping[str, str], levels: Mapping[str, str]) -> Path:
    """Keep the levels of a model; where. Raises OSError."""
    path = _path(identity)
    write_atomically(path, (json.dumps(dict(levels), indent=1) + "\n").encode())
    return path


def _path(identity: Mapping[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
    return cache_folder() / "levels" / f"{digest[:16]}.json"
