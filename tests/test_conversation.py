"""Conversations: every turn is what the stock server of the same library answers to the same messages."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.serving.options import ServerOptions
from flashmoe.errors import FlashMoEError, ReadError, UsageError
from flashmoe.runtime.conversation import Conversation, Piece
from flashmoe.storage.direct import DirectFile
from tests.conftest import Tiny
from tests.engines.reference import StockServer
from tests.models.writer import CHAT_TEMPLATE

GREEDY = SamplingParams(temperature=0)
STEP = 8
CONTEXT = 256
ANSWER = 12
MESSAGES = ("the sky is blue", "and why?", "say it again, please")


@contextmanager
def opened(
    path: Path, lib: Library, cache: str = "40%", layout: str = "plain", template: str = CHAT_TEMPLATE
) -> Iterator[flashmoe.Model]:
    """All tiny models speak ChatML here."""
    with flashmoe.load(
        path,
        cache=cache,
        layout=layout,
        library=lib,
        n_ctx=CONTEXT,
        n_ubatch=STEP,
        threads=1,
        server=ServerOptions(chat_template=template),
    ) as model:
        yield model


@contextmanager
def stock_of(
    path: Path, model: flashmoe.Model, template: str = CHAT_TEMPLATE, **more: Any
) -> Iterator[StockServer]:
    options = model._server_options
    assert options
    with StockServer(
        path, model, chat_template=template, n_ctx_checkpoints=options.ctx_checkpoints, **more
    ) as stock:
        yield stock


@pytest.fixture
def model(lib: Library, tiny: Tiny) -> Iterator[flashmoe.Model]:
    with opened(tiny("llama"), lib) as loaded:
        yield loaded


def talk_with(model: flashmoe.Model, system: str = "", n: int = ANSWER, **request: Any) -> Conversation:
    return Conversation(model, system=system, max_tokens=n, sampling=GREEDY, request=request)


def say(talk: Conversation, message: str) -> str:
    return "".join(talk.say(message))


def asked(messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A request as the conversations here make them."""
    return {"messages": messages, "max_tokens": ANSWER, "temperature": 0, **more}


# attention; a sliding window; memories that cannot be cut
@pytest.mark.parametrize("name", ["llama", "gpt-oss", "deepseek2", "qwen3next", "jamba", "deepseek4"])
@pytest.mark.parametrize(
    ("cache", "layout"),
    [("40%", "plain"), ("100%", "plain"), ("100%", "repacked")],  # a small pool means small micro-batches
)
def test_turns_are_stock_turns(name: str, cache: str, layout: str, lib: Library, tiny: Tiny) -> None:
    with opened(tiny(name), lib, cache, layout) as model, stock_of(tiny(name), model) as stock:
        talk = talk_with(model, "You are brief.")
        said: list[dict[str, str]] = [{"role": "system", "content": "You are brief."}]
        for message in MESSAGES:
            said.append({"role": "user", "content": message})
            text, timings = stock.chat_end(asked(said))
            assert say(talk, message) == text
            turn = talk.turn
            assert (turn.read, turn.reused, turn.made) == (
                timings["prompt_n"],
                timings["cache_n"],
                timings["predicted_n"],
            )
            assert turn.tokens_per_second > 0
            said.append({"role": "assistant", "content": text})
        assert talk.messages == said[1:]


def test_a_turn_reads_only_its_new_tokens(model: flashmoe.Model) -> None:
    """As many tokens of the prompt are read as follow the beginning that it shares with what is there."""
    talk = talk_with(model)
    say(talk, MESSAGES[0])
    assert talk.turn.reused == 0
    before, evaluated = talk.used, model.telemetry.prefill.tokens + model.telemetry.decode.tokens
    say(talk, MESSAGES[1])
    assert talk.turn.reused > 0
    prompt = model.server().count_tokens({"messages": talk.messages[:-1]})
    assert talk.turn.read + talk.turn.reused == prompt
    assert before - ANSWER <= talk.turn.reused < before
    now = model.telemetry.prefill.tokens + model.telemetry.decode.tokens
    assert now - evaluated == talk.turn.read + talk.turn.made - 1


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "jamba"])
def test_what_was_said_before_can_change(name: str, lib: Library, tiny: Tiny) -> None:
    """Another system prompt: the server keeps what comes before the first other token, if it can."""
    with opened(tiny(name), lib, "100%") as model, stock_of(tiny(name), model) as stock:
        talk = talk_with(model, "You are brief.")
        answer = say(talk, MESSAGES[0])
        question = {"role": "user", "content": MESSAGES[0]}
        assert stock.chat_text(asked([{"role": "system", "content": "You are brief."}, question])) == answer
        talk.system = "You are long."
        text, timings = stock.chat_end(
            asked(
                [
                    {"role": "system", "content": "You are long."},
                    question,
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": "why?"},
                ]
            )
        )
        assert say(talk, "why?") == text
        assert talk.turn.reused == timings["cache_n"]
        if name == "llama":
            assert talk.turn.reused > 10


