"""Makes and checks pack files: the engine says how experts are repacked, the storage writes them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from flashmoe.engines.llamacpp.repack import placed
from flashmoe.engines.llamacpp.tested import tested_library
from flashmoe.errors import ModelError
from flashmoe.runtime.layout import REPACKED, choose_layout
from flashmoe.runtime.model import Progress
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.hub import read_catalog
from flashmoe.storage.pack import Pack, find_pack, write_pack


def make_pack(model: str | Path, progress: Progress = lambda *_: None) -> tuple[Pack, bool]:
    """The model's pack file, and whether it was written now: one that is there, whole, and fits is kept.

    progress: called with "pack" or "check", the bytes done and their number. Raises ModelError (nothing to pack, or
    wrong results with repacked weights), LibraryError, FlashMoEError (no room, no right to write) and ReadError.
    """
    catalog = read_catalog(model)
    library = tested_library()
    choose_layout(REPACKED, catalog, 1.0, packed=True, kernels_repack=library.repacks)
    files = [DirectFile(path) for path in catalog.gguf.files]
    try:
        with placed(library, catalog) as repacked:
            there = _usable(repacked, files, progress)
            return (
                (there, False)
                if there
                else (write_pack(repacked, files, lambda *n: progress("pack", *n)), True)
            )
    finally:
        for file in files:
            file.close()


def _usable(catalog: ExpertCatalog, files: list[DirectFile], progress: Progress) -> Pack | None:
    """The pack that is there, if it is good."""
    try:
        pack = find_pack(catalog)
        if pack is None:
            return None
        with closing(DirectFile(pack.path)) as file:
            pack.apply(catalog, [*files, file])
    except ModelError:
        return None
    return None if pack.damaged(catalog, lambda done: progress("check", done, pack.size)) else pack
