"""What is asked of loading: checked in one place, before anything is opened."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

import flashmoe
from flashmoe import LoadOptions
from flashmoe.cli.options import ModelOptions
from flashmoe.errors import UsageError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ram": "1GiB", "cache": "50%"}, "not both"),
        ({"ram": 0}, "holds no model"),
        ({"ram": "lots"}, "cannot read the size"),
        ({"cache_ram": "lots"}, "cannot read the size"),
        ({"save_cache_size": "lots"}, "cannot read the size"),
        ({"n_ctx": 0}, "at least 1"),
        ({"n_ubatch": 0}, "at least 1"),
        ({"threads": 0}, "at least 1"),
        ({"parallel": -1}, "at least 1"),
        ({"engine": "vllm"}, "choose from llama.cpp, transformers"),
        ({"vram": "50%"}, "--engine transformers"),
        ({"engine": "transformers", "layout": "repacked"}, "--layout repacked"),
        ({"engine": "transformers", "pooling": "last"}, "embeddings"),
        ({"engine": "transformers", "verify": True}, "--verify"),
        ({"cache_type_k": "f8"}, "choose from f16|unknown type"),
        ({"cache_type_v": "f8"}, "choose from f16|unknown type"),
        ({"layout": "packed"}, "unknown layout"),
        ({"approx": "much"}, "choose cache:LAMBDA"),
        ({"engine": "transformers", "approx": "1", "vram": "50%"}, "leave out --vram"),
    ],
)
def test_what_no_model_can_be_loaded_with(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    """From Python too: the model need not even be there."""
    with pytest.raises(UsageError, match=message):
        LoadOptions(**given)
    with pytest.raises(UsageError, match=message):
        flashmoe.load(tmp_path / "none.gguf", **given)


def test_options_are_given_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="either options or cache"):
        flashmoe.load(tmp_path / "none.gguf", options=LoadOptions(), cache="50%")
    with pytest.raises(TypeError, match="speed"):
        flashmoe.load(tmp_path / "none.gguf", speed=2)
    with pytest.raises(FrozenInstanceError):
        LoadOptions().ram = "1GiB"  # type: ignore[misc]


def test_the_command_line_has_the_same_defaults() -> None:
    """But that it learns: a program of somebody else's leaves nothing behind unasked."""
    assert ModelOptions().load_options() == LoadOptions(learn=True)
    assert ModelOptions(no_learn=True).load_options() == LoadOptions()


def test_every_option_of_the_command_line_arrives() -> None:
    values: dict[str, Any] = {
        "cache": "50%", "policy": "lru", "prefetch": "none", "layout": "plain", "n_ctx": 64, "n_ubatch": 8,
        "threads": 1, "cache_type_k": "q8_0", "cache_type_v": "q4_0", "save_cache": True, "save_cache_size": "1GiB",
        "approx": "cache:0.2", "verify": True,
    }  # fmt: skip
    assert set(values) | {"ram"} == {field.name for field in fields(ModelOptions)} - {"no_learn"}
    made = ModelOptions(**values).load_options(trace=True)
    assert {getattr(made, name) == value for name, value in values.items()} == {True}
    assert (made.trace, made.cache_types) == (True, ("q8_0", "q4_0"))
    assert ModelOptions(ram="1GiB").load_options().ram == "1GiB"
