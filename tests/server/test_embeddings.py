"""/v1/embeddings through the official client."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

import flashmoe
from tests.server.process import ServerProcess, serving

TEXTS = ["The sea", "The moon and the stars", "word " * 60]


def test_vectors_are_those_of_the_library(client: OpenAI, tool_model: Path) -> None:
    with flashmoe.load(tool_model, cache="20%", pooling="mean", prefetch="none", threads=1) as model:
        expected = [model.embed(text) for text in TEXTS]
        tokens = model.engine.tokenize(TEXTS[0])
    for form in ("float", "base64", openai.NOT_GIVEN):
        answer = client.embeddings.create(model="any", input=TEXTS, encoding_format=form)  # type: ignore[arg-type]
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        for entry, vector in zip(answer.data, expected, strict=True):
            packed: Any = entry.embedding  # the client unpacks only what it has asked to be packed
            values = np.frombuffer(base64.b64decode(packed), "<f4") if form == "base64" else packed
            assert np.array(values, np.float32).tobytes() == vector.tobytes()
    usage: Any = answer.usage
    assert usage.prompt_tokens == usage.total_tokens > 60
    assert usage.flashmoe["hits"] > 0
    one = client.embeddings.create(model="any", input=tokens, dimensions=len(expected[0]))
    assert np.array(one.data[0].embedding, np.float32).tobytes() == expected[0].tobytes()


def test_they_take_turns_with_answers(client: OpenAI) -> None:
    """Neither changes the other."""

    def embed(_: int) -> list[float]:
        return client.embeddings.create(model="any", input=TEXTS).data[1].embedding

    def chat(_: int) -> str:
        answer = client.completions.create(model="any", prompt="The sea", max_tokens=24, temperature=0)
        return answer.choices[0].text

    vector, text = embed(0), chat(0)
    with ThreadPoolExecutor(6) as pool:
        vectors, texts = pool.map(embed, range(6)), pool.map(chat, range(6))
        assert all(other == vector for other in vectors)
        assert set(texts) == {text}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": []}, "input"),
        ({"input": [10**6]}, "token ids"),
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"input": "word " * 3000}, "the context 512"),
    ],
)
def test_mistakes(client: OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.embeddings.create(model="any", **options)
    assert caught.value.type == "invalid_request_error"


def test_model_without_pooling(demo: Path) -> None:
    with serving(demo, "--cache", "50%") as server, server.client() as other:
        with pytest.raises(openai.BadRequestError, match="--pooling"):
            other.embeddings.create(model="any", input="x")
        assert other.completions.create(model="any", prompt="x", max_tokens=1).usage


def test_unknown_fields_are_ignored(server: ServerProcess) -> None:
    body = {"input": "x", "user": "somebody", "encoding_format": "float"}
    assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 200
