"""What all tests share: tiny models made once, the library opened once, no trace left outside a temporary folder."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from flashmoe.common.machine import cores
from flashmoe.engines.llamacpp.library import Library, find_library, open_library
from flashmoe.engines.llamacpp.tested import tested_library
from flashmoe.storage import hub
from flashmoe.storage.aio import KernelQueue, Read
from tests.models import make

os.environ["GGML_NO_BACKTRACE"] = "1"  # an abort in the library must not start a debugger
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "4"  # its threads would spin while other tests compute
# a job in the background, or under nohup: tests interrupt all the same
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# the last: tests start hundreds of processes, and each would compile a hundred modules anew; so would each of these
for name in ("FLASHMOE_LIBLLAMA", "LLAMA_ARG_THREADS", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)
sys.dont_write_bytecode = False

# The same cases at every run: what fails has been changed. `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("same")

Tiny = Callable[[str], Path]
#: $XDG_CACHE_HOME as it was: kernels that the user has built need not be built again.
USERS_CACHE = os.environ.get("XDG_CACHE_HOME", "")
#: Files that take long, the longest first: begun last, one would keep a process busy when the others have ended.
LONGEST = (
    "docs/test_docs", "serving/test_equal", "serving/test_templates", "transformers/test_exact", "cache/test_policies",
    "simulate/test_simulate", "cli/test_chat", "faults/test_signals", "engines/test_exact", "serving/test_long_text",
    "transformers/test_parity", "bench/test_runs", "learn/test_adaptive", "faults/test_writes", "serving/test_clients",
    "serving/test_memory", "test_memory", "test_plan", "builder/", "server/", "serving/", "transformers/", "cache/",
)  # fmt: skip


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores, as a quarter of the time is spent waiting for servers and terminals; more than four would
    want more memory than most machines have."""
    return min(4, cores() + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of LONGEST, tests of a file in their own."""

    def place(item: pytest.Item) -> int:
        return next((i for i, part in enumerate(LONGEST) if part in item.nodeid), len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What has been imported stays: a million objects that need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels", type=Path, help="module of kernels to run the library with: libggml-cpu-*.so"
    )


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Notes (drives, tested libraries, downloads) go to a folder of this session's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("HF_HOME", str(folder / "huggingface"))
        yield folder


@pytest.fixture
def own_home(cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own for notes, in which nothing is noted but that the library has passed its self-test."""
    tested_library()
    folder = tmp_path / "cache"
    (folder / "flashmoe").mkdir(parents=True)
    shutil.copy(cache_home / "flashmoe" / "libraries.json", folder / "flashmoe")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """tiny("olmoe"): the path of a tiny model, made when first asked for. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make(name, folder / f"{name}.gguf")
        return made[name]

    return get


@pytest.fixture(scope="session")
def lib(request: pytest.FixtureRequest) -> Library:
    """The installed llama.cpp library, without the self-test: these tests are one."""
    return open_library(find_library(), request.config.getoption("--kernels"))


@pytest.fixture
def plain_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads through DirectFile.read_enclosing, which can be made to fail."""

    def start(self: KernelQueue, reads: list[tuple[int, Read]]) -> None:
        for number, read in reads:
            self._read_plainly(number, read)

    monkeypatch.setattr(KernelQueue, "start", start)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The bundled model."""
    path = hub.demo_model()
    if not path.is_file():
        pytest.skip(f"the bundled model is not there ({path.name})")
    return path
