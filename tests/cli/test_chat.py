"""`flashmoe chat`: through a pipe, and at a real terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pexpect
import pyte
import pytest

from tests.cli.runner import COMMAND, Result, flashmoe
from tests.conftest import Tiny

QUESTION = "What is a mixture of experts?"
ANSWER = "A mixture of experts is a neural network"
LONG = ("--temp", 2, "--top-k", 0, "--top-p", 1, "--min-p", 0)  # hardly ever comes to an end


def chat(*arguments: object, stdin: str, model: Path | str = "demo") -> Result:
    """`flashmoe chat`, greedy, lines from a pipe."""
    return flashmoe("chat", model, "-t", 1, "--cache", "50%", "--temp", 0, *arguments, stdin=stdin)


def test_a_line_is_a_turn(demo: Path, tmp_path: Path) -> None:
    result = chat("-n", 24, "--json", tmp_path / "r.json", stdin=f"{QUESTION}\n\nAnd why?\n")
    assert result.status == 0, result.err
    assert result.out.startswith(ANSWER)
    assert "tokens/s" in result.err
    assert "tokens/s" not in result.out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["text"] == result.out.rstrip("\n")
    alone = chat("-n", 24, stdin=QUESTION)
    assert result.out.startswith(alone.out)
    assert len(result.out) > len(alone.out)


def test_a_turn_costs_only_its_new_tokens(demo: Path, tmp_path: Path) -> None:
    paths = tmp_path / "1.json", tmp_path / "2.json"
    chat("-n", 24, "--json", paths[0], stdin=QUESTION)
    chat("-n", 24, "--json", paths[1], stdin=f"{QUESTION}\nAnd why?\n")
    one, two = (json.loads(path.read_text())["prefill"]["tokens"] for path in paths)
    assert one < two < 2 * one


def test_first_answer_is_that_of_run(demo: Path) -> None:
    arguments = ("-t", 1, "--cache", "50%", "-n", 24, "--seed", 3)
    run = flashmoe("run", "demo", "--chat", "-p", QUESTION, *arguments)
    assert flashmoe("chat", "demo", *arguments, stdin=QUESTION).out == run.out


def test_quiet(demo: Path) -> None:
    result = chat("-n", 8, "-q", stdin=f"{QUESTION}\n/stats\n")
    assert result.out.startswith("A mixture")
    assert "context" in result.err  # it was asked for
    assert chat("-n", 8, "-q", stdin=QUESTION).err == ""


def test_commands_through_a_pipe(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    first = chat("-n", 12, "--system", "Be brief.", stdin=f"{QUESTION}\n/save {path}\n/quit\nnot read\n")
    assert first.status == 0, first.err
    saved = json.loads(path.read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][2]["content"] == first.out.rstrip("\n")
    whole = chat("-n", 12, "--system", "Be brief.", stdin=f"{QUESTION}\nWhy?\n/save {path}.2\n")
    again = chat("-n", 12, stdin=f"/load {path}\nWhy?\n/save {path}.3\n")
    assert again.status == whole.status == 0
    second, third = (json.loads(Path(f"{path}.{n}").read_text())["messages"] for n in (2, 3))
    assert [m["role"] for m in third] == [m["role"] for m in second]
    assert third[:4] == second[:4]


def test_system_and_reset(tiny: Tiny) -> None:
    def answers(*lines: str, system: str = "") -> str:
        return chat("-n", 12, "--system", system, stdin="\n".join(lines), model=tiny("llama")).out

    plain, other = answers(QUESTION), answers(QUESTION, system="You are a pirate.")
    assert other != plain
    assert answers("/system You are a pirate.", QUESTION) == other
    assert answers("/system", QUESTION, system="You are a pirate.") == plain
    assert answers(QUESTION, QUESTION) != plain + plain
    assert answers(QUESTION, "/reset", QUESTION) == plain + plain


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "no command /nope: /help lists them"),
        ("/", "no command /: /help lists them"),
        ("/save", "/save needs a file: /save FILE"),
        ("/reset all", "/reset takes nothing more"),
        ("/load /nowhere/talk.json", "cannot be read"),
        ("/save /proc/nowhere/talk.json", "cannot be written"),
        ("long " * 600, "shorten it or raise -c"),
    ],
)
def test_what_fails_ends_a_pipe(line: str, message: str, demo: Path) -> None:
    result = chat("-n", 4, stdin=line)
    assert result.status in (1, 2)
    assert message in result.message


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"messages": 3}', '{"messages": [{"role": "user", "content": 3}]}', "\xff"],
)
def test_file_that_is_no_conversation(text: str, demo: Path, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_bytes(text.encode("latin-1"))
    result = chat("-n", 4, stdin=f"/load {tmp_path / 'talk.json'}")
    assert result.status == 1
    assert "not a saved conversation" in result.message


def test_saved_messages_out_of_turn(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text('{"messages": [{"role": "assistant", "content": "hello"}]}')
    result = chat("-n", 4, stdin=f"/load {tmp_path / 'talk.json'}")
    assert "user and assistant in turns" in result.message


def test_path_is_no_command(demo: Path) -> None:
    assert chat("-n", 4, stdin="/etc/passwd is a file").status == 0


def test_input_that_is_not_text(demo: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "chat", "demo", "-t", "1", "--cache", "50%"],
        input=b"\xff\xfe\n",
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr


def test_model_without_template_speaks_chatml(tiny: Tiny) -> None:
    expected = chat("-n", 12, "--chat-template", "chatml", stdin="hello\nwhy?", model=tiny("olmoe"))
    result = chat("-n", 12, stdin="hello\nwhy?", model=tiny("olmoe"))
    assert (result.status, expected.status) == (0, 0)
    assert result.out == expected.out


def test_routing_can_be_recorded(demo: Path, tmp_path: Path) -> None:
    from flashmoe.routing.files import read

    chat("-n", 4, "--trace", tmp_path / "t.safetensors", stdin="one\ntwo\n/reset\nthree\n")
    assert read(tmp_path / "t.safetensors").n_sequences == 2


def test_full_context_is_said(demo: Path) -> None:
    lines = "\n".join(f"message number {n}, " + "long " * 50 for n in range(5))
    result = chat("-n", 4, "-c", 256, stdin=lines)
    assert result.status == 0
    assert "the model has forgotten" in result.err
    assert "forgotten" not in result.out


def test_interrupt_through_a_pipe(demo: Path, tmp_path: Path) -> None:
    """It ends, with what there is to report."""
    process = subprocess.Popen(
        [*COMMAND, "chat", "demo", "-t", "1", "--cache", "50%", "--json", str(tmp_path / "r.json")]
        + list(map(str, LONG)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"Tell me a story.\n" * 50)
    process.stdin.flush()
    assert os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"tokens/s" in err
    assert json.loads((tmp_path / "r.json").read_text())["text"]


class Terminal:
    """`flashmoe chat` at a pseudo-terminal of 200 lines, and what is to be seen there."""

    def __init__(self, *arguments: object, home: Path) -> None:
        env = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = [*COMMAND, "chat", "demo", "-t", "1", "--cache", "50%", *map(str, arguments)]
        self._screen = pyte.Screen(100, 200)
        self._stream = pyte.ByteStream(self._screen)
        self.process = pexpect.spawn(command[0], command[1:], env=env, dimensions=(200, 100), timeout=1)
        self.wait(lambda: self.lines[-1] == ">")

    @property
    def lines(self) -> list[str]:
        """The lines that are not empty."""
        return [line.rstrip() for line in self._screen.display if line.strip()] or [""]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Read what it writes until `condition` holds."""
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end, "\n".join(self.lines)
            with suppress(pexpect.TIMEOUT):
                self._stream.feed(self.process.read_nonblocking(1 << 16, 1))

    def type(self, line: str) -> int:
        """Type a line; returns the number of the screen's next."""
        self.process.send(line)
        self.wait(lambda: self.lines[-1] == f"> {line}")
        self.process.send("\r")
        return len(self.lines)

    def say(self, line: str) -> list[str]:
        """Type a line and wait for the next prompt; returns the lines in between."""
        start = self.type(line)
        self.wait(lambda: len(self.lines) > start and self.lines[-1] == ">")
        return self.lines[start:-1]

    def leave(self) -> int:
        """Ctrl-D: returns the exit status."""
        self.process.sendeof()
        with suppress(pexpect.EOF):
            self.wait(lambda: False)
        self.process.wait()
        assert not any("Traceback" in line for line in self.lines)
        return int(self.process.exitstatus)


