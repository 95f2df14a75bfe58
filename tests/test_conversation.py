"""Conversations: every turn is what stock llama.cpp makes of the same tokens in the same steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import flashmoe
from flashmoe.conversation import Conversation
from flashmoe.engines.base import Sampling
from flashmoe.engines.llamacpp.context import Context
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.engines.llamacpp.template import render_chat
from flashmoe.errors import ModelError, ReadError, UsageError
from flashmoe.storage.direct import DirectFile
from tests.conftest import Tiny
from tests.models.writer import CHAT_TEMPLATE

GREEDY = Sampling(temperature=0)
STEP = 8
CONTEXT = 256
ANSWER = 12


@contextmanager
def opened(
    path: Path, lib: Library, patch: pytest.MonkeyPatch, cache: str = "40%", layout: str = "plain"
) -> Iterator[flashmoe.Model]:
    """All tiny models speak ChatML here."""
    with flashmoe.load(
        path, cache=cache, layout=layout, library=lib, n_ctx=CONTEXT, n_ubatch=STEP, threads=1
    ) as model:

        def chat_prompt(messages: list, **_: object) -> str:
            return render_chat(CHAT_TEMPLATE, messages, bos="", eos="")

        patch.setattr(model.engine, "chat_prompt", chat_prompt)
        yield model


@pytest.fixture
def model(lib: Library, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[flashmoe.Model]:
    with opened(tiny("llama"), lib, monkeypatch) as loaded:
        yield loaded


def talk_with(model: flashmoe.Model, system: str = "", n: int = ANSWER) -> Conversation:
    return Conversation(model, system=system, max_tokens=n, sampling=GREEDY)


def say(talk: Conversation, message: str) -> str:
    return "".join(talk.say(message))


class Stock:
    """The same library without the pool, told step by step what to evaluate."""

    def __init__(self, lib: Library, path: Path, layout: str) -> None:
        self._model = StockModel(lib, path, repack=layout == "repacked")
        self._context: Context | None = None
        self.held: list[int] = []

    def begin(self) -> None:
        """An empty context."""
        if self._context:
            self._context.close()
        self._context = self._model.context(n_ctx=CONTEXT, n_ubatch=STEP, threads=1)
        self.held = []

    def turn(self, model: flashmoe.Model, new: list[int], kept: int | None = None) -> list[int]:
        """Go on with `new` tokens, after the first `kept` that are there; returns the likeliest that follow."""
        context, step = self._context, model.engine.n_ubatch
        assert context
        if kept is not None:
            context.rewind(kept)
            assert context.past == [kept]
            del self.held[kept:]
        for start in range(0, len(new), step):
            context.decode(new[start : start + step])
        self.held += new
        made: list[int] = []
        while True:
            token = int(context.logits().argmax())
            if model.engine.is_end(token):
                return made
            made.append(token)
            if len(made) == ANSWER:
                return made
            context.decode([token])
            self.held.append(token)

    def logits(self) -> np.ndarray:
        assert self._context
        return self._context.logits()

    def close(self) -> None:
        if self._context:
            self._context.close()
        self._model.close()


@contextmanager
def stock_of(lib: Library, path: Path, layout: str = "plain") -> Iterator[Stock]:
    stock = Stock(lib, path, layout)
    try:
        stock.begin()
        yield stock
    finally:
        stock.close()


def text_of(model: flashmoe.Model, tokens: list[int]) -> str:
    return b"".join(model.engine.piece(token) for token in tokens).decode("utf-8", errors="replace")


def turn_text(message: str) -> str:
    return f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"


# attention; a sliding window; memories that cannot be cut
@pytest.mark.parametrize("name", ["llama", "gpt-oss", "deepseek2", "qwen3next", "jamba", "deepseek4"])
@pytest.mark.parametrize(
    ("cache", "layout"),
    [("40%", "plain"), ("100%", "plain"), ("100%", "repacked")],  # a small pool means small micro-batches
)
def test_turns_are_stock_turns(
    name: str, cache: str, layout: str, lib: Library, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        opened(tiny(name), lib, monkeypatch, cache, layout) as model,
        stock_of(lib, tiny(name), layout) as stock,
    ):
        talk, tokenize = talk_with(model), model.engine.tokenize
        made: list[int] = []
        for number, message in enumerate(("the sky is blue", "and why?", "say it again, please")):
            text = turn_text(message) if number == 0 else f"<|im_end|>\n{turn_text(message)}"
            new = tokenize(text, special=True, begin=number == 0)
            if len(made) == ANSWER:
                new = made[-1:] + new  # made, and not evaluated yet
            before = len(stock.held)
            made = stock.turn(model, new)
            assert say(talk, message) == text_of(model, made)
            assert (talk.turn.reused, talk.turn.read) == (before, len(new))
            assert talk.turn.made == len(made)
            assert np.array_equal(model.engine.logits(), stock.logits())


@pytest.mark.parametrize(("name", "can_be_cut"), [("llama", True), ("gpt-oss", True), ("jamba", False)])
def test_what_was_said_before_can_change(
    name: str, can_be_cut: bool, lib: Library, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another system prompt: the engine keeps what comes before the first other token, if it can."""
    with opened(tiny(name), lib, monkeypatch, "100%") as model, stock_of(lib, tiny(name)) as stock:

        def prompt() -> list[int]:
            messages = [{"role": "system", "content": talk.system}, *talk.messages]
            return model.engine.tokenize(model.engine.chat_prompt(messages), special=True)

        talk = talk_with(model, "You are brief.")
        answer = say(talk, "the sky is blue")
        question = talk.messages.pop(0)
        talk.messages[:] = [question]
        assert text_of(model, stock.turn(model, prompt())) == answer
        talk.messages.append({"role": "assistant", "content": answer})
        talk.system = "You are long."
        talk.messages.append({"role": "user", "content": "why?"})
        new = prompt()
        talk.messages.pop()
        common = next(i for i, (a, b) in enumerate(zip(stock.held, new, strict=False)) if a != b)
        assert common > 10
        if can_be_cut:
            made = stock.turn(model, new[common:], kept=common)
        else:
            stock.begin()
            made = stock.turn(model, new)
        assert say(talk, "why?") == text_of(model, made)
        assert talk.turn.reused == (common if can_be_cut else 0)
        assert np.array_equal(model.engine.logits(), stock.logits())


