"""Arguments and options may come in any order."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import typer

from flashmoe.cli import make_app

CALLS = [
    ("run", [["MODEL"], ["--ram", "6GiB"], ["-q"]]),
    ("chat", [["MODEL"], ["--ram", "6GiB"], ["--save-cache"]]),
    ("serve", [["MODEL"], ["--port", "0"], ["-np", "2"]]),
    ("batch", [["MODEL", "in.jsonl", "out.jsonl"], ["-np", "16"], ["-q"]]),
    ("pack", [["MODEL"], ["-q"]]),
    ("verify", [["MODEL"], ["--json", "r.json"], ["-q"]]),
    ("doctor", [["."], ["-q"]]),
    ("plan", [["MODEL"], ["--ram", "4GiB,8GiB"], ["-q"]]),
    ("quality", [["MODEL"], ["--approx", "1"], ["-q"]]),
    ("simulate", [["t.npz"], ["--policy", "lru"], ["--first", "10"]]),
    ("bench", [["MODEL"], ["--ram", "50%"], ["--pairs", "2"]]),
    ("bench run", [["MODEL"], ["--ram", "50%"]]),
    ("bench", [["make-model", "OLMoE-1B-7B", "out.gguf"], ["--scale", "0.1"]]),
    ("bench make-model", [["OLMoE-1B-7B", "out.gguf"], ["--scale", "0.1"], ["--quant", "Q8_0"]]),
    ("learn", [["MODEL"], ["--forget"], ["--json", "r.json"]]),
    ("policies", [["--json", "r.json"], ["-q"]]),
    ("predictors", [["--json", "r.json"], ["-q"]]),
    ("trace record", [["MODEL"], ["--prompts", "p.txt"], ["-o", "t.npz"]]),
    ("trace info", [["t.npz"], ["--plot", "f.png"]]),
    ("trace import", [["t.npz"], ["-o", "t.safetensors"]]),
    ("trace merge", [["a.npz", "b.npz"], ["-o", "t.safetensors"]]),
    ("trace split", [["t.npz"], ["-o", "a", "b"], ["--share", "0.5"]]),
    ("engine build", [["xllamacpp.tar.gz"], ["--json", "r.json"], ["-q"]]),
    ("engine add", [["libggml-cpu-x.so"], ["--json", "r.json"], ["-q"]]),
    ("engine list", [["--json", "r.json"]]),
    ("engine use", [["built-in"]]),
    ("engine check", [["--json", "r.json"], ["-q"]]),
    ("engine remove", [["NAME"]]),
    ("train policy", [["a.npz", "b.npz"], ["-o", "p.safetensors"], ["--epochs", "3"]]),
    ("train prefetch", [["a.npz", "b.npz"], ["-o", "p.safetensors"], ["--epochs", "3"]]),
]  # fmt: skip


def parsed(arguments: list[str]) -> tuple[str, dict[str, str]]:
    """The command that is found, and its parameters in words; nothing runs."""
    command: Any = typer.main.get_command(make_app())
    context = None
    while True:
        context = command.make_context(command.name, list(arguments), parent=context)
        if not hasattr(command, "commands"):
            return command.name, {
                name: str(value) for name, value in context.params.items() if name != "json_file"
            }
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        assert name is not None


@pytest.mark.parametrize(("command", "parts"), CALLS, ids=[f"{name} {parts[0][0]}" for name, parts in CALLS])
def test_any_order(command: str, parts: list[list[str]]) -> None:
    calls = [[*command.split(), *(word for part in order for word in part)] for order in permutations(parts)]
    found = [parsed(call) for call in calls]
    assert all(one == found[0] for one in found)
    assert parts[0][0] == "--json" or any(value in str(found[0]) for value in parts[0])


def test_every_command_is_there() -> None:
    def walk(command: Any, name: str) -> set[str]:
        below = getattr(command, "commands", {})
        return (
            set().union(*(walk(sub, f"{name} {key}".strip()) for key, sub in below.items()))
            if below
            else {name}
        )

    assert walk(typer.main.get_command(make_app()), "") <= {command for command, _ in CALLS}


def test_names_of_commands_as_values(capsys: pytest.CaptureFixture[str]) -> None:
    """`run` after options is a value or a model: only `make-model` is looked for there."""
    name, values = parsed(["bench", "--ram", "50%", "run"])
    assert (name, values["model"]) == ("run", "run")


def test_a_command_alone_is_the_one_among_all() -> None:
    """Only the command that is asked for is made."""
    everything: Any = typer.main.get_command(make_app())
    for name, command in everything.commands.items():
        alone: Any = typer.main.get_command(make_app(name))
        assert list(alone.commands) == [name]
        assert alone.commands[name].help == command.help
        assert [p.opts for p in alone.commands[name].params] == [p.opts for p in command.params]
    unknown: Any = typer.main.get_command(make_app("plann"))
    assert list(unknown.commands) == list(everything.commands)
