"""What a file says of its text and its context: beginnings and ends of prompts, warnings, more context than trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.errors import FlashMoEWarning
from tests.cli.runner import flashmoe as command
from tests.conftest import Tiny
from tests.serving.copies import copy

END, START = 256, 257  # <|endoftext|>, <|im_start|>
ADD_END, ADD_START = "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_bos_token"
WITH = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
WITHOUT = "{% for m in messages %}{{ m.content }}{% endfor %}"
GREEDY = SamplingParams(temperature=0)


def load(path: Path, lib: Library, **more: Any) -> flashmoe.Model:
    return flashmoe.load(path, cache="100%", threads=1, prefetch="none", library=lib, **more)


def prompt_tokens(path: Path, lib: Library, text: str) -> list[int]:
    """The tokens that a chat's prompt is evaluated as."""
    with load(path, lib, trace=True) as model:
        list(model.chat([{"role": "user", "content": text}], max_tokens=1))
        assert model.recorder
        return model.recorder.trace().token_id.tolist()


@pytest.mark.parametrize(
    ("template", "adds", "expected"),
    [
        (WITH, False, [START, 104, 105]),  # only the template writes it
        (WITH, True, [START, 104, 105]),
        (WITH, None, [START, 104, 105]),
        (WITHOUT, True, [START, 104, 105]),
        (WITHOUT, False, [104, 105]),
    ],
)
def test_a_beginning_is_read_once(
    template: str, adds: bool | None, expected: list[int], tiny: Tiny, tmp_path: Path, lib: Library
) -> None:
    path = copy(
        tiny("qwen3moe"), tmp_path / "m.gguf", drop=(ADD_START, "tokenizer.chat_template"),
        add={"tokenizer.chat_template": template, **({} if adds is None else {ADD_START: adds})},
        tokenizer__ggml__bos_token_id=START,
    )  # fmt: skip
    assert prompt_tokens(path, lib, "hi") == expected


def test_an_end_behind_the_prompt_is_for_embeddings_only(tiny: Tiny, tmp_path: Path, lib: Library) -> None:
    plain = tiny("qwen3moe")
    path = copy(plain, tmp_path / "m.gguf", add={ADD_END: True})
    assert prompt_tokens(path, lib, "hi") == prompt_tokens(plain, lib, "hi")
    with load(plain, lib, n_ctx=64) as one, load(path, lib, n_ctx=64) as other:
        texts = ["".join(m.generate("hello", max_tokens=8, sampling=GREEDY)) for m in (one, other)]
        assert texts[0] == texts[1]
    with load(path, lib, n_ctx=64, pooling="last") as model:
        assert model.engine.tokenize("hi") == [104, 105, END]


def test_control_tokens_in_a_prompt_of_the_command_line(tiny: Tiny, tmp_path: Path) -> None:
    """As llama.cpp's own command line reads them."""
    result = command(
        "run", tiny("qwen3moe"), "-p", "<|im_start|>hi", "-n", 1, "-t", 1, "-c", 64, "--json", tmp_path / "r"
    )
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "r").read_text())["prefill"]["tokens"] == 3


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("tokenizer.ggml.pre", "missing pre-tokenizer.*GENERATION QUALITY WILL BE DEGRADED"),
        ("tokenizer.ggml.eos_token_id", "end of text: special_eos_id"),
    ],
)
def test_what_the_library_warns_of(key: str, message: str, tiny: Tiny, tmp_path: Path, lib: Library) -> None:
    path = copy(tiny("qwen3moe"), tmp_path / "m.gguf", drop=(key,))
    with pytest.warns(FlashMoEWarning, match=message):
        load(path, lib, n_ctx=64).close()


def test_nothing_to_warn_of(tiny: Tiny, lib: Library) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tiny("glm4moe"), lib, n_ctx=64).close()  # its tensors for token prediction are not used


YARN = {"ARCH.rope.scaling.type": "yarn", "ARCH.rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    "rope",
    [{}, YARN, {**YARN, "ARCH.rope.scaling.original_context_length": 100}],
    ids=["none", "yarn", "original"],
)
def test_more_context_than_trained(rope: dict[str, Any], tiny: Tiny, tmp_path: Path, lib: Library) -> None:
    """A warning; the logits are those of the library's own, and its server takes as many tokens."""
    path = copy(tiny("qwen3moe"), tmp_path / "m.gguf", add=rope)
    tokens = [97 + i % 20 for i in range(600)]
    with pytest.warns(FlashMoEWarning, match="1024 tokens is more than this model was trained for .512."):
        model = load(path, lib, n_ctx=1024, n_ubatch=300, layout="plain")
    with model:
        greedy = SamplingParams(temperature=0, ignore_eos=True)
        assert len(list(model.generate(tokens, max_tokens=3, sampling=greedy))) > 0
        assert model.server().ask("GET", "/slots")[0]["n_ctx"] == 1024
        for start in (0, 300):
            model.decoder.evaluate(tokens[start : start + 300], decode=False)
        logits = model.decoder.logits()
    stock = StockModel(lib, path)
    context = stock.context(n_ctx=1024, n_ubatch=300, threads=1)
    for start in (0, 300):
        context.decode(tokens[start : start + 300])
    assert np.array_equal(logits, context.logits())
    context.close()
    stock.close()


def test_plan_and_run_agree_on_a_context(tiny: Tiny) -> None:
    for verb in (("plan", tiny("qwen3moe"), "--ram", "1GiB"), ("run", tiny("qwen3moe"), "-p", "a", "-n", 1)):
        with pytest.warns(FlashMoEWarning, match="more than this model was trained for"):
            assert command(*verb, "-t", 1, "-c", 600).status == 0
