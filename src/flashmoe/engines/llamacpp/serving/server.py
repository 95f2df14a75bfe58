"""llama.cpp's own server over the expert pool: chat templates, tools, samplers, batching, prefix reuse, HTTP.

It listens on a Unix socket of its own, for the front (flashmoe.server), and answers requests of this process without
HTTP (`chat`, `complete`).
"""

from __future__ import annotations

import atexit
import ctypes as C
import http.client
import json
import os
import queue
import secrets
import shutil
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from flashmoe.common.files import make_socket_folder
from flashmoe.common.text import printable
from flashmoe.engines.llamacpp.counts import Evaluated
from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.serving.borrow import lend
from flashmoe.engines.llamacpp.serving.options import ServerOptions
from flashmoe.engines.llamacpp.stack import BYTES_PER_CHARACTER, check_threads, raise_thread_stacks
from flashmoe.errors import LibraryError, ModelError, UsageError

Request = dict[str, Any]
Event = dict[str, Any]

_COMPUTE_ERROR = "Compute error."  # all that the server says of an evaluation that has failed
_ENDED = "there is no answer any more: the model was closed, or another prompt has taken its place"
_SHORT_TEXT = 1 << 16  # characters that are no danger anywhere
_LOOPS = 4  # threads of its own loops
_SOCKET = "http.sock"
_THREADS = 4  # of its HTTP side, beside one for each slot; more are made as they are needed


_running: weakref.WeakSet[InnerServer] = weakref.WeakSet()
_started = threading.Event()  # once one has been


