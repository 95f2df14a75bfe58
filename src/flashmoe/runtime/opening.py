"""The stages of loading: what is derived from the options, and what opening a file returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashmoe.engines.base import Engine
from flashmoe.runtime.budget import Conversations
from flashmoe.runtime.chosen import Chosen
from flashmoe.runtime.options import LoadOptions
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.reader import ExpertReader


@dataclass(frozen=True)
class Loading:
    """A model that is being loaded."""

    model: str | Path
    options: LoadOptions
    limit: int  # of the whole process, in bytes; 0: the pool's size is given
    threads: int
    projector_bytes: int  # that the server will load
    chosen: Chosen
    progress: Callable[[int, int], None]  # bytes loaded, of how many


@dataclass(frozen=True)
class Opened:
    """An engine with its dense weights, and what its pool is to be."""

    engine: Engine
    catalog: ExpertCatalog
    reader: ExpertReader
    slots: list[int]  # of each size group
    layout: str  # of the weights, for reports
    conversations: Conversations
