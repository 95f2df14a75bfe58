"""Stack size of the library's threads: its tokenizers match long texts recursively (std::regex)."""

from __future__ import annotations

import ctypes as C
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from flashmoe.common.memory import address_room
from flashmoe.errors import LibraryError

_Result = TypeVar("_Result")

_WANTED = 1 << 30  # of addresses: memory is taken page by page, as it is used
_MODEST, _LEAST = 64 << 20, 2 << 20  # where addresses are limited, or count as memory
_SHARE = 64  # a stack may then take one of so many parts of those that are left
BYTES_PER_CHARACTER = 350  # of stack, of a run of equal characters: 25,000 overflow the usual 8 MiB


def on_large_stack(call: Callable[[], _Result]) -> _Result:
    """What `call` returns, or raises, in a thread with a large stack."""
    raise_thread_stacks()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


@cache
def raise_thread_stacks() -> int:
    """Give the threads that are made from here on large stacks; returns their size in bytes, 0 where unknown."""
    room = address_room()
    size = min(_MODEST, max(_LEAST, room[0] // _SHARE // _LEAST * _LEAST)) if room else _WANTED
    try:
        libc = C.CDLL(None)
        attributes = C.create_string_buffer(256)  # pthread_attr_t
        if libc.pthread_attr_init(attributes) or libc.pthread_attr_setstacksize(attributes, C.c_size_t(size)):
            return 0
        return 0 if libc.pthread_setattr_default_np(attributes) else size
    except AttributeError:  # another libc than GNU's
        return 0


def threads_to_be_had(count: int) -> int:
    """How many of so many threads more the system allows: the library ends the process where it refuses one."""
    done = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait, name="flashmoe-check", daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        pass
    finally:
        done.set()
        for thread in started:
            thread.join()
    return len(started)


def check_threads(count: int) -> None:
    """Raise LibraryError where so many threads more cannot be had."""
    if (started := threads_to_be_had(count)) < count:
        raise LibraryError(
            f"the system refuses {count} threads more ({started} could be started): raise its limits of processes "
            "(ulimit -u, a container's pids) or of addresses (ulimit -v)"
        )
