"""The documentation: every command and every Python example in it works, or says why it is not run here."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.runner import flashmoe

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs/reference/cli.md"
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - {GENERATED})]
REASONS = {
    "needs a download", "needs a big model", "takes minutes", "takes hours", "sets up an environment",
    "listens on all addresses", "needs a GPU",
}  # fmt: skip
_FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- not run: (?P<reason>.*?) -->\n *)?```(?P<kind>\w*)\n(?P<text>.*?)^ *```$",
    re.M | re.S,
)
_COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )?(?:flashmoe|python|pip|make|curl|printf|venv|git) ?", re.M)

_QUOTED = re.compile(r"""'[^']*'|"[^"$`\\!]*\"""")
_OURS = re.compile(r"flashmoe (?:plan\b|(?!serve\b|.* --ram\b))")
LIMIT = ("-n", "16")  # of a run that would generate as long as the model likes

# `flashmoe` of this tree; a server is started beside the other commands, where it is free to
SHIM = """#!/bin/bash
if [ "$1" = serve ]; then
    {python} -m flashmoe.cli "$@" --port $PORT >serve.log 2>&1 &
    echo $! >>servers
    for _ in $(seq 600); do
        curl -sf http://127.0.0.1:$PORT/health >/dev/null && exit 0
        kill -0 $! 2>/dev/null || break
        sleep 0.1
    done
    cat serve.log
    exit 1
fi
[ "$1" = run ] && [[ " $* " != *" -n "* ]] && set -- "$@" {limit}
{python} -m flashmoe.cli "$@"
status=$?
[ "$1" = doctor ] && [ $status = 1 ] && exit 0  # of this machine, not of the documentation
exit $status
"""


class Fence(NamedTuple):
    """A block of code; `reason`: why it is not run, "" where it is."""

    kind: str
    text: str
    reason: str
    line: int


def fences(page: Path) -> list[Fence]:
    """All blocks of a page that hold commands or Python."""
    content = page.read_text()
    found = []
    for match in _FENCE.finditer(content):
        indent = match["indent"]
        text = "\n".join(line.removeprefix(indent) for line in match["text"].splitlines())
        if match["kind"] == "python" or (match["kind"] in ("", "sh") and _COMMAND.search(text)):
            line = content.count("\n", 0, match.start()) + 1
            found.append(Fence(match["kind"], text, match["reason"] or "", line))
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


TO_RUN = [page for page in PAGES if any(not fence.reason for fence in fences(page))]


@pytest.fixture(scope="module")
def trace(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short routing trace of the bundled model, for pages that begin with one."""
    path = tmp_path_factory.mktemp("trace") / "my.safetensors"
    arguments = ("run", demo, "-p", "The lighthouse", "-n", 64, "-t", 1, "--trace", path, "-q")
    assert flashmoe(*arguments).status == 0
    return path


@pytest.fixture
def folder(demo: Path, trace: Path, tmp_path: Path) -> Iterator[Path]:
    """Where a page's commands run: a model of the user's, prompts, a trace. Servers end with it."""
    for copy in ("MODEL.gguf", "model.gguf"):
        shutil.copy(demo, tmp_path / copy)
    shutil.copy(trace, tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The lighthouse"}\n{"prompt": "A recipe"}\n')
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "flashmoe"
    shim.write_text(SHIM.format(python=shlex.quote(sys.executable), limit=" ".join(LIMIT)))
    shim.chmod(0o755)
    yield tmp_path
    servers = tmp_path / "servers"
    for pid in servers.read_text().split() if servers.exists() else []:
        os.kill(int(pid), signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def is_simple(fence: Fence) -> bool:
    """Whether all that a shell does with a block's lines is to split them into words, each a command of ours.

    Servers are processes of their own; and a budget (`--ram`) is of a whole process, and this one holds much else.
    """
    bare = [_QUOTED.sub("", line).partition("#")[0] for line in fence.text.splitlines()]
    return fence.kind != "python" and not any(
        line and (not _OURS.match(line) or set(line) & set("|&;<>$`\\*?~(){}[]'\""))
        for line in map(str.strip, bare)
    )


def run(page: Path, folder: Path) -> str:
    """Run everything on a page in its order; what it printed."""
    port, printed = free_port(), ""
    todo = [(i, fence) for i, fence in enumerate(fences(page)) if not fence.reason]
    for simple, group in itertools.groupby(todo, lambda item: is_simple(item[1])):
        blocks = list(group)
        printed += run_here(blocks) if simple else run_by_shell(blocks, folder, port)
    return printed


def run_here(blocks: Iterable[tuple[int, Fence]]) -> str:
    """Run simple blocks in this process, which has imported what each would."""
    printed = ""
    for line in (line for _, fence in blocks for line in fence.text.splitlines()):
        if arguments := shlex.split(line, comments=True)[1:]:
            long = arguments[0] == "run" and "-n" not in arguments
            result = flashmoe(*arguments, *(LIMIT if long else ()))
            printed += result.out + result.err
            assert result.status == 0 or (arguments[0], result.status) == ("doctor", 1), printed
    return printed


def run_by_shell(blocks: Iterable[tuple[int, Fence]], folder: Path, port: int) -> str:
    """Run blocks as users do."""
    script = ["set -eo pipefail"]
    for i, fence in blocks:
        if fence.kind == "python":
            (folder / f"example{i}.py").write_text(fence.text + "\n")
            script.append(f"{shlex.quote(sys.executable)} example{i}.py")
        else:
            script.append(fence.text.replace("127.0.0.1:8080", f"127.0.0.1:{port}"))
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PORT": str(port)}
    source = str(ROOT / "src")
    environment["PYTHONPATH"] = (
        f"{source}:{environment['PYTHONPATH']}" if "PYTHONPATH" in environment else source
    )
    with open(folder / "printed", "w+") as printed:  # a pipe would wait for the servers
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT,
            timeout=280,
        )  # fmt: skip
        printed.seek(0)
        text = printed.read()
    assert done.returncode == 0, text
    return text


@pytest.mark.parametrize("page", TO_RUN, ids=name)
def test_commands(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any("curl" in fence.text or "serve" in fence.text for fence in fences(page)) and not shutil.which(
        "curl"
    ):
        pytest.skip("curl is not installed")
    monkeypatch.chdir(folder)
    printed = run(page, folder)
    assert "Traceback" not in printed
    if page.name == "serve.md":  # it asks for the metrics: the reference names all of them, and no others
        there = set(
            re.findall(r"^# TYPE (flashmoe_\w+?)(?:_total)? (?:counter|gauge|histogram)$", printed, re.M)
        )
        listed = set(
            re.findall(r"^\| `(flashmoe_\w+)`", (ROOT / "docs/reference/metrics.md").read_text(), re.M)
        )
        assert {metric for metric in there if not metric.endswith("_created")} == listed


def test_what_is_not_run_says_why() -> None:
    assert {fence.reason for page in PAGES for fence in fences(page)} - {""} <= REASONS


def test_commands_are_found() -> None:
    """A page whose fences are written in another way would not be tested."""
    for page in PAGES:
        found = "\n".join(fence.text for fence in fences(page))
        for line in re.findall(r"^ *((?:flashmoe|pip install|python scripts) .*)$", page.read_text(), re.M):
            assert line.strip() in found or line.count("`") % 2, (name(page), line)


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]} | {"reference/cli.md"}
    assert listed == there