class InnerServer:
    """The server of a LlamaEngine, which lends it its model and its context until `close`.

    Raises LibraryError where the engine's library has no server, and ModelError with what the server says.
    """

    def __init__(
        self,
        engine: LlamaEngine,
        options: ServerOptions,
        on_graph: Callable[[Evaluated], None],
        on_prompt: Callable[[], Any],
        on_failure: Callable[[], Any],
    ) -> None:
        """on_graph: told of what was evaluated; on_prompt: called when a prompt begins, on_failure when an evaluation
        has failed. All in the server's thread, and on_graph in that of `collect` too.
        """
        self._engine, self._on_failure = engine, on_failure
        self.n_ctx, self.parallel = engine.n_ctx, engine.sequences
        self.multimodal = options.mmproj is not None
        #: Why the last evaluation that failed did, "" where none has.
        self.last_error = ""
        self._error: BaseException | None = None
        self._requests: dict[threading.Thread, threading.Event] = {}  # under way, and what cancels them
        self._connections: set[_UnixConnection] = set()  # of requests to its HTTP side that are under way
        #: What clients of the socket must send as their key.
        self.key = secrets.token_urlsafe(32)
        folder = self._folder = make_socket_folder(_SOCKET)
        #: The path of its socket, for this process.
        self.socket = path = str(folder / _SOCKET)
        raise_thread_stacks()
        try:
            check_threads(engine.threads + engine.sequences + _THREADS + _LOOPS)
            params = _params(engine, options, path, self.key)
            control = engine.serve(on_prompt, on_graph, self._failed)

            def start() -> Any:
                server = _start(engine, params)
                self._socket = os.open(path, os.O_PATH | os.O_CLOEXEC)
                return server

            # the only reference to the library's object: it ends when that goes
            self._server, self._give_back = lend(
                engine.library, engine.model_pointer, engine.context_pointer, control, start
            )
        except BaseException:
            engine.unserve()
            self._remove_folder()
            raise
        _running.add(self)
        _started.set()
        if _connects(descriptor := f"/proc/self/fd/{self._socket}"):
            # clients come through it: a process that is killed leaves nothing behind
            self.socket = descriptor
            self._remove_folder()
        engine.rewind(0)
        # its loop forgets an end that comes before it has begun: have it answer something first
        self.ask("GET", "/slots")

    @property
    def longest_text(self) -> int:
        """Bytes of the longest text that is worth tokenizing."""
        return self._engine.longest_text

    def chat(self, request: Request) -> Iterator[Event]:
        """Events of a streamed /v1/chat/completions.

        Raises UsageError, also where `cancel` has ended it, ModelError, or why an evaluation failed.
        """
        self._check(request)
        return self._stream("handle_chat_completions", request)

    def complete(self, request: Request) -> Iterator[Event]:
        """Events of a streamed /v1/completions. Raises as `chat` does."""
        self._check(request)
        return self._stream("handle_completions", request)

    def collect(self) -> None:
        """Have all evaluations counted."""
        self._engine.collect()

    def count_tokens(self, request: Request) -> int:
        """Tokens of the prompt that a chat request makes. Raises as `chat` does."""
        self._check(request)
        answer = self.ask("POST", "/v1/chat/completions/input_tokens", request)
        return int(answer["input_tokens"])

    def _check(self, request: Request) -> None:
        """Refuse, as the front does, texts that end a tokenizer's thread; all when it is closed. Raises UsageError."""
        if self._server is None:
            raise UsageError(_ENDED)
        texts = [request.get("prompt"), *(message.get("content") for message in request.get("messages", ()))]
        longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
        dangerous = longest > _SHORT_TEXT or longest * BYTES_PER_CHARACTER > raise_thread_stacks()
        if dangerous and longest > self.longest_text:
            raise UsageError(
                f"a text of {longest} characters does not fit in the context: shorten it, or raise -c"
            )

    def ask(self, method: str, path: str, body: Request | None = None) -> Any:
        """A request to its HTTP side, as a client of this process; the answer's JSON. Raises as `chat` does."""
        status, answer = self.exchange(method, path, b"" if body is None else json.dumps(body).encode())
        if status >= 400:
            raise self._as_error(answer.get("error", answer) if isinstance(answer, dict) else answer)
        return answer

    def exchange(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        """The same without a look at what is asked and answered: status, and JSON. From any thread.

        Raises ModelError where there is no answer, also because of `cancel`.
        """
        connection = _UnixConnection(self.socket)
        self._connections.add(connection)
        try:
            headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"null")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ModelError(f"llama.cpp's server does not answer ({error})") from None
        finally:
            self._connections.discard(connection)
            connection.close()

    def _stream(self, handler: str, request: Request) -> Iterator[Event]:
        """Closing the iterator cancels the request. The caller's thread waits interruptibly."""
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        cancelled = threading.Event()

        def hear(event: Event) -> bool:
            """Whether the server is to stop."""
            events.put(event)
            return cancelled.is_set()

        def run() -> None:
            try:
                # not by a bound method: earlier builds make it refer to itself, and the server would not end with us
                getattr(type(self._server), handler)(self._server, {**request, "stream": True}, hear)
                events.put(None)
            except Exception as error:  # the server's refusals, as C++ exceptions
                events.put(UsageError(_ENDED) if self._server is None else error)

        worker = threading.Thread(target=run, name="flashmoe-request", daemon=True)
        self._requests[worker] = cancelled
        worker.start()
        try:
            while (event := events.get()) is not None and not cancelled.is_set():
                if isinstance(event, UsageError):
                    raise event
                if isinstance(event, BaseException):
                    raise UsageError(f"the request cannot be answered ({event})") from None
                if error := event.get("error") or (event if "code" in event and "message" in event else None):
                    raise self._as_error(error)
                yield event
            if cancelled.is_set():
                raise UsageError(_ENDED)
        finally:
            cancelled.set()
            worker.join()
            self._requests.pop(worker, None)

    def _as_error(self, error: Any) -> BaseException:
        message = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        if _COMPUTE_ERROR in message and self._error is not None:
            return self._error
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and 400 <= code < 500:
            hint = " (-c)" if "context size" in message else ""
            return UsageError(message + hint)
        return ModelError(f"llama.cpp's server failed ({message})")

    def _failed(self, error: BaseException) -> None:
        """An evaluation has failed, in the server's thread."""
        self._error, self.last_error = error, str(error)
        self._on_failure()

    def cancel(self) -> None:
        """End the requests of this process that are under way."""
        requests = list(self._requests.items())
        for _, cancelled in requests:
            cancelled.set()
        for connection in list(self._connections):
            connection.hang_up()
        for worker, _ in requests:
            worker.join()

    def close(self) -> None:
        """End it, and all requests that are under way. The engine has its context back, empty."""
        if self._server is None:
            return
        _running.discard(self)
        self.cancel()
        with self._engine.ignoring():
            # its destructor waits for its thread with Python's lock held: that one must not need Python any more,
            # nor log that its graph was ended
            self._engine.library.silence()
            self._engine.wait_until_idle()
            self._server = None
        self._give_back()
        self._engine.unserve()
        os.close(self._socket)
        self._remove_folder()

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


