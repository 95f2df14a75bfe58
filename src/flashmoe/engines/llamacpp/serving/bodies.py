"""Checks of request bodies that llama.cpp's server would not survive, before it gets them."""

from __future__ import annotations

import json
import re

import numpy as np

DEEPEST = 256  # JSON in JSON; the server walks it by recursion, and some 100,000 levels end the process
TOO_DEEP = f"the JSON is nested more than {DEEPEST} levels deep"

_TEXTS = frozenset(("prompt", "content", "messages", "input", "system"))
_NO_TEXTS = frozenset(("data", "file_data", "multimodal_data", "url"))  # pictures and sounds, amid texts
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def too_deep(body: bytes) -> bool:
    """Whether JSON is nested more than DEEPEST levels deep, or would be if it were well-formed."""
    if body.count(b"[") + body.count(b"{") <= DEEPEST:
        return False
    marks = np.frombuffer(_STRING.sub(b"", body), np.uint8)
    opened, closed = (marks == ord("[")) | (marks == ord("{")), (marks == ord("]")) | (marks == ord("}"))
    return int(np.cumsum(opened.astype(np.int32) - closed.astype(np.int32)).max(initial=0)) > DEEPEST


def longest_text(body: bytes) -> int:
    """Bytes of the longest string that a prompt is made of; 0 in what is no JSON, of which the server says so."""
    try:
        rest = [(json.loads(body), False)]
    except ValueError:
        return 0
    longest = 0
    while rest:
        item, is_text = rest.pop()
        if isinstance(item, dict):
            rest += [
                (inner, is_text or name in _TEXTS) for name, inner in item.items() if name not in _NO_TEXTS
            ]
        elif isinstance(item, list):
            rest += [(inner, is_text) for inner in item]
        elif is_text and isinstance(item, str) and not item.startswith("data:"):
            longest = max(longest, len(item.encode("utf-8", "surrogatepass")))
    return longest


def does_not_fit(bytes_: int, n_ctx: int, most: int) -> str:
    """What is said of a text of more than `most` bytes."""
    return (
        f"the request has a text of {bytes_} bytes; the longest that may fit in the context of {n_ctx} tokens has "
        f"{most}"
    )
