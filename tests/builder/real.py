"""Kernels that were built here: in use from the next start on, exact, in the server too; and taken from files.

Compiling them takes minutes: `make builds` runs these tests, pytest alone does not collect them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from flashmoe.engines.llamacpp import kernels
from flashmoe.engines.llamacpp.kernels import Kernels
from flashmoe.errors import FlashMoEError
from flashmoe.tools.kernels import build
from flashmoe.tools.kernels.toolchain import find_toolchain
from tests.builds import LAYOUTS, SPREAD, exact_cases
from tests.cli.runner import flashmoe, own_process
from tests.cli.test_json import check as check_names
from tests.conftest import USERS_CACHE
from tests.server.process import serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's cache folder for all tests of this file."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def built(home: Path) -> Kernels:
    """Kernels in use: the user's own where there are some, else made in a minute or two, faster or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", USERS_CACHE)
        users, theirs = kernels.folder(), kernels.in_use()
    if theirs:
        shutil.copytree(users, kernels.folder())
        return kernels.find(theirs.name)
    try:
        find_toolchain()
    except FlashMoEError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_FASTER", 0)
        made = flashmoe("engine", "build", "--json", home / "report.json")
    if "cannot be downloaded" in made.err:
        pytest.skip(made.err)
    assert made.status == 0, made.err
    report = json.loads((home / "report.json").read_text())
    check_names(report)
    assert f"{report['in_use']} in use from now on: " in made.out, report
    return kernels.find(report["in_use"])


def test_nothing_is_left_of_the_build(built: Kernels) -> None:
    there = {path.name for path in kernels.folder().iterdir()}
    assert there == {"lock", "in-use.json", built.module.parent.name}
    assert {path.name.split(".so")[0] for path in built.module.parent.glob("*.so*")} == {
        built.module.name.split(".so")[0],
        "libggml-base",
    }
    assert {"source", "compiler", "repacks", "decode_ratio", "prompt_ratio"} <= built.facts.keys()


def test_every_command_uses_them(built: Kernels, tmp_path: Path) -> None:
    run = own_process(
        "run", "demo", "--cache", "50%", "-p", "Hello", "-n", "8", "-t", "1", "--json", tmp_path / "r"
    )
    assert run.status == 0, run.err
    assert f"kernels {built.name} (" in run.err
    report = json.loads((tmp_path / "r").read_text())
    assert report["kernels"].startswith(f"{built.name} (")
    assert report["kernels_hint"] == ""
    doctor = own_process("doctor", tmp_path, "--json", "-")
    checks = {check["name"]: check for check in json.loads(doctor.out)}
    assert checks["library"]["facts"]["kernels"] == report["kernels"]
    bench = own_process(
        "bench", "demo", "--cache", "50%", "--against", "plain", "--layout", "plain", "--pairs", "1", "--tokens", "2",
        "--warmup", "0", "--prompt-tokens", "4", "-t", "1", "--allow-busy", "--json", tmp_path / "b",
    )  # fmt: skip
    assert bench.status == 0, bench.err
    measured = json.loads((tmp_path / "b").read_text())
    assert measured["machine"]["kernels"] == report["kernels"]
    assert measured["rows"][0][
        "same_logits"
    ]  # of stock on the same kernels: the built-in ones round otherwise


def test_exact(built: Kernels) -> None:
    """Ten architectures, three pools and both layouts, against stock llama.cpp on the same kernels."""
    layouts = LAYOUTS if built.facts["repacks"] else LAYOUTS[:1]
    cases = exact_cases(layouts)
    command = [sys.executable, "-m", "pytest", *SPREAD, *cases, "--kernels", str(built.module)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{len(cases)} passed" in done.stdout
    assert len(cases) == 10 * len(layouts)


def test_they_are_not_the_library_s_own(built: Kernels, tmp_path: Path) -> None:
    """Else equality with stock on the same kernels would show nothing."""
    code = """
import sys; from pathlib import Path
from flashmoe.engines.llamacpp.library import open_library, find_library
from flashmoe.tools import self_test as t
lib = open_library(find_library())
mixed = t.write_mixed_model(lib, Path(sys.argv[1]))
own = t._stock(lib, mixed, "plain")
lib.exchange_kernels(Path(sys.argv[2]))
new = t._stock(lib, mixed, "plain")
print(t._alike(own, new), all((a == b).all() for a, b in zip(own, new)))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "m.gguf"), str(built.module)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [
        "True",
        "False",
    ]


def test_the_server_uses_them(built: Kernels) -> None:
    """Two conversations at once get the text that one alone gets."""
    request: dict[str, Any] = {
        "model": "demo",
        "prompt": "The lighthouse",
        "max_tokens": 24,
        "temperature": 0,
    }
    with serving("demo", "--cache", "50%", "--parallel", 2) as server:
        info = httpx.get(f"{server.url}/flashmoe/info").json()
        assert info["kernels"].startswith(f"{built.name} (")
        with ThreadPoolExecutor(2) as pool:
            texts = [
                x.choices[0].text
                for x in pool.map(lambda _: server.client().completions.create(**request), "ab")
            ]
        alone = server.client().completions.create(**request).choices[0].text
    assert texts == [alone, alone]
    assert alone


def test_added_from_files(built: Kernels, tmp_path: Path) -> None:
    """As an npm package has them: folders of modules, with what they need beside them, and others' files."""
    place = tmp_path / "package" / "bins" / "linux-x64"
    shutil.copytree(built.module.parent, place)
    (place / "libggml-cpu-x.so").write_bytes(b"for another system")
    (place / "llama-addon.node").write_bytes(b"")
    archive = shutil.make_archive(str(tmp_path / "package"), "gztar", tmp_path, "package")
    other = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    added = own_process("engine", "add", archive, "--json", tmp_path / "r", env=other)
    assert added.status == 0, added.err
    tried = json.loads((tmp_path / "r").read_text())["tried"]
    assert [trial["name"] for trial in tried if trial["plain"]] == [built.name]
    assert all(trial["decode_ratio"] > 0 for trial in tried if trial["plain"])


def test_check(built: Kernels) -> None:
    done = own_process("engine", "check", "--json", "-")
    assert done.status == 0, done.err
    (trial,) = json.loads(done.out)
    assert (trial["name"], trial["plain"], trial["repacked"]) == (built.name, True, built.facts["repacks"])


def test_damaged_kernels_never_end_a_run(built: Kernels, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(os.environ["XDG_CACHE_HOME"], copy)
    (damaged,) = copy.rglob(built.module.name)
    data = bytearray(damaged.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    damaged.write_bytes(data)
    env = {"XDG_CACHE_HOME": str(copy)}
    run = own_process("run", "demo", "--cache", "50%", "-p", "Hello", "-n", "4", "-t", "1", env=env)
    assert run.status == 0, run.err
    assert "kernels built-in (" in run.err
    assert "the built-in ones are used" in run.err
    assert built.module.name in run.err
    check = own_process("engine", "check", env=env)
    assert (check.status, "does not work" in check.out) == (1, True)
