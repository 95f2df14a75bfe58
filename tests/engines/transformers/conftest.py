"""Checkpoints that are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

from tests.engines.transformers.models import make_checkpoint

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """checkpoint("olmoe", torch.float32): the folder of a tiny model, made when first asked for. Not to be changed."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        key = name, dtype
        if key not in made:
            made[key] = make_checkpoint(name, tmp_path_factory.mktemp(name), dtype)
        return made[key]

    return get


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The engine sets torch's number of threads: put it back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