@atexit.register
def _close_all() -> None:
    """The interpreter ends, perhaps in the middle of an answer: no thread may come back to Python afterwards."""
    for server in list(_running):
        server.close()


def _leave_all() -> None:
    """A forked process has the library's objects without their threads, which destructors would wait for.

    So none is called: not those of servers, and at the end of the process not the library's own either.
    """
    for server in list(_running):
        C.pythonapi.Py_IncRef(C.py_object(server._server))
    _running.clear()
    if _started.is_set():
        libc = C.CDLL(None)
        libc.on_exit(C.cast(libc._exit, C.c_void_p), None)  # the last one registered is called first


os.register_at_fork(after_in_child=_leave_all)


def _connects(path: str) -> bool:
    """Whether a Unix socket is there: without /proc, and in some sandboxes, not by its descriptor."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(path)
        except OSError:
            return False
    return True


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)

    def hang_up(self) -> None:
        """Give up, from another thread than the one that waits for the answer."""
        with suppress(OSError, AttributeError):  # it is just being opened or closed
            self.sock.shutdown(socket.SHUT_RDWR)


def _start(engine: LlamaEngine, params: Any) -> Any:
    """The library's Server; what it evaluates while it starts is no graph of a request."""
    import xllamacpp

    engine.library.listen()
    with engine.ignoring():
        try:
            return xllamacpp.Server(params)
        except (RuntimeError, ValueError):
            # its own log is silent, and what it raises is the same for all reasons
            reason = (engine.library.messages or ["most likely it cannot use the chat template"])[-1]
            raise ModelError(
                f"llama.cpp's server does not start: {reason}; another template: --chat-template"
            ) from None


def _params(engine: LlamaEngine, options: ServerOptions, socket: str, key: str) -> Any:
    """The library's common_params. Raises LibraryError where it is another library than the wheel's."""
    if not engine.has_server:
        raise LibraryError(
            f"{engine.library.path}: chat and serve need llama.cpp's server, which only xllamacpp's library has"
        )
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = printable(str(engine.path))  # shown, and never opened
    params.n_ctx, params.n_parallel = engine.n_ctx * engine.sequences, engine.sequences
    params.n_batch, params.n_ubatch = engine.n_batch, engine.n_ubatch
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = engine.threads
    params.warmup = params.fit_params = False
    params.use_jinja = params.endpoint_metrics = True
    params.api_keys = [key]
    if hasattr(params, "hostnames"):
        params.hostnames = [socket]
    else:  # before 2026.10
        params.hostname = socket
    params.n_threads_http = engine.sequences + _THREADS
    params.verbosity = 0
    params.model_alias = {options.alias or printable(engine.path.stem)}
    params.chat_template = options.chat_template
    params.default_template_kwargs = {
        name: json.dumps(value) for name, value in options.chat_template_kwargs.items()
    }
    params.reasoning_format = _reasoning_format(xllamacpp, options.reasoning_format)
    params.sampling.reasoning_budget_tokens = options.reasoning_budget
    params.cache_ram_mib, params.n_ctx_checkpoints = options.cache_ram_mib, options.ctx_checkpoints
    params.cache_idle_slots = False  # each slot has room of its own: a copy of what it holds is no use
    if options.slot_save_path is not None:
        params.slot_save_path = f"{options.slot_save_path}/"
    if engine.pooling != "none":
        params.embedding = True
        params.pooling_type = getattr(
            xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{engine.pooling.upper()}"
        )
    if options.mmproj is not None:
        params.mmproj.path = _plain_path(options.mmproj, Path(socket).parent)
    for name, value in options.sampling.items():
        setattr(params.sampling, name, value)
    return params


def _plain_path(path: Path, folder: Path) -> str:
    """The path, or a link in `folder` to it where its name is no UTF-8, in which the library takes paths."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        link = folder / "projector.gguf"
        link.symlink_to(path.absolute())
        return str(link)
    return str(path)


def _reasoning_format(xllamacpp: Any, name: str) -> Any:
    found = f"COMMON_REASONING_FORMAT_{name.upper().replace('-', '_')}"
    kind = xllamacpp.common_reasoning_format
    if not hasattr(kind, found):
        raise UsageError(
            f"unknown reasoning format {name!r}: choose from none, auto, deepseek, deepseek-legacy"
        )
    return getattr(kind, found)
