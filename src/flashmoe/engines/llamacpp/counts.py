"""Counts what the compiled callback has served without Python."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.common.memory import major_faults
from flashmoe.engines.llamacpp.control import Control


@dataclass(frozen=True)
class Evaluated:
    """What the library's server has evaluated: a graph, or the tokens of several that needed no Python."""

    tokens: Sequence[int]  # their ids, -1 where only their number is known
    decode: bool
    seconds: float
    faults: int  # pages that had to be read back from the drive


class Counts:
    """Looks at what the callback has added up in its Control, from any thread."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._hits = 0
        self._quiet = 0, 0, 0  # graphs, tokens and nanoseconds of quiet graphs
        #: Of the process, when the present graph began or the quiet ones were counted.
        self.faults = 0

    def add_hits(self, cache: ExpertCache) -> None:
        """Count hits as those of the present phase."""
        with self._lock:
            self._add_hits(cache)

    def _add_hits(self, cache: ExpertCache) -> None:
        hits = self._control.hits
        cache.stats[cache.phase].hits += hits - self._hits
        self._hits = hits

    def collect(self, cache: ExpertCache, on_graph: Callable[[Evaluated], None]) -> None:
        """Count graphs that needed no Python, and tell `on_graph` of them."""
        control = self._control
        with self._lock:
            graphs, tokens, nanoseconds = self._quiet
            if control.graphs == graphs:
                return
            self._add_hits(cache)
            self._quiet = control.graphs, control.graph_tokens, control.nanoseconds
            tokens, nanoseconds = self._quiet[1] - tokens, self._quiet[2] - nanoseconds
            cache.recent.begin_step(tokens)
            faults = major_faults()
            on_graph(Evaluated([-1] * tokens, True, nanoseconds / 1e9, faults - self.faults))
            self.faults = faults
