"""Answers in OpenAI's shapes."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from flashmoe.generation import Token
from flashmoe.server.answers import Part
from flashmoe.server.scheduler import Job

Json = dict[str, Any]


class Envelope:
    """What all parts of one answer share: its id, its time, and the model's name."""

    def __init__(self, kind: str, prefix: str, model: str) -> None:
        """kind: "chat.completion" or "text_completion"."""
        self._kind, self._model = kind, model
        self._id, self._created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())

    def wrap(self, choices: list[Json], usage: Json | None = None, chunk: bool = False) -> Json:
        """The answer, or with `chunk` one event of a stream."""
        kind = f"{self._kind}.chunk" if chunk and self._kind == "chat.completion" else self._kind
        body = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**body, "choices": choices} | ({"usage": usage} if usage else {})


def finish_reason(part: Part) -> str | None:
    """OpenAI's word for why a choice has ended."""
    return "tool_calls" if part.calls and part.reason == "stop" else part.reason


def chat_choice(part: Part, logprobs: Json | None, chunk: bool) -> Json:
    """A whole message, or with `chunk` what is new in it."""
    calls = [call.as_dict() for call in part.calls]
    message: Json
    if chunk:
        message = {"content": part.text} if part.text else {}
        if calls:
            message["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
    else:
        message = {"role": "assistant", "content": part.text or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
    return {
        "index": part.index,
        "delta" if chunk else "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason(part),
    }


def chat_logprobs(tokens: Sequence[Token], piece: Callable[[int], bytes]) -> Json:
    """Of a chat answer."""

    def entry(token: int, logprob: float) -> Json:
        data = piece(token)
        return {
            "token": data.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(data),
        }

    return {
        "content": [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*pair) for pair in token.top]}
            for token in tokens
        ]
    }


def text_logprobs(tokens: Sequence[Token], piece: Callable[[int], bytes], offset: int) -> Json:
    """Of a text completion. offset: characters before the first token."""

    def name(token: int) -> str:
        return piece(token).decode(errors="replace")

    names = [name(token.id) for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [{name(t): _finite(p) for t, p in token.top} for token in tokens],
        "text_offset": [offset + sum(map(len, names[:i])) for i in range(len(names))],
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else -9999.0  # OpenAI's own value for "very unlikely"


def usage(jobs: Sequence[Job]) -> Json:
    """Tokens of an answer's choices, and what they took of the expert cache. Choices of one prompt count it once."""
    prompt = sum({id(job.prompt): len(job.prompt) for job in jobs}.values())
    made = sum(job.made for job in jobs)
    hits, late, misses = (sum(getattr(job.use, n) for job in jobs) for n in ("hits", "late_hits", "misses"))
    decoding = sum(job.ended - job.first_token for job in jobs if job.made > 1)
    waited = [job.first_token - job.submitted for job in jobs if job.first_token]
    later = sum(job.made - 1 for job in jobs if job.made > 1)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": max(job.reused for job in jobs)},
        "flashmoe": {
            "hits": hits,
            "late_hits": late,
            "misses": misses,
            "hit_rate": hits / max(1, hits + late + misses),
            "bytes_read": sum(job.use.bytes for job in jobs),
            "stall_seconds": sum(job.use.stall_seconds for job in jobs),
            "queue_seconds": max(job.started - job.submitted for job in jobs),
            "first_token_seconds": max(waited, default=None),
            "tokens_per_s": later / decoding if decoding > 0 else None,
        },
    }


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    """OpenAI's error object. kind: invalid_request_error, authentication_error, server_error, ..."""
    message = message.encode(errors="replace").decode()  # it may repeat half a character of the request
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