def test_hit_rate_of_a_turn(lib: Library, demo: Path) -> None:
    """Hits that compiled code has answered by itself are among them."""
    with opened(demo, lib, cache="100%") as model:
        talk = talk_with(model, n=60)
        say(talk, "hello")
        decode = model.cache_stats["decode"]
        assert talk.turn.hit_rate == decode.hits / decode.requests
        asked_for = len(model.catalog.layers) * model.catalog.top_k
        assert decode.requests == model.telemetry.decode.tokens * asked_for


def test_reset_begins_anew(model: flashmoe.Model) -> None:
    talk = talk_with(model)
    first = say(talk, MESSAGES[0])
    assert say(talk, MESSAGES[0]) != first
    talk.reset()
    assert (talk.messages, talk.used) == ([], 0)
    assert say(talk, MESSAGES[0]) == first
    assert talk.used == talk.turn.read + talk.turn.reused + talk.turn.made > 0


def test_going_on_from_other_messages(model: flashmoe.Model) -> None:
    talk = talk_with(model)
    say(talk, MESSAGES[0])
    saved = list(talk.messages)
    expected = say(talk, "why?")
    talk.reset(saved)
    assert talk.messages == saved
    assert say(talk, "why?") == expected
    messages = [*saved, {"role": "user", "content": "why?"}]
    assert "".join(model.chat(messages, max_tokens=ANSWER, sampling=GREEDY)) == expected