def test_answers_keep_their_own_tokens(model: flashmoe.Model) -> None:
    """Their text would often give others: the next turn would read them anew."""
    talk = talk_with(model)
    say(talk, "the sky is blue")
    held = [token for chunk in model.held[0].chunks for token in chunk]
    answer = talk.messages[-1]["content"]
    assert model.engine.tokenize(turn_text("the sky is blue") + answer, special=True)[: len(held)] != held
    say(talk, "why?")
    assert talk.turn.reused == len(held)


def test_reset_begins_anew(model: flashmoe.Model) -> None:
    talk = talk_with(model)
    first = say(talk, "the sky is blue")
    assert say(talk, "the sky is blue") != first
    talk.reset()
    assert (talk.messages, talk.used) == ([], 0)
    assert say(talk, "the sky is blue") == first
    assert talk.turn.reused == 0
    assert talk.used == model.engine.past() > 0


def test_going_on_from_other_messages(model: flashmoe.Model) -> None:
    talk = talk_with(model)
    say(talk, "the sky is blue")
    saved = list(talk.messages)
    talk.reset(saved)
    assert talk.messages == saved
    prompt = model.engine.tokenize(
        model.engine.chat_prompt([*saved, {"role": "user", "content": "why?"}]), special=True
    )
    again = say(talk, "why?")
    assert (talk.turn.read, talk.turn.reused) == (len(prompt), 0)
    assert again == "".join(model.generate(prompt, max_tokens=ANSWER, sampling=GREEDY))


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


def test_full_context_forgets_the_oldest_turns(model: flashmoe.Model) -> None:
    talk = talk_with(model, "You know it all.")
    seen = []
    chat_prompt = model.engine.chat_prompt

    def watched(messages: list, **options: object) -> str:
        seen[:] = messages
        return chat_prompt(messages, **options)

    model.engine.chat_prompt = watched  # type: ignore[method-assign]
    forgotten = 0
    for number in range(12):
        say(talk, f"message number {number}")
        forgotten += talk.turn.forgotten
        assert talk.used <= CONTEXT
        assert talk.turn.read + talk.turn.reused + ANSWER <= CONTEXT
        assert seen[0] == {"role": "system", "content": "You know it all."}
        assert seen[1]["content"] == f"message number {forgotten}"
        assert seen[-1]["content"] == f"message number {number}"
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


