"""A full disk, and processes that are killed: files are whole, old or new, and a user gets one line."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from flashmoe.bench.cgroup import memory_group
from flashmoe.common.files import write_atomically
from flashmoe.common.plotting import new_figure, save_figure
from flashmoe.errors import FlashMoEError
from flashmoe.routing.trace import RoutingTrace
from flashmoe.storage import hub
from flashmoe.storage.gguf import read_gguf
from tests.cli.runner import COMMAND, flashmoe, own_process
from tests.conftest import Tiny
from tests.learn.test_learned import untrained as untrained_policy
from tests.prefetch.test_predictors import untrained as untrained_predictor
from tests.simulate.traces import made_up

SIZE = 64 << 10


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB with room for one page."""
    folder = tmp_path / "small"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={SIZE}".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options) != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here ({os.strerror(ctypes.get_errno())})")
    (folder / "ballast").write_bytes(bytes(SIZE - 4096))
    yield folder
    libc.umount2(os.fsencode(folder), 2)


def check(folder: Path, name: str, before: bytes) -> None:
    """The old file is as it was, and nothing half-written lies beside it."""
    assert (folder / name).read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"ballast", name}


@pytest.mark.parametrize("kind", ["trace", "policy", "predictor", "figure"])
def test_files_on_a_full_disk(kind: str, small: Path) -> None:
    path = small / ("f.png" if kind == "figure" else "f.safetensors")
    path.write_bytes(b"what was there before")
    save = {
        "trace": made_up(2000).save,
        "policy": untrained_policy("flashmoe", 3, 16, 2).save,
        "predictor": untrained_predictor(8, 32).save,
        "figure": partial(save_figure, new_figure(6, 6)),
    }[kind]
    with pytest.raises(FlashMoEError, match="cannot write .*No space left on device"):
        save(path)
    check(small, path.name, b"what was there before")


def test_reports_on_a_full_disk(small: Path, tiny: Tiny, tmp_path: Path) -> None:
    (small / "ballast").write_bytes(bytes(SIZE))
    run = ("run", tiny("llama"), "-p", "hello", "-n", 2, "-t", 1, "--cache", "50%", "-q")
    made_up(200).save(tmp_path / "t.safetensors")
    simulate = ("simulate", tmp_path / "t.safetensors", "--policy", "lru", "--capacity", "25%", "-q")
    for arguments in ((*run, "--json", small / "r.json"), (*run, "--trace", small / "t.safetensors"),
                      (*simulate, "--json", small / "s.json")):  # fmt: skip
        result = flashmoe(*arguments)
        assert result.status == 1
        assert "No space left on device" in result.message
        assert {path.name for path in small.iterdir()} == {"ballast"}


def test_notes_on_a_full_disk_are_done_without(small: Path, tiny: Tiny) -> None:
    """The notes of the drive and of tested libraries: made again next time."""
    (small / "ballast").write_bytes(bytes(SIZE))
    run = ("run", tiny("llama"), "-p", "hello", "-n", 2, "-t", 1, "--cache", "50%", "-q")
    assert own_process(*run, env={"XDG_CACHE_HOME": str(small)}).status == 0


def test_output_that_is_full(tiny: Tiny) -> None:
    command = [
        *COMMAND,
        "run",
        str(tiny("llama")),
        "-p",
        "hello",
        "-n",
        "2",
        "-t",
        "1",
        "--cache",
        "50%",
        "-q",
    ]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: the output cannot be written (No space left on device)"


@pytest.mark.parametrize("content", ["{", "[null]"])
def test_notes_that_are_damaged_are_made_again(content: str, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "flashmoe").mkdir()
    for name in ("drives.json", "libraries.json"):
        (tmp_path / "flashmoe" / name).write_text(content)
    run = ("run", tiny("llama"), "-p", "hello", "-n", 2, "-t", 1, "--cache", "50%", "-q")
    assert flashmoe(*run, env={"XDG_CACHE_HOME": str(tmp_path)}).status == 0


WRITER = """
import sys
from pathlib import Path
from flashmoe.common.files import write_atomically
print("ready", flush=True)
while True:
    for letter in b"ab":
        write_atomically(Path(sys.argv[1]), bytes([letter]) * 300_000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_while_it_writes(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"a" * 300_000)
    for i in range(12):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.002 * i)
        process.send_signal(number)
        process.wait()
        process.stdout.close()
        content = path.read_bytes()
        assert len(content) == 300_000
        assert content in (b"a" * 300_000, b"b" * 300_000)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_while_it_generates(number: signal.Signals, tmp_path: Path) -> None:
    """Nothing has to be mended afterwards, no half-written file or temporary folder is left, and the next run works."""
    trace, report = tmp_path / "t.safetensors", tmp_path / "r.json"
    arguments = (
        "run",
        "demo",
        "-p",
        "The",
        "--temp",
        3,
        "--top-k",
        0,
        "--min-p",
        0,
        "-t",
        1,
        "--cache",
        "25%",
        "--trace",
        trace,
        "--json",
        report,
    )
    for characters in (1, 20, 60):
        command = [*COMMAND, *map(str, arguments), "-n", "400"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        assert process.stdout
        process.stdout.read(characters)
        process.send_signal(number)
        assert process.wait() == (-number if number == signal.SIGKILL else 128 + number)
        process.stdout.close()
        assert not list(tmp_path.iterdir())
    assert flashmoe(*arguments, "-n", 8).status == 0
    assert RoutingTrace.load(trace).n_tokens
    assert json.loads(report.read_text())["decode"]["tokens"]


def test_out_of_memory_in_a_control_group(tmp_path: Path) -> None:
    """A limit below what was promised to the model: the kernel kills the process, and nothing is left behind."""
    group = memory_group(48 << 20)
    if group is None:
        pytest.skip("no right to make a control group")
    with group:
        arguments = (
            "run",
            "demo",
            "-p",
            "The",
            "-n",
            "8",
            "-t",
            "1",
            "--ram",
            "300MiB",
            "--json",
            tmp_path / "r.json",
        )
        done = subprocess.run(
            group.command([*COMMAND, *map(str, arguments)]), capture_output=True, text=True, timeout=120
        )
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())
        killed = group.usage().oom_kills > 0
    assert killed or "memory" in done.stderr
    assert read_gguf(hub.demo_model()).size
