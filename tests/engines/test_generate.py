"""Generation through the Python API: text, sampling, chat, and what an error in the middle leaves behind."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.control import PYTHON_CALLBACK
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.serving.options import ServerOptions
from flashmoe.errors import FlashMoEError, ReadError, UsageError
from flashmoe.storage.direct import DirectFile
from tests.conftest import Tiny
from tests.engines.reference import Reference, StockServer, closing

GREEDY = SamplingParams(temperature=0)
PROMPT = "the sky is hello world and so on"


def opened(path: Path | str, lib: Library, cache: str = "30%", **options: Any) -> flashmoe.Model:
    return flashmoe.load(path, cache=cache, threads=1, library=lib, n_ctx=256, **options)


@pytest.fixture(scope="module")
def model(lib: Library, tiny: Tiny) -> Iterator[flashmoe.Model]:
    """A model whose pool holds a part of the experts, with a chat template."""
    with opened(tiny("llama"), lib) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def llama(lib: Library, tiny: Tiny) -> Iterator[Reference]:
    yield from closing(Reference(lib, tiny("llama")))


def text_of(
    model: flashmoe.Model, prompt: str = PROMPT, n: int = 24, sampling: SamplingParams = GREEDY
) -> str:
    return "".join(model.generate(prompt, max_tokens=n, sampling=sampling))


def text_of_tokens(model: flashmoe.Model, prompt: list[int], n: int) -> str:
    return "".join(model.generate(prompt, max_tokens=n, sampling=GREEDY))


def stock_text(model: flashmoe.Model, reference: Reference, prompt: str = PROMPT, n: int = 24) -> str:
    """What a greedy loop around the stock engine writes."""
    tokens = reference.greedy(model.engine.tokenize(prompt), n, model.engine.n_ubatch, n_ctx=256)
    ends = [i for i, token in enumerate(tokens) if model.engine.is_end(token)]
    made = tokens[: ends[0]] if ends else tokens
    return b"".join(model.engine.piece(token) for token in made).decode("utf-8", errors="replace")


def test_greedy_text_is_stock_text_at_every_pool_size(lib: Library, tiny: Tiny, llama: Reference) -> None:
    for cache in ("1", "60%", "100%"):
        with opened(tiny("llama"), lib, cache, n_ubatch=4) as model:
            text = text_of(model)
            assert text == stock_text(model, llama)
            assert text


def test_demo_text_is_the_same_at_every_pool_size(lib: Library, demo: Path) -> None:
    texts = []
    for cache in ("1", "10%", "100%"):
        with opened("demo", lib, cache, n_ubatch=1) as model:
            texts.append(text_of(model, "The history of the lighthouse", 24))
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].strip()


def test_same_seed_same_text(model: flashmoe.Model) -> None:
    def draw(seed: int) -> str:
        return text_of(
            model, sampling=SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
        )

    first = draw(3)
    assert draw(3) == first
    assert len({draw(seed) for seed in range(3, 7)}) > 1


def test_top_k_of_one_is_greedy(model: flashmoe.Model) -> None:
    assert text_of(model, sampling=SamplingParams(temperature=2.0, top_k=1, seed=1)) == text_of(model)


def test_text_streams_token_by_token(model: flashmoe.Model) -> None:
    pieces = model.generate(PROMPT, max_tokens=12, sampling=GREEDY)
    first = next(pieces)
    made = model.telemetry.decode.tokens
    rest = list(pieces)
    assert model.telemetry.decode.tokens > made  # the first piece was there before the last token
    assert first + "".join(rest) == text_of(model, n=12)


def test_prompt_may_be_token_ids(model: flashmoe.Model) -> None:
    tokens = model.engine.tokenize(PROMPT)
    assert "".join(model.generate(tokens, max_tokens=8, sampling=GREEDY)) == text_of(model, n=8)


def test_no_tokens_are_wished(model: flashmoe.Model) -> None:
    before = model.telemetry.prefill.tokens, model.telemetry.decode.tokens
    assert list(model.generate(PROMPT, max_tokens=0)) == []
    assert (model.telemetry.prefill.tokens, model.telemetry.decode.tokens) == before


def test_answer_that_fills_the_context(lib: Library, tiny: Tiny) -> None:
    """As with the stock server; the own loop goes on to the last cell."""
    greedy = SamplingParams(temperature=0, ignore_eos=True)
    prompt = [65] * 246
    with opened(tiny("llama"), lib, "100%", n_ubatch=8) as model, StockServer(tiny("llama"), model) as stock:
        event = stock.complete({"prompt": prompt, "temperature": 0, "ignore_eos": True})[-1]
        model.telemetry.decode.tokens = 0
        request = {"prompt": prompt, "cache_prompt": False, **greedy.request()}
        last = list(model.server().complete(request))[-1]
        assert last["choices"][0]["finish_reason"] == event["choices"][0]["finish_reason"] == "length"
        assert last["usage"] == event["usage"]
        assert last["usage"]["total_tokens"] in (255, 256)
        assert model.telemetry.decode.tokens == last["usage"]["completion_tokens"] - 1
        generation = model.start(prompt, sampling=GREEDY)
        while not generation.finished:
            generation.step()
        generation.close()
        assert generation.finished == "stop" or model.engine.past() == model.engine.n_ctx == 256


def test_prompt_that_fills_the_context_exactly(model: flashmoe.Model) -> None:
    """The server wants room for a token after it; the own loop does not."""
    list(model.generate([66] * 255, sampling=GREEDY))
    with pytest.raises(UsageError, match=r"256 tokens\).* context .*256 tokens.*\(-c\)"):
        list(model.generate([66] * 256, sampling=GREEDY))
    with pytest.raises(UsageError, match="257 tokens, the context 256"):
        list(model.generate([66] * 257))
    list(model.start([66] * 256, sampling=GREEDY).stream())
    assert model.engine.past() == 256
    list(model.generate([66] * 255, sampling=GREEDY))


def test_empty_prompt(model: flashmoe.Model) -> None:
    with pytest.raises(UsageError, match="empty"):
        list(model.generate(""))
    with pytest.raises(UsageError, match="empty"):
        list(model.generate([]))


def test_generation_that_is_abandoned_does_not_disturb_the_next(model: flashmoe.Model) -> None:
    expected = text_of(model)
    pieces = model.generate("something else entirely", max_tokens=20, sampling=GREEDY)
    next(pieces)
    del pieces
    assert text_of(model) == expected


def chat_prompt(model: flashmoe.Model, messages: list[dict[str, str]]) -> str:
    """What the server makes of `messages`."""
    return str(model.server().ask("POST", "/apply-template", {"messages": messages})["prompt"])


def test_chat_renders_the_models_template(model: flashmoe.Model) -> None:
    messages = [{"role": "user", "content": "hello"}]
    prompt = chat_prompt(model, messages)
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    tokens = model.engine.tokenize(prompt, special=True)
    assert tokens[0] == 257  # a control token, not its letters
    expected = "".join(model.generate(tokens, max_tokens=10, sampling=GREEDY))
    assert "".join(model.chat(messages, max_tokens=10, sampling=GREEDY)) == expected


def test_control_tokens_in_a_plain_prompt_are_text(model: flashmoe.Model) -> None:
    assert 257 not in model.engine.tokenize("<|im_start|>user")


def test_model_without_template_speaks_chatml(lib: Library, tiny: Tiny) -> None:
    """As with the stock server."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    with opened(tiny("olmoe"), lib, "100%", n_ubatch=8) as model:
        prompt = chat_prompt(model, messages)
        assert prompt == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        )
        text = "".join(model.chat(messages, max_tokens=10, sampling=GREEDY))
        assert text == text_of_tokens(model, model.engine.tokenize(prompt, special=True), 10)
        with StockServer(tiny("olmoe"), model) as stock:
            assert stock.chat_text({"messages": messages, "max_tokens": 10, "temperature": 0}) == text