@contextmanager
def terminal(home: Path, *arguments: object) -> Iterator[Terminal]:
    opened = Terminal(*arguments, home=home)
    try:
        yield opened
    finally:
        opened.process.close(force=True)


def test_conversation_at_a_terminal(demo: Path, tmp_path: Path) -> None:
    plain = chat("-n", 60, stdin=f"{QUESTION}\nAnd why?").out
    with terminal(tmp_path, "--temp", 0, "-n", 60) as user:
        first = user.say(QUESTION)
        assert " ".join(first).startswith(ANSWER)
        assert re.search(r"^\d+ tokens, [\d.]+ tokens/s, hit rate [\d.]+%$", first[-1])
        second = user.say("And why?")
        assert (" ".join(first[:-1]) + " " + " ".join(second[:-1])).split() == plain.split()
        stats = user.say("/stats")
        assert any(line.startswith("context ") for line in stats)
        assert "/system" in " ".join(user.say("/help"))
        assert "no command /nope" in user.say("/nope")[0]
        assert "cannot be read" in user.say("/load none")[0]
        assert user.say(f"/save {tmp_path}/talk.json")
        assert user.say("/reset") == ["a new conversation"]
        assert user.say(QUESTION)[:-1] == first[:-1]
        assert user.leave() == 0
        assert any("at most" in line for line in user.lines)
    history = tmp_path / "flashmoe" / "chat_history"
    assert f"+{QUESTION}" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_interrupt_stops_the_answer_only(demo: Path, tmp_path: Path) -> None:
    with terminal(tmp_path, *LONG, "-c", 512) as user:
        said: list[str] = []
        for _ in range(10):  # an answer may come to its end before
            start = user.type("Tell me a long story.")
            user.wait(lambda: len(user.lines) > start and len(user.lines[-1]) > 20)  # noqa: B023  waited for here
            user.process.sendintr()
            user.wait(lambda: user.lines[-1] == ">")
            said = user.lines[start:-1]
            if "(stopped)" in said:
                break
        assert "(stopped)" in said
        assert not any("^C" in line for line in said)
        assert any("context" in line for line in user.say("/stats"))
        user.process.sendintr()
        user.wait(lambda: user.lines[-2:] == ["Ctrl-D or /quit leaves", ">"])
        assert user.leave() == 0


