"""Many requests at once: llama.cpp's server in this process, all of its slots filled until the last line.

Sequences that are evaluated together share each expert that is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flashmoe.engines.llamacpp.serving.bodies import does_not_fit, longest_text
from flashmoe.engines.llamacpp.serving.options import in_our_words
from flashmoe.errors import UsageError
from flashmoe.runtime.batch_file import Journal, Line, Requests, Result

if TYPE_CHECKING:
    from flashmoe.engines.llamacpp.serving.server import InnerServer

_AHEAD = 4  # requests that wait at the server, so that a slot that is free need not wait for us
_COMPUTE_ERROR = "Compute error."  # all that the server says of an evaluation that has failed


@dataclass(frozen=True)
class BatchFigures:
    """What a batch has done. tokens: that this process has made; seconds: that it took for them, loading aside."""

    lines: int
    answered_before: int  # by earlier processes
    failed: int  # lines whose answer is an error, earlier ones included
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}

    def line(self) -> str:
        """For the reader."""
        before = f", {self.answered_before} of them before" if self.answered_before else ""
        failed = f", {self.failed} with an error" if self.failed else ""
        return (
            f"{self.lines} lines answered{before}{failed}; "
            f"{self.tokens} tokens in {self.seconds:.1f} s, {self.tokens_per_second:.1f} tokens/s"
        )


def run_batch(
    server: InnerServer,
    requests: Requests,
    journal: Journal,
    progress: Callable[[int, int], Any] = lambda done, lines: None,
    exactly: Callable[[bytes], AbstractContextManager[None]] = lambda body: nullcontext(),
) -> BatchFigures:
    """Ask all requests whose answers are not in the journal, add these, and finish it.

    progress: called with the lines that are answered, and of all. exactly: for the time of a request, by its body, see
    `exactness.for_request`. Raises ModelError where the server does not answer; what was answered before is in the
    journal.
    """
    began, before, tokens = time.perf_counter(), len(journal), 0
    at_once = server.parallel + _AHEAD
    running: dict[Future[Result], Line] = {}

    def collect() -> int:
        """Take the answers that are there, one at least; their tokens."""
        done = wait(running, return_when=FIRST_COMPLETED).done
        results = [(running[work], work.result()) for work in done]
        journal.add(results)
        for work in done:
            del running[work]
        progress(len(journal), len(requests.ids))
        return sum(_tokens(result) for _, result in results)

    with ThreadPoolExecutor(at_once, "flashmoe-batch") as pool:
        try:
            for line in requests:
                if line in journal:
                    continue
                running[pool.submit(answer, server, line, exactly)] = line
                if len(running) == at_once:
                    tokens += collect()
            while running:
                tokens += collect()
        except BaseException:
            server.cancel()
            while wait(running, 0.1).not_done:  # one may just have begun
                server.cancel()
            journal.add((line, work.result()) for work, line in running.items() if not work.exception())
            raise
    seconds = time.perf_counter() - began
    journal.finish()
    return BatchFigures(len(journal), before, journal.failed, tokens, seconds)


def answer(
    server: InnerServer,
    line: Line,
    exactly: Callable[[bytes], AbstractContextManager[None]] = lambda body: nullcontext(),
) -> Result:
    """Ask the server, from any thread; refusals and errors are answers. Raises ModelError where there is none."""
    if line.refused:
        return line.result(error=line.refused)
    try:
        meanwhile = exactly(line.body)
    except UsageError as refused:
        return line.result(
            response=(400, {"error": {"message": str(refused), "type": "invalid_request_error"}})
        )
    most = server.longest_text
    if len(line.body) > most and (longest := longest_text(line.body)) > most:
        message = does_not_fit(longest, server.n_ctx, most)
        refusal = {"message": message, "type": "exceed_context_size_error", "code": "context_length_exceeded"}
        return line.result(response=(400, {"error": refusal}))
    with meanwhile:
        status, body = server.exchange("POST", line.url, line.body)
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and isinstance(said := error.get("message"), str):
        why = said == _COMPUTE_ERROR and server.last_error
        error["message"] = why or in_our_words(said)
    return line.result(response=(status, body))


def _tokens(result: Result) -> int:
    """That an answer has made."""
    body = (result["response"] or {}).get("body")
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return 0
    return int(usage.get("completion_tokens", usage.get("output_tokens", 0)) or 0)
