"""`serve --learn-when-idle`: trains `flashmoe+` from what is remembered of the model while no request runs.

The training is a process of its own (learn/child.py), of the lowest priority. It is stopped the moment a request comes,
and goes on when none has run for some time again. What it may take is out of the server's budget: the pool gives that
back before it starts, and has it again when it has ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flashmoe.common.children import module_command
from flashmoe.common.plugins import DEFAULT
from flashmoe.learn.remembered import LEARNT, LEAST, memory_for
from flashmoe.runtime.learning import Learning

_GROWN = 0.1  # of what was judged on last: so much more must have been used before it is trained again
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class IdleLearning:
    """Trains when no request has run for `seconds`. It lives in the event loop."""

    def __init__(self, learning: Learning, seconds: float, say: Callable[[str], None]) -> None:
        """say: called with what came of it, a line for the user."""
        self._learning, self._seconds, self._say = learning, seconds, say
        self._child: Process | None = None
        self._judged = self._judged_at = 0  # tokens that were remembered then, and those of this session
        self._requests = asyncio.Event()  # set while requests run
        self._stopped = asyncio.Event()  # set from when the child is stopped until it may go on
        self._quiet = asyncio.Event()  # set while no request runs
        self._quiet.set()

    def on_requests(self, running: bool) -> None:
        """Requests run from here on, or run no longer."""
        (self._requests if running else self._quiet).set()
        (self._quiet if running else self._requests).clear()
        if running and self._child is not None:
            self._stopped.set()
            self._signal(signal.SIGSTOP)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._idle()
            new = self._learning.tokens - self._judged_at
            if new > _GROWN * self._judged and not await self._train():
                return
            await self._requests.wait()

    async def _idle(self) -> None:
        """Wait until no request has run for `seconds`."""
        while True:
            await self._quiet.wait()
            try:
                await asyncio.wait_for(self._requests.wait(), self._seconds)
            except asyncio.TimeoutError:
                return

    async def _train(self) -> bool:
        """Train, judge, and say what came of it; False where it is not to be tried again."""
        learning = self._learning
        self._judged_at = learning.tokens
        known = await asyncio.to_thread(learning.keep_routing)
        if known < LEAST:
            return True
        self._judged = known
        most = 0
        if learning.governor is not None:
            most = memory_for(learning.remembered)
            if not await asyncio.to_thread(learning.governor.reserve, most):
                self._say(
                    f"not learning while idle: training takes {most >> 20} MiB, more than the budget has left"
                )
                return False
        try:
            found = await self._run_child({"model": learning.remembered.model, "most_bytes": most})
        finally:
            if learning.governor is not None:
                await asyncio.to_thread(learning.governor.reserve, 0)
        self._say(in_words(found))
        return True

    async def _run_child(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What learn/child.py answers."""
        child = self._child = await asyncio.create_subprocess_exec(
            *module_command("flashmoe.learn.child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,  # Ctrl-C is for the server
        )
        answer = asyncio.create_task(child.communicate(json.dumps(asked).encode()))
        try:
            if self._requests.is_set():  # while it was started
                self.on_requests(True)
            while not answer.done():
                stopped = asyncio.create_task(self._stopped.wait())
                await asyncio.wait((answer, stopped), return_when=asyncio.FIRST_COMPLETED)
                stopped.cancel()
                if self._stopped.is_set():
                    await self._idle()
                    self._stopped.clear()
                    self._signal(signal.SIGCONT)
            out, _ = await answer
        finally:
            answer.cancel()
            self._child = None
            self._stopped.clear()
            with suppress(ProcessLookupError):
                child.kill()
            await asyncio.shield(child.wait())
        try:
            found: dict[str, Any] = json.loads(out)
        except ValueError:
            found = {"error": f"the process ended with status {child.returncode}"}
        return found

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if self._child is not None:
                self._child.send_signal(number)


def in_words(found: dict[str, Any]) -> str:
    """What came of a training: a `Verdict` as a dict, or `error`."""
    if "error" in found:
        return f"learning while idle failed: {found['error']}"
    rates = ", ".join(
        f"{100 * row[LEARNT]:.1f} % instead of {100 * row[DEFAULT]:.1f} % at {capacity}"
        for capacity, row in found["held_out"].items()
    )
    of = f"{found['tokens']} tokens while idle, hits of the newest {found['held_out_tokens']}"
    next_start = "better: the next start uses it" if found["better"] else "the next start goes on as before"
    return f"learnt from {of}: {rates}; {next_start}"
