"""From a model's files to an engine that lacks only its pool: one module for each kind of files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.engines.base import Engine
from flashmoe.runtime.budget import Conversations
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.reader import ExpertReader


@dataclass(frozen=True)
class LoadOptions:
    """What `flashmoe.load` was asked for, as far as opening a model goes."""

    model: str | Path
    limit: int  # of the whole process, in bytes; 0: the pool's size is given
    cache: str | None  # the pool's size
    vram: str | None  # the pool's on a GPU, which computes then
    n_ctx: int | None
    n_ubatch: int
    threads: int
    all_logits: bool
    #: Conversations that the server holds at once, 0: as many as fit; None: one, and it is not served to others.
    parallel: int | None
    cache_types: tuple[str, str]  # of K and V
    cache_ram: int | None  # bytes for conversations that wait; None: a share
    projector_bytes: int  # that the server will load
    pooling: str
    layout: str
    verify: bool
    policy: Callable[[], EvictionPolicy]  # another one of the kind that was asked for
    #: Raises PolicyError where the policy is not for this model.
    check: Callable[[ExpertCatalog], None]
    #: To be called before memory is counted; the bytes that are promised to others.
    prepare: Callable[[ExpertCatalog], int]
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
