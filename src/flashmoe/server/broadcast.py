"""Several observers of the routing, where the engine has room for one; none, and the engine need not tell."""

from __future__ import annotations

import threading
from typing import Any

from numpy.typing import NDArray

from flashmoe.engines.base import Engine
from flashmoe.routing.recorder import RoutingObserver


class Broadcast:
    """A `RoutingObserver` that passes on what the engine's hook says. Observers come and go from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._observers: tuple[RoutingObserver, ...] = ()
        self._lock = threading.Lock()

    def join(self, observer: RoutingObserver) -> None:
        """From here on `observer` sees every layer's routing."""
        with self._lock:
            self._set((*self._observers, observer))

    def leave(self, observer: RoutingObserver) -> None:
        """No longer."""
        with self._lock:
            self._set(tuple(other for other in self._observers if other is not observer))

    def _set(self, observers: tuple[RoutingObserver, ...]) -> None:
        self._observers = observers
        self._engine.record(self if observers else None)

    def begin_step(self) -> None:
        for observer in self._observers:
            observer.begin_step()

    def add(self, layer: int, ids: NDArray[Any], weights: NDArray[Any] | None = None) -> None:
        for observer in self._observers:
            observer.add(layer, ids, weights)
