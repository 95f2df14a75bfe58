"""Signal handlers that raise, wherever they do: nothing wrong is computed afterwards, and no slot is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmoe.common import signals
from flashmoe.common.signals import SafeLock, let_through, run_apart
from tests.faults.storm import KINDS, Struck, handlers

ROOT = Path(__file__).parents[2]
ROUNDS = 60
pytestmark = pytest.mark.timeout(300, method="thread")  # SIGALRM is one of the signals here


@pytest.fixture(autouse=True)
def struck() -> Iterator[None]:
    with handlers():
        yield


@pytest.mark.parametrize("kinds", [KINDS[:3], KINDS[3:]], ids="+".join)
def test_storm(kinds: tuple[str, ...]) -> None:
    """Logits afterwards equal those before, and each slot is accounted for."""
    if "transformers" in kinds:
        pytest.importorskip("transformers")
    command = [sys.executable, "-m", "tests.faults.storm", *kinds, str(ROUNDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for kind, line in zip(kinds, done.stdout.splitlines()[-len(kinds) :], strict=True):
        found = json.loads(line)
        assert found["equal"], kind
        assert found["slots"] == found["slots_before"], kind
        assert sum(found["ended"].values()) == ROUNDS
        assert found["ended"].get("finished", 0) < ROUNDS * 0.7, kind


def test_a_lock_holds_signals_back_until_it_is_free() -> None:
    lock, seen = SafeLock(), []

    def section() -> None:
        with lock:
            with lock:
                signal.raise_signal(signal.SIGINT)
                seen.append("inside")
            seen.append("still inside")

    with pytest.raises(KeyboardInterrupt):
        section()
    assert seen == ["inside", "still inside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_all_signals_that_were_held_back_are_handled() -> None:
    handled: list[int] = []

    def note(number: int, _frame: object) -> None:
        handled.append(number)
        raise Struck

    def section() -> None:
        with SafeLock():
            for number in (signal.SIGALRM, signal.SIGUSR1, signal.SIGINT):
                signal.raise_signal(number)

    for number in (signal.SIGALRM, signal.SIGUSR1):
        signal.signal(number, note)
    with pytest.raises((Struck, KeyboardInterrupt)):
        section()
    assert sorted(handled) == [signal.SIGUSR1, signal.SIGALRM]
    assert signal.getsignal(signal.SIGALRM) is note


def test_signals_are_let_through_where_that_is_harmless() -> None:
    lock, seen = SafeLock(), []

    def section() -> None:
        with lock:
            signal.raise_signal(signal.SIGUSR1)
            seen.append("held back")
            let_through()
            seen.append("not reached")

    with pytest.raises(Struck):
        section()
    assert seen == ["held back"]
    with lock:  # nothing is left over
        let_through()


def test_a_lock_that_another_thread_holds_can_be_given_up() -> None:
    lock = SafeLock()
    taken, go = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            go.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(20)
    main = threading.main_thread().ident or 0
    threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGUSR1)).start()
    with pytest.raises(Struck), lock:
        pytest.fail("the lock was not free")
    go.set()
    thread.join()
    with lock:
        pass


def test_what_runs_apart_ends_before_the_signal_is_raised() -> None:
    stop, done = threading.Event(), []
    main = threading.main_thread().ident or 0

    def work() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        assert stop.wait(20)
        done.append(threading.current_thread().name)

    with pytest.raises(KeyboardInterrupt):
        run_apart(work, stop.set)
    assert done == ["flashmoe-main"]


def test_what_runs_apart_returns_and_raises() -> None:
    assert run_apart(lambda: run_apart(lambda: 7, lambda: None), lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        run_apart(lambda: 1 / 0, lambda: None)


def test_a_forked_process_has_a_thread_of_its_own() -> None:
    run_apart(lambda: None, lambda: None)
    child = os.fork()
    if not child:
        os._exit(run_apart(lambda: 42, lambda: None))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert not signals._held.depth
