"""Metadata that the library is told in place of the file's, and its warnings about the file."""

from __future__ import annotations

import ctypes as C
import re
from collections.abc import Mapping
from typing import Any

from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import warn
from flashmoe.storage.gguf import GGUF

_INT, _BOOL = 0, 2  # LLAMA_KV_OVERRIDE_TYPE_*
_ADD_END = "tokenizer.ggml.add_eos_token"
_TRAINED, _ORIGINAL = "context_length", "rope.scaling.original_context_length"
# Of the vocabulary: others, of tensors that it does not use, are no news
_ON_TEXT = re.compile(r"token|vocab|special|quality|regenerat", re.IGNORECASE)
_ON_TENSORS = re.compile(r"tensor", re.IGNORECASE)
_MOST = 3  # warnings that are quoted


class _Value(C.Union):
    _fields_ = [("whole", C.c_int64), ("flag", C.c_bool), ("text", C.c_char * 128)]


class Override(C.Structure):
    """llama_model_kv_override"""

    _fields_ = [("tag", C.c_int), ("key", C.c_char * 128), ("value", _Value)]


def told_otherwise(gguf: GGUF, *, n_ctx: int | None, embeds: bool) -> dict[str, Any]:
    """Metadata that the library is to take in place of the file's.

    A file may ask for an end token behind every text, which embeddings want (`embeds`): an answer to such a
    prompt is none. And the library's server cuts a context to what the model was trained for, where more was asked for
    (`n_ctx`); YaRN goes on from what the file says.
    """
    changed: dict[str, Any] = {}
    if not embeds and gguf.metadata.get(_ADD_END) is True:
        changed[_ADD_END] = False
    trained = gguf.arch_value(_TRAINED)
    if n_ctx is not None and isinstance(trained, int) and n_ctx > trained:
        changed[f"{gguf.architecture}.{_TRAINED}"] = n_ctx
        if gguf.arch_value(_ORIGINAL) is None:
            changed[f"{gguf.architecture}.{_ORIGINAL}"] = trained
    return changed


def overrides(values: Mapping[str, Any]) -> C.Array[Override]:
    """Values of keys as the library takes them, a list that ends with an empty key."""
    entries = (Override * (len(values) + 1))()
    for entry, (key, value) in zip(entries, values.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, bool):
            entry.tag, entry.value.flag = _BOOL, value
        else:
            entry.tag, entry.value.whole = _INT, value
    return entries


def warn_of_text(lib: Library, gguf: GGUF) -> None:
    """Pass on what the library has warned of while it loaded the vocabulary: answers may be bad for that reason."""
    lines = (re.sub(r"^\w+: *", "", line).strip("* ") for line in lib.warnings)
    found = list(
        dict.fromkeys(line for line in lines if _ON_TEXT.search(line) and not _ON_TENSORS.search(line))
    )
    if found:
        more = f" (and {len(found) - _MOST} more, with -v)" if len(found) > _MOST else ""
        warn(
            f"{gguf.files[0]}: llama.cpp warns of its tokenizer or end of text: {'; '.join(found[:_MOST])}{more}; a "
            "newer conversion of the model may be better"
        )
