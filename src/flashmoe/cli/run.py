"""`flashmoe run`: generate text from a prompt under a memory budget, and say what it took."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from flashmoe.cli.progress import LoadProgress, stderr_console
from flashmoe.engines.base import Sampling
from flashmoe.errors import FlashMoEError, UsageError
from flashmoe.storage.files import write_atomically

_SAMPLING = Sampling()


def run(
    model: Annotated[
        str, typer.Argument(help="A GGUF file (or the first of a split set), hf:ORG/REPO[:FILE], or demo.")
    ],
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the prompt as a chat message.")] = False,
    ram: Annotated[str | None, typer.Option("--ram", help="Memory for the whole process, e.g. 6GiB.")] = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", help="Size of the expert pool instead: 25%, 2GiB or a number of slots."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Eviction policy: NAME or NAME:FILE.")
    ] = None,
    prefetch: Annotated[
        str, typer.Option("--prefetch", help="Predictor of the next experts: NAME, NAME:FILE, auto or none.")
    ] = "auto",
    n_predict: Annotated[
        int, typer.Option("-n", "--n-predict", help="Tokens to make; -1: until the end.")
    ] = -1,
    ctx_size: Annotated[int | None, typer.Option("-c", "--ctx-size", help="Context in tokens.")] = None,
    ubatch: Annotated[
        int, typer.Option("-ub", "--ubatch-size", help="Prompt tokens evaluated at once.")
    ] = 512,
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="Compute threads.")] = None,
    temp: Annotated[float, typer.Option("--temp", help="Temperature; 0 is greedy.")] = _SAMPLING.temperature,
    top_k: Annotated[
        int, typer.Option("--top-k", help="Sample from the k likeliest tokens.")
    ] = _SAMPLING.top_k,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus sampling.")] = _SAMPLING.top_p,
    min_p: Annotated[
        float, typer.Option("--min-p", help="Least share of the top probability.")
    ] = _SAMPLING.min_p,
    seed: Annotated[int | None, typer.Option("-s", "--seed", help="Seed of the sampler.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Record the routing to a .safetensors file.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to a file.")] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but the text.")] = False,
) -> None:
    """Generate text with a model that need not fit in memory."""
    text = _prompt(prompt, file)
    from flashmoe.api import load  # after the arguments are known to be good: it takes a moment to import

    console = stderr_console(quiet)
    sampling = Sampling(temp, top_k, top_p, min_p, seed)
    with LoadProgress(console) if console.is_terminal else nullcontext() as progress:
        loaded = load(
            model,
            ram=ram,
            cache=cache,
            policy=policy,
            prefetch=prefetch,
            n_ctx=ctx_size,
            n_ubatch=ubatch,
            threads=threads,
            trace=trace is not None,
            progress=progress.update if progress else None,
        )
        with loaded:
            pieces = (
                loaded.chat([{"role": "user", "content": text}], max_tokens=n_predict, sampling=sampling)
                if chat
                else loaded.generate(text, max_tokens=n_predict, sampling=sampling)
            )
            made: list[str] = []
            try:
                for piece in pieces:
                    if progress:
                        progress.stop()
                    made.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                console.print("\n(stopped)", style="dim")
            if not made or not made[-1].endswith("\n"):
                sys.stdout.write("\n")
            report = loaded.report("".join(made))
    for line in report.lines():
        console.print(line, style="dim", highlight=False)
    if trace and loaded.recorder is not None:
        loaded.recorder.save(trace)
    if json_file:
        try:
            write_atomically(json_file, json.dumps(report.as_dict(), indent=1).encode())
        except OSError as error:
            raise FlashMoEError(f"{json_file}: the report cannot be written ({error.strerror})") from None


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's text from -p, -f or standard input. Raises UsageError."""
    if prompt is not None and file is not None:
        raise UsageError("give the prompt with -p or with -f, not both")
    if file is not None:
        try:
            prompt = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: the prompt cannot be read ({error})") from None
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt: give one with -p or -f, or pipe it to standard input")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return prompt
