"""Whether a model's experts are still what they were: hashes every slice, once to note it, later to compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe.storage.checksums import (
    checksums_path,
    differences,
    find_checksums,
    no_checksums,
    slices_of,
    take_checksums,
    write_checksums,
)
from flashmoe.storage.hub import read_catalog
from flashmoe.storage.pack import find_pack


@dataclass(frozen=True)
class Verdict:
    """What `verify` has found. damaged: (layer, expert, tensor) of every slice that differs from its checksum."""

    model: Path
    checksums: Path
    written: bool  # the checksums have been taken just now: there was nothing to compare with
    total_experts: int
    read_bytes: int
    seconds: float
    damaged: tuple[tuple[int, int, str], ...]
    pack: Path | None  # compared with the checksums that it was written with
    pack_damaged: tuple[tuple[int, int, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """As in `flashmoe verify --json`."""

        def named(slices: tuple[tuple[int, int, str], ...]) -> list[dict[str, Any]]:
            return [{"layer": layer, "expert": expert, "tensor": name} for layer, expert, name in slices]

        return {
            **vars(self),
            "model": str(self.model),
            "checksums": str(self.checksums),
            "pack": str(self.pack) if self.pack else None,
            "damaged": named(self.damaged),
            "pack_damaged": named(self.pack_damaged),
        }


def verify(model: str | Path, progress: Callable[[str, int, int], None] = lambda *_: None) -> Verdict:
    """Hash every expert slice of a model, and compare with the checksums taken earlier, or keep them if there are none.

    They are kept in MODEL.flashsums beside the model. A pack file (`flashmoe pack`) has its own and is compared, too.

    Args:
        model: path of a GGUF (or of the first file of a split set), "demo", or "hf:organisation/repository[:file]".
        progress: called with "verify", the bytes read, and of how many.

    Raises:
        ModelError: the model, its checksums or its pack cannot be used.
        ReadError: the model cannot be read.
        FlashMoEError: the checksums cannot be written.
    """
    catalog = read_catalog(model)
    known, pack = find_checksums(catalog), find_pack(catalog)
    layers = {p.tensor.name: i for i, layer in enumerate(catalog.layers) for p in layer.weights}
    total = catalog.expert_bytes + (pack.size if pack else 0)
    started = time.monotonic()
    found = no_checksums(catalog)
    take_checksums(
        catalog.gguf.files, slices_of(catalog), found, lambda done: progress("verify", done, total)
    )
    if known is None:
        write_checksums(catalog, found)
    at_fault = (
        pack.damaged(catalog, lambda n: progress("verify", catalog.expert_bytes + n, total)) if pack else []
    )

    def numbered(slices: list[tuple[str, int]]) -> tuple[tuple[int, int, str], ...]:
        return tuple(sorted((layers[name], expert, name) for name, expert in slices))

    return Verdict(
        model=catalog.gguf.files[0],
        checksums=checksums_path(catalog.gguf),
        written=known is None,
        total_experts=catalog.total_experts,
        read_bytes=total,
        seconds=time.monotonic() - started,
        damaged=numbered(differences(found, known) if known else []),
        pack=pack.path if pack else None,
        pack_damaged=numbered(at_fault),
    )