def test_answer_that_fills_the_context(model: flashmoe.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.engine, "is_end", lambda _: False)
    talk = talk_with(model, n=-1)
    say(talk, "hello")
    assert talk.turn.finished == "length"
    assert talk.used == CONTEXT
    say(talk, "and on?")
    assert talk.turn.forgotten == 1


def test_stopping_in_the_middle_keeps_the_answer_so_far(model: flashmoe.Model) -> None:
    talk = talk_with(model)
    answer = talk.say("the sky is blue")
    pieces = [next(answer), next(answer), next(answer)]
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert talk.turn.finished == ""
    assert talk.turn.made >= 3
    held = talk.used
    say(talk, "go on")
    assert talk.turn.reused == held


def test_interrupt_in_the_middle(model: flashmoe.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a prompt is read, and while an answer is made; a whole conversation is right afterwards."""
    expected, step = say(talk_with(model), "the sky is blue"), model.engine.n_ubatch
    ensure = type(model.cache).ensure
    prompt_calls = 3 * -(-len(model.engine.tokenize(turn_text("the sky is blue"), special=True)) // step)
    for after in (0, 4, prompt_calls + 5):
        calls = iter(range(1000))

        def interrupted(self, layer, ids, *, after=after, calls=calls, **options):  # type: ignore[no-untyped-def]
            if next(calls) == after:
                raise KeyboardInterrupt
            return ensure(self, layer, ids, **options)

        talk, pieces = talk_with(model), []
        with monkeypatch.context() as patch:
            patch.setattr(type(model.cache), "ensure", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pieces += talk.say("the sky is blue")  # type: ignore[arg-type]
        if after < prompt_calls:
            assert talk.messages == []
            assert say(talk, "the sky is blue") == expected
        else:
            assert expected.startswith(talk.messages[-1]["content"])
            assert talk.messages[-1]["content"]
            say(talk, "go on")


def test_read_error(model: flashmoe.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_with(model)
    say(talk, "hello")

    def fail(*_: object) -> None:
        raise ReadError("the drive is gone")

    with monkeypatch.context() as patch:
        patch.setattr(DirectFile, "read_enclosing", fail)
        with pytest.raises(ReadError, match="the drive is gone"):
            "".join(say(talk, f"{number} unlike all else") for number in range(20))
    assert talk.messages[-1]["role"] == "assistant"
    say(talk, "better now?")


def test_message_that_the_template_refuses(model: flashmoe.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = talk_with(model)
    say(talk, "hello")
    before = list(talk.messages)

    def refuse(*_: object, **__: object) -> str:
        raise ModelError("no system role")

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "chat_prompt", refuse)
        with pytest.raises(ModelError, match="no system role"):
            say(talk, "why?")
    assert talk.messages == before


def test_thinking_that_the_template_opens(model: flashmoe.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_prompt = model.engine.chat_prompt
    monkeypatch.setattr(model.engine, "chat_prompt", lambda m, **_: chat_prompt(m) + "<think>\n")
    talk = talk_with(model)
    pieces = list(talk.say("hello"))
    assert pieces[0].startswith("<think>\n")
    assert "".join(pieces).count("<think>") == 1
    assert talk.messages[-1]["content"] == "".join(pieces)


def test_model_without_template(lib: Library, tiny: Tiny) -> None:
    with (
        flashmoe.load(tiny("olmoe"), cache="50%", threads=1, library=lib) as model,
        pytest.raises(ModelError, match="no chat template"),
    ):
        Conversation(model)


def test_what_is_not_text_is_replaced(model: flashmoe.Model) -> None:
    """Bytes that are not UTF-8 come from a command line as lone surrogates."""
    assert model.engine.tokenize("a\udcffb") == model.engine.tokenize("a?b")