def test_stats_have_the_layout_of_the_report(lib: Library, tiny: Tiny) -> None:
    with opened(tiny("llama"), lib, "60%") as model:
        assert model.engine.n_ubatch > 1
        prompt = model.engine.tokenize(PROMPT)
        text_of(model)
        stats = model.stats
        # its last micro-batch may have one token: those are counted as decoding
        assert len(prompt) - 1 <= stats["prefill"]["tokens"] <= len(prompt)
        assert stats["decode"]["tokens"] > 0
        assert stats["cache"]["slots"] == model.cache.policy.residency.n_slots
        assert stats["cache"]["misses"] > 0
        layer_bytes = {layer.expert_bytes for layer in model.catalog.layers}
        misses = stats["cache"]["misses"] + stats["cache"]["prefill_misses"]
        assert min(layer_bytes) * misses <= stats["io"]["read_bytes"] <= max(layer_bytes) * misses


def test_file_truncated_underneath(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(tiny("llama"), path)
    content, status = path.read_bytes(), path.stat()
    with opened(path, lib, "1") as model:
        expected = text_of(model)
        for keep in (0, 4096, len(content) // 2):
            os.truncate(path, keep)
            with pytest.raises(ReadError, match="truncated"):
                text_of(model)
            with open(path, "r+b") as file:
                file.write(content)
            with pytest.raises(ReadError, match="has changed while in use; load the model again"):
                text_of(model)  # nobody knows what it was overwritten with
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            assert text_of(model) == expected


def test_read_error_in_the_middle(
    lib: Library, tiny: Tiny, llama: Reference, monkeypatch: pytest.MonkeyPatch, plain_reads: None
) -> None:
    with opened(tiny("llama"), lib, "1") as model:
        expected = stock_text(model, llama)
        read, left = DirectFile.read_enclosing, [0]

        def failing(self: DirectFile, address: int, offset: int, nbytes: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise ReadError("the drive is gone")
            read(self, address, offset, nbytes)

        monkeypatch.setattr(DirectFile, "read_enclosing", failing)
        for after in (1, 2, 5, 40, 41, 42, 43, 97):
            left[0] = after
            with pytest.raises(ReadError, match="the drive is gone"):
                text_of(model)
            left[0] = 0
            assert text_of(model) == expected


def test_read_error_leaves_the_context_as_it_was(
    lib: Library, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, plain_reads: None
) -> None:
    with opened(tiny("llama"), lib, "1") as model:
        engine = model.engine
        for token in (65, 66, 67):
            engine.decode([token])
        engine.decode([68])
        expected = engine.logits()
        engine.rewind(3)

        def fail(*_: object) -> None:
            raise ReadError("no")

        with monkeypatch.context() as patch:
            patch.setattr(DirectFile, "read_enclosing", fail)
            with pytest.raises(ReadError):
                engine.decode([200])
        assert engine.past() == 3
        engine.decode([68])
        assert np.array_equal(engine.logits(), expected)


def test_exception_in_the_hook(
    model: flashmoe.Model, llama: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stock_text(model, llama)
    ensure = type(model.cache).ensure
    for error in (KeyboardInterrupt(), MemoryError("none left")):
        for after in (0, 1, 40):
            calls = iter(range(1000))

            def interrupted(self, layer, ids, *, error=error, after=after, calls=calls, **options):  # type: ignore[no-untyped-def]
                if next(calls) == after:
                    raise error
                return ensure(self, layer, ids, **options)

            with monkeypatch.context() as patch:
                patch.setattr(type(model.cache), "ensure", interrupted)
                with pytest.raises(type(error)):
                    text_of(model)
            assert text_of(model) == expected


def test_a_callback_that_fails_before_its_first_line(lib: Library, tiny: Tiny) -> None:
    """ctypes drops what it raises, and the library reports success: the logits would be those of half a graph."""
    with opened(tiny("llama"), lib) as model:
        model.engine.decode([65])
        expected = model.engine.logits()
        model.engine.rewind(0)
        control = model.engine._hook._control  # type: ignore[attr-defined]
        nothing, python = PYTHON_CALLBACK(lambda *_: 0), control.python
        control.python = ctypes.cast(nothing, ctypes.c_void_p).value
        with pytest.raises(flashmoe.FlashMoEError, match="interrupted"):
            model.engine.decode([66] * model.engine.n_ubatch)
        assert model.engine.past() == 0
        control.python = python
        model.engine.decode([65])
        assert np.array_equal(model.engine.logits(), expected)


def interrupt_inside(function: str, times: int) -> threading.Thread:
    """Send SIGINT to the main thread while `function` of the context runs, seen so many times; then end."""
    main = threading.main_thread().ident or 0

    def watch() -> None:
        seen = 0
        while seen < times:
            frames = sys._current_frames().values()
            seen += any(
                f.f_code.co_name == function and f.f_code.co_filename.endswith("context.py") for f in frames
            )
            time.sleep(0)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_real_interrupt_while_the_graph_runs(model: flashmoe.Model, llama: Reference) -> None:
    expected = stock_text(model, llama)
    tokens = model.engine.tokenize(PROMPT)
    for times in range(1, 21):
        thread = interrupt_inside("decode", times)
        with pytest.raises(KeyboardInterrupt):
            list(model.start(tokens, max_tokens=240, sampling=GREEDY).stream())
        thread.join()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "".join(model.start(tokens, max_tokens=24, sampling=GREEDY).stream()) == expected
    assert text_of(model) == expected


def test_real_interrupt_while_the_server_works(model: flashmoe.Model, llama: Reference) -> None:
    """While a prompt is read, and while tokens are made: the caller hears of it, and the next request is right."""
    expected = stock_text(model, llama)
    text_of(model, n=1)  # the server has started
    main = threading.main_thread().ident or 0
    endless = SamplingParams(temperature=0, ignore_eos=True)

    def go_on(timer: threading.Timer) -> None:
        timer.start()
        while True:
            list(model.generate([65] * 60, max_tokens=180, sampling=endless))

    for milliseconds in (0, 1, 3, 10, 30, 60):
        timer = threading.Timer(milliseconds / 1000, signal.pthread_kill, (main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            go_on(timer)
        timer.join()
        assert text_of(model) == expected


def test_closing_twice_is_harmless(lib: Library, tiny: Tiny) -> None:
    model = opened(tiny("llama"), lib)
    text_of(model, n=2)
    model.close()
    model.close()


def test_models_side_by_side(lib: Library, tiny: Tiny) -> None:
    with opened(tiny("llama"), lib) as one, opened(tiny("gpt-oss"), lib) as two:
        first, second = text_of(one), text_of(two)
        assert (text_of(one), text_of(two)) == (first, second)


def test_models_served_at_once(lib: Library, tiny: Tiny) -> None:
    """Two servers and a stock one in one process, their tokens made in turns."""
    with opened(tiny("llama"), lib) as one, opened(tiny("gpt-oss"), lib) as two:
        alone = text_of(one), text_of(two)
        assert one.server() is not two.server()
        with StockServer(tiny("llama"), one) as stock:
            streams = [model.generate(PROMPT, max_tokens=24, sampling=GREEDY) for model in (one, two)]
            request = {"prompt": one.engine.tokenize(PROMPT), "max_tokens": 24, "temperature": 0}
            streams.append(stock.text(request))
            made = ["", "", ""]
            for pieces in zip_longest(*streams, fillvalue=""):
                made = [text + piece for text, piece in zip(made, pieces, strict=True)]
            assert made == [*alone, alone[0]]
        assert (text_of(one), text_of(two)) == alone
        one.close()
        assert text_of(two) == alone[1]


@pytest.mark.parametrize("cache", ["1", "60%", "100%"])
def test_own_loop_and_server_in_turns(cache: str, lib: Library, tiny: Tiny, llama: Reference) -> None:
    """They hand the one context to each other, and make the same tokens each time."""
    with opened(tiny("llama"), lib, cache, n_ubatch=4) as model:
        expected, tokens = stock_text(model, llama), model.engine.tokenize(PROMPT)
        for _ in range(3):
            assert "".join(model.start(tokens, max_tokens=24, sampling=GREEDY).stream()) == expected
            assert model.engine.past() > len(tokens)
            assert text_of(model) == expected
            assert model.engine.past() == 0
            assert text_of(model) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ram": "1GiB", "cache": "50%"}, "not both"),
        ({"n_ctx": 0}, "at least 1"),
        ({"threads": 0}, "at least 1"),
        ({"n_ubatch": 0}, "at least 1"),
        ({"cache": "many"}, "cannot read --cache 'many'"),
        ({"cache": "-3"}, "cannot read --cache"),
        ({"policy": "best"}, "unknown policy 'best'"),
    ],
)
def test_wrong_arguments(options: dict, message: str, lib: Library, tiny: Tiny) -> None:
    with pytest.raises(FlashMoEError, match=message) as caught:
        flashmoe.load(tiny("llama"), library=lib, **options)
    assert caught.value.exit_status == 2


def test_progress_of_loading_and_prefill(lib: Library, tiny: Tiny) -> None:
    seen: list[tuple[str, int, int]] = []
    with flashmoe.load(
        tiny("llama"),
        cache="100%",
        threads=1,
        n_ubatch=4,
        library=lib,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    ) as model:
        dense = model.catalog.dense_bytes
        loading = [done for stage, done, total in seen if stage == "load" and total == dense]
        assert loading == sorted(loading)
        assert loading[-1] == dense
        list(model.generate([65] * 10, max_tokens=1))
    assert [(done, total) for stage, done, total in seen if stage == "prefill"] == [
        (0, 10),
        (4, 10),
        (8, 10),
        (10, 10),
    ]


def test_server_that_ends_at_once(lib: Library, tiny: Tiny) -> None:
    """The library's loop would miss an end that comes before its beginning, and wait for ever."""
    with opened(tiny("llama"), lib) as model:
        for _ in range(30):
            model.server()
            model._own_context()


def test_context_taken_back_in_the_middle(lib: Library, tiny: Tiny, llama: Reference) -> None:
    """While a request is under way, whether its reader has begun, gone on, or left: nothing hangs or breaks."""
    endless = SamplingParams(temperature=0, ignore_eos=True)
    with opened(tiny("llama"), lib, "30%") as model:
        expected, tokens = stock_text(model, llama), model.engine.tokenize(PROMPT)
        for taken in range(40):
            pieces = model.generate([65] * 20, max_tokens=150, sampling=endless)
            for _ in range(taken % 5):
                next(pieces)
            if taken % 2:
                pieces.close()  # type: ignore[attr-defined]
            if taken % 3:
                assert "".join(model.start(tokens, max_tokens=24, sampling=GREEDY).stream()) == expected
            else:
                model._own_context()
        assert text_of(model) == expected
    with opened(tiny("llama"), lib, "30%") as model:
        pieces = model.generate([65] * 20, max_tokens=150, sampling=endless)
        next(pieces)
    with pytest.raises(UsageError, match="the model was closed"):  # not as if the text ended there
        list(pieces)


def test_trace_after_a_failed_evaluation(
    lib: Library, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, plain_reads: None
) -> None:
    """What a failed one has noted is forgotten."""

    def recorded(after: int) -> np.ndarray:
        with opened(tiny("llama"), lib, "60%", trace=True, n_ubatch=4) as model:
            assert model.recorder is not None
            if after:
                read, left = DirectFile.read_enclosing, [after]

                def failing(self: DirectFile, address: int, offset: int, nbytes: int) -> None:
                    left[0] -= 1
                    if left[0] == 0:
                        raise ReadError("the drive is gone")
                    read(self, address, offset, nbytes)

                with monkeypatch.context() as patch:
                    patch.setattr(DirectFile, "read_enclosing", failing)
                    with pytest.raises(ReadError):
                        text_of(model, "The rain fell on the roof")
            before = len(model.recorder)
            text_of(model)
            trace = model.recorder.trace().rows(np.arange(before, len(model.recorder)))
            assert not (trace.token_id < 0).any()
            return np.column_stack(
                [trace.expert_ids.reshape(trace.n_tokens, -1), trace.token_id, trace.phase]
            )

    clean = recorded(0)
    for after in (3, 20, 30):
        assert np.array_equal(recorded(after), clean)


def test_library_without_a_server(lib: Library, tiny: Tiny) -> None:
    """generate and the own loop work all the same."""
    with opened(tiny("llama"), lib) as model:
        expected = text_of(model)
    with opened(tiny("llama"), lib) as model:
        model.engine.__dict__["has_server"] = False
        assert text_of(model) == expected
        with pytest.raises(FlashMoEError, match="only xllamacpp's library has"):
            list(model.chat([{"role": "user", "content": "hello"}]))
        assert text_of(model) == expected


def test_server_that_does_not_start(lib: Library, tiny: Tiny) -> None:
    """The model goes on without it."""
    options = ServerOptions(reasoning_format="none-such")
    with opened(tiny("llama"), lib, server=options) as model:
        with pytest.raises(UsageError, match="unknown reasoning format"):
            text_of(model)
        assert list(model.start([65, 66], max_tokens=3, sampling=GREEDY).stream())
