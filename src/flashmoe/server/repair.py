"""Responses of the backend that are changed on the way: errors that say too little, pages for clients without gzip."""

from __future__ import annotations

import gzip
import json

from flashmoe.server.errors import Refusal

COMPUTE_ERROR = b"Compute error."  # the library's words for any evaluation that failed
_NOT_FOUND = b'"File Not Found"'  # the backend's words for a route that it does not have
_CODES = {"exceed_context_size_error": "context_length_exceeded"}  # OpenAI's word for it
RawHeaders = list[tuple[bytes, bytes]]


def explained(data: bytes, reason: str) -> bytes:
    """JSON, or events of it, that say why an evaluation failed, where that is known."""
    return data.replace(COMPUTE_ERROR, json.dumps(reason)[1:-1].encode()) if reason else data


def as_openai(body: bytes) -> bytes:
    """An error of the backend with the fields that OpenAI's clients read: `param`, and `code` where it has a word."""
    try:
        found = json.loads(body)
        error = found["error"]
        error.setdefault("param", None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return body
    error["code"] = _CODES.get(error.get("type"), error.get("code"))
    return json.dumps(found).encode()


def no_such_route(method: str, path: str, body: bytes) -> bytes:
    """The body of a 404: what there is, where the backend says only that there is no such file."""
    if _NOT_FOUND not in body:
        return body
    message = (
        f"there is no {method} {path}: OpenAI's routes begin with /v1/ (/v1/chat/completions, /v1/responses, "
        "/v1/embeddings, /v1/models), Anthropic's is /v1/messages"
    )
    return Refusal(404, message).body(path)


def unpacked(headers: RawHeaders, body: bytes) -> tuple[RawHeaders, bytes]:
    """A compressed response for a client that takes none."""
    return [(name, value) for name, value in headers if name != b"content-encoding"], gzip.decompress(body)


def with_length(headers: RawHeaders, body: bytes) -> RawHeaders:
    """Headers for a body of another length."""
    kept = [(name, value) for name, value in headers if name != b"content-length"]
    return [*kept, (b"content-length", str(len(body)).encode())]
