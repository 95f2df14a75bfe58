"""Graphs that the library's server evaluates: they come unannounced, and are counted when they have ended."""

from __future__ import annotations

import ctypes as C
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from flashmoe.engines.llamacpp.control import Control
from flashmoe.engines.llamacpp.counts import Evaluated


class ServedGraphs:
    """Which phase a graph is of, when a prompt begins, and who is told. All in the thread that evaluates."""

    def __init__(
        self,
        parallel: int = 1,
        n_vocab: int = 0,
        on_prompt: Callable[[], Any] = lambda: None,
        on_graph: Callable[[Evaluated], None] = lambda _: None,
        on_error: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        """parallel: a graph of at most so many tokens is counted as decoding. n_vocab: tokens of the vocabulary.

        on_prompt: called before a graph of more tokens that follows one that decodes. on_graph: told of what has
        succeeded, also in the thread of `RouterHook.collect`; on_error: why a graph has failed.
        """
        self.parallel, self._n_vocab = parallel, n_vocab
        self._on_prompt, self.on_graph, self.on_error = on_prompt, on_graph, on_error
        self._prompting = False
        self._began = 0.0
        self._tokens: list[int] = []
        self._threads: set[int] = set()

    def token_ids(self, control: Control) -> list[int]:
        """The ids of the tokens of the graph that begins; -1 where only their number is known."""
        if (thread := threading.get_ident()) not in self._threads:
            # the library's thread: Python's state of it stays, instead of being made anew for every callback
            self._threads.add(thread)
            C.pythonapi.PyGILState_Ensure()
        ids = np.frombuffer(C.string_at(control.inputs, 4 * control.tokens), np.int32).tolist()
        if min(ids) < 0 or max(ids) >= self._n_vocab:
            return [-1] * len(ids)  # not set: the graph is fed with embeddings
        return ids

    def phase(self, tokens: int) -> str:
        """Of a graph of so many tokens."""
        return "decode" if tokens <= self.parallel else "prefill"

    def begin(self, tokens: list[int]) -> None:
        """A graph of these tokens begins."""
        before, self._prompting = self._prompting, len(tokens) > self.parallel
        if self._prompting and not before:
            self._on_prompt()
        self._tokens, self._began = tokens, time.perf_counter()

    def end(self, faults: int) -> None:
        """It has been evaluated. faults: major page faults meanwhile."""
        seconds = time.perf_counter() - self._began
        self.on_graph(Evaluated(self._tokens, not self._prompting, seconds, faults))
