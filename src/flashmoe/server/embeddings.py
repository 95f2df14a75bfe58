"""/v1/embeddings: texts as vectors. They take turns with the other requests, one after the other."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray

from flashmoe.embedding import Embedding, embedding_tokens
from flashmoe.errors import UsageError
from flashmoe.generation import Token
from flashmoe.server import openai
from flashmoe.server.answers import Answer, ClientGone, Part
from flashmoe.server.completions import each_text
from flashmoe.server.scheduler import Job, Scheduler
from flashmoe.server.schema import EmbeddingRequest


class _Waits:
    """Listens to the one job of an answer."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def token(self, token: Token) -> bool:
        raise AssertionError("an embedding makes no tokens")

    def done(self, job: Job) -> None:
        self._answer.put(Part(0, "", reason=job.outcome))

    def failed(self, error: BaseException) -> None:
        self._answer.put(error)


def embeddings(scheduler: Scheduler, model: str) -> APIRouter:
    """The route. `model`: the name that answers carry."""
    router = APIRouter()
    engine = scheduler.model.engine

    @router.post("/v1/embeddings")
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        """Embed a text, or each of several."""
        if body.dimensions not in (None, engine.n_embd):
            raise UsageError(f"dimensions: this model's embeddings have {engine.n_embd}")
        texts = [await run_in_threadpool(embedding_tokens, engine, text) for text in each_text(body.input)]
        jobs: list[Job] = []
        for tokens in texts:
            answer = Answer(scheduler)
            job = Job(tokens, _Waits(answer), embed=True)
            answer.start(request, [job])
            try:
                async for _ in answer.parts():
                    pass
            except ClientGone:
                return Response(status_code=499)  # nobody reads it
            jobs.append(job)
        usage = openai.usage(jobs)
        return JSONResponse(
            {
                "object": "list",
                "data": [_entry(i, job, body.encoding_format) for i, job in enumerate(jobs)],
                "model": model,
                "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens", "flashmoe")},
            }
        )

    return router


def _entry(index: int, job: Job, form: str | None) -> dict[str, Any]:
    assert isinstance(job.generation, Embedding)
    vector: NDArray[np.float32] = job.generation.vector
    packed = base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else None
    return {"object": "embedding", "index": index, "embedding": packed or vector.tolist()}