def test_only_a_new_conversation_is_a_new_sequence(
    lib: Library, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    with flashmoe.load(demo, cache="50%", threads=1, library=lib, trace=True) as model:
        assert model.prefetcher
        monkeypatch.setattr(model.cache, "begin_sequence", lambda: begun.append("cache"))
        monkeypatch.setattr(model.prefetcher, "begin_sequence", lambda: begun.append("prefetcher"))
        talk = talk_with(model)
        for message in ("one", "two", "three"):
            say(talk, message)
        assert begun == ["cache", "prefetcher"]
        talk.reset()
        say(talk, "four")
        assert begun == ["cache", "prefetcher"] * 2
        assert model.recorder
        assert model.recorder.trace().n_sequences == 2


def watch(model: flashmoe.Model, monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The messages of every request that is made from here on."""
    seen: list[list[dict[str, str]]] = []
    chat = type(model.server()).chat

    def watched(server: Any, request: dict[str, Any]) -> Any:
        seen.append(request["messages"])
        return chat(server, request)

    monkeypatch.setattr(type(model.server()), "chat", watched)
    return seen


def test_full_context_forgets_the_oldest_turns(
    model: flashmoe.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, seen = talk_with(model, "You know it all."), watch(model, monkeypatch)
    forgotten = 0
    for number in range(12):
        say(talk, f"message number {number}")
        forgotten += talk.turn.forgotten
        assert talk.used <= CONTEXT
        assert talk.turn.read + talk.turn.reused + ANSWER <= CONTEXT
        shown = seen[-1]
        assert shown[0] == {"role": "system", "content": "You know it all."}
        assert shown[1]["content"] == f"message number {forgotten}"
        assert shown[-1]["content"] == f"message number {number}"
    assert forgotten > 1
    assert len(talk.messages) == 24  # all that was said


def test_forgetting_is_seldom(model: flashmoe.Model) -> None:
    """It makes room for several turns at once, because the rest is read anew."""
    talk = talk_with(model)
    read_anew = []
    for number in range(30):
        say(talk, f"message number {number}")
        if talk.turn.forgotten:
            read_anew.append(number)
    assert len(read_anew) >= 2
    assert min(np.diff(read_anew)) > 1


def test_message_that_does_not_fit(model: flashmoe.Model) -> None:
    talk = talk_with(model)
    say(talk, "hello")
    before = list(talk.messages)
    with pytest.raises(UsageError, match="tokens, the context 256: shorten it or raise -c"):
        say(talk, "long " * 300)
    assert talk.messages == before
    say(talk, "short")
    assert talk.turn.reused > 0
    assert talk.turn.forgotten == 0


def test_answer_that_fills_the_context(model: flashmoe.Model) -> None:
    talk = talk_with(model, n=-1, ignore_eos=True)
    say(talk, "hello")
    assert talk.turn.finished == "length"
    assert CONTEXT - 1 <= talk.used <= CONTEXT
    say(talk, "and on?")
    assert talk.turn.forgotten == 1


def test_stopping_in_the_middle_keeps_the_answer_so_far(model: flashmoe.Model) -> None:
    whole = say(talk_with(model), MESSAGES[0])
    talk = talk_with(model)
    answer = talk.say(MESSAGES[0])
    pieces = [next(answer), next(answer), next(answer)]
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert whole.startswith("".join(pieces))
    assert talk.turn.finished == ""
    assert talk.turn.made >= 3
    say(talk, "go on")
    assert talk.turn.reused > 0


@pytest.mark.parametrize("milliseconds", [0, 1, 3, 10, 30, 80])
def test_interrupt_in_the_middle(milliseconds: int, model: flashmoe.Model) -> None:
    """Ctrl-C while a prompt is read, and while an answer is made; a whole conversation is right afterwards."""
    expected = say(talk_with(model), MESSAGES[0])
    main = threading.main_thread().ident or 0
    talk = talk_with(model, n=-1, ignore_eos=True)
    timer = threading.Timer(milliseconds / 1000, signal.pthread_kill, (main, signal.SIGINT))

    def go_on() -> None:
        timer.start()
        while True:
            talk.reset()
            say(talk, "the sea is green and the sky is blue, and so on")

    with pytest.raises(KeyboardInterrupt):
        go_on()
    timer.join()
    assert [message["role"] for message in talk.messages] in ([], ["user", "assistant"])
    talk.reset()
    again = talk_with(model)
    assert say(again, MESSAGES[0]) == expected
    say(again, "go on")
    assert again.turn.reused > 0


def test_read_error(model: flashmoe.Model, monkeypatch: pytest.MonkeyPatch, plain_reads: None) -> None:
    talk = talk_with(model)
    say(talk, "hello")

    def fail(*_: object) -> None:
        raise ReadError("the drive is gone")

    with monkeypatch.context() as patch:
        patch.setattr(DirectFile, "read_enclosing", fail)
        with pytest.raises(ReadError, match="the drive is gone"):
            "".join(say(talk, f"{number} unlike all else") for number in range(20))
    assert talk.messages[-1]["role"] == "assistant"
    saved = list(talk.messages)
    answer = say(talk, "better now?")
    other = talk_with(model)
    other.reset(saved)
    assert say(other, "better now?") == answer


REFUSES = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this one') }}{% endif %}"
    "{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}assistant: "
)


def test_message_that_the_template_refuses(lib: Library, tiny: Tiny) -> None:
    with opened(tiny("llama"), lib, template=REFUSES) as model:
        talk = talk_with(model)
        say(talk, "hello")
        before = list(talk.messages)
        with pytest.raises(FlashMoEError, match="not this one"):
            say(talk, "no")
        assert talk.messages == before
        assert say(talk, "why?")


THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' }}{% endif %}"
    "{{ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_thoughts_come_separately(lib: Library, demo: Path) -> None:
    """They are no part of the answer's text; a grammar has the model think here."""
    grammar = r'root ::= "<think>\nHm.\n</think>\n\nYes.\n"'
    with opened(demo, lib, template=THINKS) as model:
        talk = talk_with(model, n=40, grammar=grammar)
        pieces = list(talk.stream("hello"))
        thought = "".join(piece.text for piece in pieces if piece.thought)
        text = "".join(piece.text for piece in pieces if not piece.thought)
        assert all(isinstance(piece, Piece) for piece in pieces)
        assert (thought.strip(), text.strip()) == ("Hm.", "Yes.")
        assert talk.messages[-1] == {"role": "assistant", "content": text, "reasoning_content": thought}
        with stock_of(demo, model, THINKS) as stock:
            deltas = [
                choice["delta"]
                for event in stock.chat(
                    asked([{"role": "user", "content": "hello"}], grammar=grammar) | {"max_tokens": 40}
                )
                for choice in event.get("choices", ())
            ]
        assert "".join(delta.get("content") or "" for delta in deltas) == text
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == thought
        assert say(talk, "hello again").strip() == "Yes."  # say gives the text alone


def test_model_without_template_speaks_chatml(lib: Library, tiny: Tiny) -> None:
    with opened(tiny("olmoe"), lib, "100%", template="") as model:
        text = say(talk_with(model), "hello")
        with stock_of(tiny("olmoe"), model, "chatml") as stock:
            assert stock.chat_text(asked([{"role": "user", "content": "hello"}])) == text


def test_library_without_a_server(model: flashmoe.Model) -> None:
    model.engine.__dict__["has_server"] = False
    with pytest.raises(FlashMoEError, match="only xllamacpp's library has"):
        Conversation(model)
    tokens = model.engine.tokenize(MESSAGES[0])
    assert "".join(model.generate(tokens, max_tokens=4, sampling=GREEDY)) == "".join(
        model.start(tokens, max_tokens=4, sampling=GREEDY).stream()
    )


def test_conversation_after_the_own_loop(model: flashmoe.Model) -> None:
    """`start` takes the context from the server that the conversation was begun with."""
    talk = talk_with(model)
    first = say(talk, MESSAGES[0])
    list(model.start([65, 66], max_tokens=2, sampling=GREEDY).stream())
    other = talk_with(model)
    assert say(other, MESSAGES[0]) == first
    assert say(talk, "why?")


def test_what_is_not_text_is_replaced(model: flashmoe.Model) -> None:
    """Bytes that are not UTF-8 come from a command line as lone surrogates."""
    assert model.engine.tokenize("a\udcffb") == model.engine.tokenize("a?b")
