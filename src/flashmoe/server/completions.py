"""/v1/chat/completions and /v1/completions: from a request to jobs, and from their parts to an answer."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from flashmoe.errors import FlashMoEError
from flashmoe.server import openai
from flashmoe.server.answers import PING_SECONDS, Answer, Choice, ClientGone, Part
from flashmoe.server.conversation import Prepared, Preparer
from flashmoe.server.openai import Envelope
from flashmoe.server.scheduler import Job, Scheduler
from flashmoe.server.schema import ChatRequest, CompletionRequest, SamplingFields
from flashmoe.server.text import TextStream
from flashmoe.server.tools import CallReader

_log = logging.getLogger("flashmoe.server")
MOST_CHOICES = 64  # of one request: prompts times n

#: Makes a choice of an answer: (part, whether it is one event of a stream).
Shape = Callable[[Part, bool], dict[str, Any]]


def completions(scheduler: Scheduler, preparer: Preparer, model: str) -> APIRouter:
    """The routes. `model`: the name that answers carry."""
    router = APIRouter()
    engine = scheduler.model.engine

    def submit(
        request: Request,
        prepared: Sequence[Prepared],
        fields: SamplingFields,
        max_tokens: int | None,
        logprobs: int | None,
    ) -> Answer:
        answer = Answer(scheduler)
        jobs: list[Job] = []
        for prompt in prepared:
            for i in range(fields.n or 1):
                special = prompt.form is not None
                text = TextStream(lambda t, special=special: engine.piece(t, special), fields.stops)  # type: ignore[misc]
                jobs.append(
                    Job(
                        prompt.prompt,
                        Choice(len(jobs), answer, text, CallReader(prompt.form)),
                        max_tokens=-1 if max_tokens is None else max_tokens,
                        sampling=fields.sampling(i),
                        rules=prompt.rules(),
                        logprobs=logprobs,
                    )
                )
        answer.start(request, jobs)
        return answer

    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        prepared = await run_in_threadpool(preparer.chat, body)
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        wanted = (body.top_logprobs or 0) if body.logprobs else None
        answer = submit(request, [prepared], body, limit, wanted)

        def shape(part: Part, chunk: bool) -> dict[str, Any]:
            scores = openai.chat_logprobs(part.tokens, engine.piece) if body.logprobs else None
            return openai.chat_choice(part, scores, chunk)

        envelope = Envelope("chat.completion", "chatcmpl", model)
        if not body.stream:
            return await whole(answer, envelope, shape)
        first = [
            {
                "index": i,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            for i in range(body.n or 1)
        ]
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return stream(answer, envelope, shape, with_usage, first)

    @router.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, or each of several."""
        prompts = each_text(body.prompt)
        if len(prompts) * (body.n or 1) > MOST_CHOICES:
            return JSONResponse(
                openai.error(f"at most {MOST_CHOICES} choices in one request", "invalid_request_error", "n"),
                400,
            )
        prepared = [await run_in_threadpool(preparer.text, body, prompt) for prompt in prompts]
        answer = submit(request, prepared, body, body.max_tokens, body.logprobs)
        given = [0] * len(answer.jobs)

        def shape(part: Part, chunk: bool) -> dict[str, Any]:
            scores = None
            if body.logprobs is not None:
                scores = openai.text_logprobs(part.tokens, engine.piece, given[part.index])
            given[part.index] += len(part.text)
            choice = {"index": part.index, "text": part.text, "logprobs": scores}
            return {**choice, "finish_reason": part.reason}

        envelope = Envelope("text_completion", "cmpl", model)
        if not body.stream:
            return await whole(answer, envelope, shape)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return stream(answer, envelope, shape, with_usage)

    return router


async def whole(answer: Answer, envelope: Envelope, shape: Shape) -> Response:
    """An answer in one piece. Raises what made a job fail."""
    parts: list[list[Part]] = [[] for _ in answer.jobs]
    try:
        async for part in answer.parts():
            if part:
                parts[part.index].append(part)
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    choices = [
        Part(
            i,
            "".join(p.text for p in found),
            [token for p in found for token in p.tokens],
            [call for p in found for call in p.calls],
            found[-1].reason,
        )
        for i, found in enumerate(parts)
    ]
    return JSONResponse(
        envelope.wrap([shape(choice, False) for choice in choices], openai.usage(answer.jobs))
    )


def stream(
    answer: Answer,
    envelope: Envelope,
    shape: Shape,
    with_usage: bool,
    first: list[dict[str, Any]] | None = None,
) -> Response:
    """An answer as server-sent events. first: choices of an event of their own at the beginning."""

    async def events() -> AsyncIterator[str]:
        for choice in first or []:
            yield _event(envelope.wrap([choice], chunk=True))
        try:
            async for part in answer.parts(PING_SECONDS):
                if part is None:
                    yield ": still here\n\n"
                elif part.reason is None:
                    yield _event(envelope.wrap([shape(part, True)], chunk=True))
                else:  # what is left to say, and then the reason in an event of its own
                    if part.text or part.tokens or part.calls:
                        yield _event(envelope.wrap([shape(replace(part, reason=None), True)], chunk=True))
                    ending = Part(part.index, "", reason=part.reason)
                    choice = shape(ending, True) | {"finish_reason": openai.finish_reason(part)}
                    yield _event(envelope.wrap([choice], chunk=True))
            if with_usage:
                yield _event(envelope.wrap([], openai.usage(answer.jobs), chunk=True))
            yield "data: [DONE]\n\n"
        except ClientGone:
            pass
        except FlashMoEError as error:
            yield _event(openai.error(str(error), "server_error"))
        except Exception:
            _log.exception("a request failed")
            yield _event(openai.error("internal error", "server_error"))

    return StreamingResponse(
        events(),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def each_text(prompt: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | Sequence[int]]:
    """Of a request's one text or several."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return prompt  # type: ignore[return-value]
