"""What llama.cpp's server is told beside its model and context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmoe.errors import ModelError
from flashmoe.storage.gguf import read_gguf

_PROJECTOR_BUFFERS = 128 << 20  # beside its weights, for an image
# Options that the server's messages name and that are others here, or are not there
_ADVICE = {
    "Start it with `--embeddings`": "Start it with `--pooling mean` (or last, or cls)",
    " Start it with `--reranking`": "",
}


@dataclass(frozen=True)
class ServerOptions:
    """What the server is told beside its model and context. Names and defaults are llama.cpp's."""

    alias: str = ""
    chat_template: str = ""  # in place of the model's own
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_format: str = "deepseek"  # none, auto, deepseek, deepseek-legacy
    reasoning_budget: int = -1  # tokens of thinking: -1 any, 0 none
    cache_ram_mib: int = 0  # of conversations that no slot holds
    ctx_checkpoints: int = 0  # of each slot, for memories that cannot be cut
    slot_save_path: Path | None = None  # where slots may be saved to and restored from
    mmproj: Path | None = None  # the projector of a model that sees or hears
    sampling: Mapping[str, Any] = field(
        default_factory=dict
    )  # defaults: attributes of common_params_sampling


def projector_bytes(path: Path) -> int:
    """What a projector takes of the memory budget. Raises ModelError where it cannot be read, or is none: the library
    would wait for a pipe, and does not say what is wrong."""
    projector = read_gguf(path)
    if not any(key.startswith("clip.") for key in projector.metadata):
        raise ModelError(
            f"{path}: is no projector, but a GGUF of {projector.architecture or 'something else'}"
        )
    return projector.size + _PROJECTOR_BUFFERS


def in_our_words(message: str) -> str:
    """What the server says of a request, with the names that options have here."""
    for theirs, ours in _ADVICE.items():
        message = message.replace(theirs, ours)
    return message
