"""A checkpoint's tokenizer, and the bytes of single tokens: the library decodes whole texts only."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from flashmoe.engines.transformers.library import quiet
from flashmoe.errors import ModelError

_FILES = ("tokenizer*", "*.model", "vocab*")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of the checkpoint in a folder; None where it has none. Raises ModelError where it is damaged."""
    from transformers import AutoTokenizer

    if not any(found for pattern in _FILES for found in folder.glob(pattern)):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library, and those under it, raise what they like
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder}: the tokenizer cannot be read ({reason})") from None


def token_bytes(tokenizer: Any, token: int, special: bool) -> bytes:
    """The bytes that `token` stands for; for a control token none, or with `special` its name."""
    added = tokenizer.added_tokens_decoder.get(token)
    if added is not None:
        return b"" if added.special and not special else str(added.content).encode()
    text = tokenizer.convert_ids_to_tokens(token)
    if text is None:
        return b""
    if _is_byte_level(tokenizer):
        table = _byte_of()
        if all(character in table for character in text):
            return bytes(table[character] for character in text)
    byte = _BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else str(text).replace("▁", " ").encode()


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether tokens are written in GPT-2's alphabet of bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


@cache
def _byte_of() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
