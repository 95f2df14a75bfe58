"""Use of a model from where it must not be used: after its end, from another prompt, thread or process.

Each is one clear error, or what it was meant to be; never another prompt's text, and never the end of the process.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import UsageError
from flashmoe.runtime.model import Model
from tests.conftest import Tiny
from tests.engines.test_generate import GREEDY, PROMPT, opened, text_of

pytestmark = pytest.mark.timeout(300)

USES: dict[str, Callable[[Model], Any]] = {
    "generate": text_of,
    "generate from ids": lambda model: list(model.generate([1, 2], max_tokens=2)),
    "chat": lambda model: list(model.chat([{"role": "user", "content": "a"}], max_tokens=2)),
    "start": lambda model: model.start([1, 2]),
    "server": lambda model: model.server(),
    "embed": lambda model: model.embed("a"),
    "evaluate": lambda model: model.decoder.evaluate([1], decode=True),
    "tokenize": lambda model: model.engine.tokenize("a"),
    "piece": lambda model: model.engine.piece(1),
    "is_end": lambda model: model.engine.is_end(1),
    "decode": lambda model: model.engine.decode([1]),
    "rewind": lambda model: model.engine.rewind(0),
    "logits": lambda model: model.engine.logits(),
}


@pytest.fixture(scope="module")
def closed(lib: Library, tiny: Tiny) -> Model:
    with opened(tiny("llama"), lib, pooling="last") as model:
        text_of(model)
        list(model.start([1, 2], max_tokens=2).stream())
    return model


@pytest.mark.parametrize("use", USES)
def test_after_the_end(use: str, closed: Model) -> None:
    with pytest.raises(UsageError, match="this model is closed: load it again"):
        USES[use](closed)


def test_closed_again(closed: Model) -> None:
    closed.close()
    assert closed.report().lines()


def test_a_server_that_is_closed(lib: Library, tiny: Tiny) -> None:
    """Who still has it, or an answer of it, is told."""
    request = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "n_predict": 100}
    with opened(tiny("llama"), lib) as model:
        server = model.server()
        begun = server.complete(request)
        next(begun)
    with pytest.raises(UsageError, match="the model was closed"):
        list(begun)
    for ask in (server.chat, server.complete, server.count_tokens):
        with pytest.raises(UsageError, match="the model was closed"):
            ask(request)


def test_closed_in_the_middle_of_a_generation(lib: Library, tiny: Tiny) -> None:
    with opened(tiny("llama"), lib) as model:
        generation = model.start([1, 2, 3], max_tokens=20)
        generation.step()
    with pytest.raises(UsageError, match="closed"):
        generation.step()
    generation.close()


def test_one_generation_ends_another(lib: Library, tiny: Tiny) -> None:
    """Each goes on with what the context holds, and that is the other's."""
    with opened(tiny("llama"), lib) as model:
        expected, tokens = text_of(model), model.engine.tokenize(PROMPT)
        uses: list[Callable[[], Any]] = [
            lambda: model.start([65] * 9, max_tokens=1).step(),
            lambda: model.server(),
            lambda: text_of(model),
        ]
        for use in uses:
            generation = model.start(tokens, max_tokens=24, sampling=GREEDY)
            while not generation.made:
                generation.step()
            use()
            with pytest.raises(UsageError, match="another prompt has begun"):
                generation.step()
            generation.close()
        assert "".join(model.start(tokens, max_tokens=24, sampling=GREEDY).stream()) == expected


def test_threads(lib: Library, tiny: Tiny) -> None:
    """Answers of the server wait for each other; the engine's own loop is one's alone."""
    with opened(tiny("llama"), lib) as model:
        expected, tokens = text_of(model), model.engine.tokenize(PROMPT)
        texts, refused = list[str](), list[UsageError]()

        def server() -> None:
            texts.append(text_of(model))

        def own() -> None:
            try:
                texts.append("".join(model.start(tokens, max_tokens=24, sampling=GREEDY).stream()))
            except UsageError as error:
                refused.append(error)

        for kind, count in ((server, 4), (own, 6)):
            threads = [threading.Thread(target=kind) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(texts) + len(refused) == 10
        assert len(texts) >= 5
        assert set(texts) == {expected}
        assert text_of(model) == expected


@pytest.mark.parametrize("own", [False, True], ids=["server", "own loop"])
def test_closed_by_threads_in_another_s_answer(own: bool, lib: Library, tiny: Tiny) -> None:
    endless = SamplingParams(temperature=0, ignore_eos=True)
    model = opened(tiny("llama"), lib)
    begun, closed, ended = threading.Event(), threading.Event(), list[UsageError]()
    tokens = model.engine.tokenize(PROMPT)

    def answer() -> None:
        try:
            for _ in (
                model.start(tokens, sampling=GREEDY).stream()
                if own
                else model.generate(tokens, max_tokens=200, sampling=endless)
            ):
                begun.set()
                closed.wait()
        except UsageError as error:
            ended.append(error)

    thread = threading.Thread(target=answer)
    thread.start()
    assert begun.wait(120)
    closers = [threading.Thread(target=model.close) for _ in range(3)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
    closed.set()
    thread.join()
    assert "closed" in str(ended[0])


def run(code: str, model: Path) -> tuple[int, str, str]:
    """Exit status, output and errors of a program."""
    begin = (
        "import gc, os, sys, flashmoe\n"
        "from flashmoe.engines.base import SamplingParams\n"
        "endless = SamplingParams(temperature=0, ignore_eos=True)\n"
        f"model = flashmoe.load({str(model)!r}, cache='30%', threads=1, n_ctx=256)\n"
    )
    done = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("list(model.generate([65] * 20, max_tokens=1))", 0),
        (
            "pieces = model.generate([65] * 20, max_tokens=150, sampling=endless); next(pieces); sys.exit(5)",
            5,
        ),
        ("model.start([65] * 20, max_tokens=9).step(); sys.exit(5)", 5),
        ("list(model.generate([65] * 20, max_tokens=1)); model.itself = model; del model; gc.collect()", 0),
    ],
    ids=["after an answer", "in the middle of one", "in the middle of a generation", "not at all"],
)
def test_a_program_that_does_not_close_it(code: str, status: int, tiny: Tiny) -> None:
    assert run(code, tiny("llama")) == (status, "", "")


_FORK = """
from flashmoe.errors import UsageError

def text():
    return "".join(model.generate("a b c", max_tokens=9, sampling=SamplingParams(temperature=0)))

before = text()
child = os.fork()
if not child:
    for use in (text, lambda: model.start([1, 2]).step(), lambda: model.embed("a"), model.server):
        try:
            use()
        except UsageError as error:
            assert "before the process was forked" in str(error)
        else:
            os._exit(1)
    model.close()
    del model
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert text() == before
model.close()
"""


def test_forked(tiny: Tiny) -> None:
    """A child neither uses nor ends what its parent has, and comes to its own end."""
    assert run(_FORK, tiny("llama")) == (0, "", "")