@pytest.mark.parametrize("answering", [False, True], ids=["at the prompt", "in an answer"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_ended_at_a_terminal(number: signal.Signals, answering: bool, demo: Path, tmp_path: Path) -> None:
    """The terminal is as it was: a shell that follows shows what is typed."""
    with terminal(tmp_path, *LONG, "-c", 512) as user:
        keys = termios.tcgetattr(user.process.fileno())[3]
        assert not keys & termios.ECHO  # the line editor's
        if answering:
            user.type("Tell me a long story.")
        user.process.kill(number)
        with suppress(pexpect.EOF):
            user.wait(lambda: False)
        keys = termios.tcgetattr(user.process.fileno())[3]
        assert keys & termios.ECHO
        assert keys & termios.ICANON
        user.process.wait()
        assert user.process.exitstatus == 128 + number
        assert not any("Traceback" in line for line in user.lines)


def test_keys(demo: Path, tmp_path: Path) -> None:
    with terminal(tmp_path, "--temp", 0, "-n", 4) as user:
        user.process.send("one\x1b\rtwo")
        user.wait(lambda: user.lines[-2:] == ["> one", "  two"] or user.lines[-1].endswith("two"))
        user.process.send("\r")
        user.wait(lambda: user.lines[-1] == ">")
        user.say(f"/save {tmp_path}/talk.json")
        assert json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"] == "one\ntwo"
        user.process.send("\x1b[A")  # the line before
        user.wait(lambda: user.lines[-1] == f"> /save {tmp_path}/talk.json")
        user.process.sendintr()
        user.wait(lambda: user.lines[-1] == ">")
        user.process.send("/qu\t")
        user.wait(lambda: user.lines[-1] == "> /quit")
        user.process.send("\r")
        with suppress(pexpect.EOF):
            user.wait(lambda: False)
        user.process.wait()
        assert user.process.exitstatus == 0


def test_state_folder_that_cannot_be_written(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "flashmoe").write_text("not a folder")
    with terminal(tmp_path, "--temp", 0, "-n", 4) as user:
        assert user.say("hello")
        assert user.leave() == 0


def test_error_in_a_turn_is_not_the_end(demo: Path, tmp_path: Path) -> None:
    with terminal(tmp_path, "--temp", 0, "-n", 4, "-c", 256) as user:
        user.process.send("long " * 280 + "\r")
        user.wait(lambda: "shorten it or raise -c" in "".join(user.lines) and user.lines[-1] == ">")
        assert user.say("hello")
        assert user.leave() == 0
