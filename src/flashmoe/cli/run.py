"""`flashmoe run`: generate text from a prompt under a memory budget, and say what it took."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.cli import options
from flashmoe.cli.groups import with_options
from flashmoe.cli.pipe import with_thoughts
from flashmoe.cli.progress import LoadProgress, stderr_console
from flashmoe.cli.report import show
from flashmoe.cli.sampling import ChatOptions, SamplingOptions
from flashmoe.cli.streams import read_stdin
from flashmoe.common.text import argument, read_text_file
from flashmoe.errors import UsageError

if TYPE_CHECKING:
    from flashmoe.engines.base import SamplingParams
    from flashmoe.runtime.model import Model


@with_options
def run(
    *,
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Prompt to continue or answer.")
    ] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template to the prompt.")] = False,
    engine: options.Engine = "llama.cpp",
    loading: options.ModelOptions,
    vram: options.Vram = None,
    n_predict: options.NPredict = -1,
    sampling: SamplingOptions,
    chat_options: ChatOptions,
    trace: options.Trace = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Generate text with a model that may be larger than memory."""
    text = _prompt(prompt, file)
    from flashmoe.runtime.load import (
        load,  # after the arguments are known to be good: it takes a moment to import
    )

    console = stderr_console(quiet)
    with LoadProgress(console) as progress:
        asked = loading.load_options(
            engine=engine, vram=vram, trace=trace is not None, server=chat_options.server()
        )
        loaded = load(model, options=asked, progress=progress.update)
        with loaded:
            chosen = sampling.sampling()
            stream = (
                _answer(loaded, text, n_predict, chosen)
                if chat
                else loaded.generate(text, max_tokens=n_predict, sampling=chosen, special=True)
            )
            made: list[str] = []
            stopped = False
            try:
                for piece in stream:
                    progress.stop()
                    made.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                stopped = True
                console.print("\n(stopped)", style="dim")
            if not made or not made[-1].endswith("\n"):
                sys.stdout.write("\n")
            report = loaded.report("".join(made))
    show(console, report)
    if trace and loaded.recorder is not None:
        loaded.recorder.save(trace)
    if json_file:
        json_file.write(report.as_dict())
    if stopped:
        raise KeyboardInterrupt


def _answer(model: Model, text: str, n_predict: int, sampling: SamplingParams) -> Iterator[str]:
    """The answer as one text, thoughts in <think>."""
    from flashmoe.runtime.conversation import Piece

    messages = [{"role": "user", "content": text}]
    deltas = model.stream_chat(messages, max_tokens=n_predict, sampling=sampling)
    return with_thoughts(
        Piece(delta[name], thought=name != "content")
        for delta in deltas
        for name in ("reasoning_content", "content")
        if delta.get(name)
    )


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's text from -p, -f or standard input. Raises UsageError."""
    if prompt is not None and file is not None:
        raise UsageError("give the prompt with -p or with -f, not both")
    if prompt is not None:
        prompt = argument(prompt, "the prompt (-p)")
    if file is not None:
        try:
            prompt = read_text_file(file, f"{file}: the prompt")
        except OSError as error:
            raise UsageError(f"{file}: the prompt cannot be read ({error})") from None
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt: give one with -p or -f, or pipe it to standard input")
        prompt = read_stdin()
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return prompt
