"""The asynchronous side of jobs: what the engine's thread makes arrives here, and a client that goes ends its jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from flashmoe.generation import Token
from flashmoe.server.scheduler import Job, Scheduler
from flashmoe.server.text import TextStream
from flashmoe.server.tools import Call, CallReader

PING_SECONDS = 15.0  # of silence, after which a stream says that it lives


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Part:
    """What is new of one choice. `reason` is why it ended, None before the end."""

    index: int
    text: str
    tokens: Sequence[Token] = ()
    calls: Sequence[Call] = ()
    reason: str | None = None


class Choice:
    """Listens to one job: turns its tokens into text and calls, and sends them to the event loop."""

    def __init__(self, index: int, answer: Answer, text: TextStream, reader: CallReader) -> None:
        self._index, self._answer, self._text, self._reader = index, answer, text, reader

    def token(self, token: Token) -> bool:
        text, tokens = self._text.feed(token)
        said = self._reader.feed(text)
        if said or tokens:
            self._answer.put(Part(self._index, said, tokens))
        return not self._text.stopped

    def done(self, job: Job) -> None:
        text, tokens = self._text.flush()
        said = self._reader.feed(text)
        rest, calls = self._reader.end()
        self._answer.put(Part(self._index, said + rest, tokens, calls, job.outcome))

    def failed(self, error: BaseException) -> None:
        self._answer.put(error)


class Answer:
    """The jobs of one request."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Part | BaseException] = asyncio.Queue()
        self.jobs: list[Job] = []
        self._watch: asyncio.Task[None] | None = None

    def put(self, news: Part | BaseException) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    def start(self, request: Request, jobs: Sequence[Job]) -> None:
        """Submit the jobs, and end them when the client goes. Raises what `Scheduler.submit` raises."""
        self.jobs = list(jobs)
        try:
            for job in jobs:
                self._scheduler.submit(job)
        except BaseException:
            self._cancel()
            raise
        self._watch = asyncio.create_task(self._end_with(request))

    async def parts(self, ping: float | None = None) -> AsyncIterator[Part | None]:
        """What comes, until all choices have ended; None after `ping` seconds of silence.

        Raises ClientGone, and what made a job fail. Whoever stops asking ends the jobs.
        """
        try:
            left = len(self.jobs)
            while left:
                try:
                    news = await asyncio.wait_for(self._news.get(), ping)
                except asyncio.TimeoutError:
                    yield None
                    continue
                if isinstance(news, BaseException):
                    raise news
                left -= news.reason is not None
                yield news
        finally:
            self._cancel()
            if self._watch:
                self._watch.cancel()

    def _cancel(self) -> None:
        for job in self.jobs:
            self._scheduler.cancel(job)

    async def _end_with(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._cancel()
        self._news.put_nowait(ClientGone())
