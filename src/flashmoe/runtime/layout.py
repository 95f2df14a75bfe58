"""Which layouts the weights get: the file's, or those that the engine's fastest kernels want."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flashmoe.errors import LibraryError, ModelError, UsageError

if TYPE_CHECKING:
    from flashmoe.storage.catalog import (
        ExpertCatalog,  # imports numpy, which the command line's help can do without
    )

_log = logging.getLogger(__name__)

#: `plain`: the file's. `repacked`: those that llama.cpp's default chooses for this processor.
LAYOUTS = (AUTO, PLAIN, REPACKED) = ("auto", "plain", "repacked")
#: As a report says it: repacked, and read so from a pack file.
PACKED = "packed"

# Repacking what is read costs more than the faster kernels give back, unless most experts stay (docs/repacking.md)
_PAYS_FROM = 0.75  # of the experts in memory


def check_layout(name: str) -> None:
    """Raises UsageError where there is no such layout."""
    if name not in LAYOUTS:
        raise UsageError(f"unknown layout {name!r}: choose from {', '.join(LAYOUTS)}")


def choose_layout(
    asked: str, catalog: ExpertCatalog, share: float, packed: bool, kernels_repack: bool = True
) -> str:
    """PLAIN or REPACKED; `share` of the experts will be in memory, `packed`: there is a pack file.

    kernels_repack: whether the kernels in use have passed their self-test with repacked layouts. Raises ModelError
    where repacked layouts are asked for and the engine computes wrong results with them, LibraryError where it fails.
    """
    # llama.cpp's repacked product with ids loses rows where a token picks the same expert twice (its pull request
    # 26310): GroveMoE's small experts, each shared by a group of large ones, are picked so
    wrong = any("_chexps." in name for name in catalog.gguf.tensors)
    if asked == REPACKED and wrong:
        raise ModelError(
            f"{catalog.gguf.files[0]}: llama.cpp computes wrong results for this architecture with repacked weights; "
            "use --layout plain"
        )
    if asked == REPACKED and not kernels_repack:
        raise LibraryError(
            "the kernels in use fail with repacked weights (`flashmoe engine check` says how); use --layout plain, or "
            "other kernels: `flashmoe engine list`"
        )
    if asked != AUTO:
        return asked
    chosen = REPACKED if (packed or share >= _PAYS_FROM) and kernels_repack and not wrong else PLAIN
    _log.info(
        "layout %s: %s%.0f %% of the experts in memory, repacking pays from %.0f %%%s",
        chosen,
        "a pack file, " if packed else "",
        100 * share,
        100 * _PAYS_FROM,
        ", but llama.cpp's repacked kernels are wrong for this architecture"
        if wrong
        else ("" if kernels_repack else ", but the kernels in use fail with repacked weights"),
    )
    return chosen
