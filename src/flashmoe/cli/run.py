"""`flashmoe run`: generate text from a prompt under a memory budget, and say what it took."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from flashmoe.cli import options
from flashmoe.cli.progress import LoadProgress, stderr_console
from flashmoe.cli.report import show, write_json
from flashmoe.engines.base import Sampling
from flashmoe.errors import UsageError
from flashmoe.layout import AUTO

_SAMPLING = Sampling()


def run(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the prompt as a chat message.")] = False,
    engine: options.Engine = "llama.cpp",
    ram: options.Ram = None,
    cache: options.Cache = None,
    vram: options.Vram = None,
    policy: options.Policy = None,
    prefetch: options.Prefetch = "auto",
    layout: options.Layout = AUTO,
    n_predict: options.NPredict = -1,
    ctx_size: options.CtxSize = None,
    ubatch: options.Ubatch = 512,
    threads: options.Threads = None,
    temp: options.Temp = _SAMPLING.temperature,
    top_k: options.TopK = _SAMPLING.top_k,
    top_p: options.TopP = _SAMPLING.top_p,
    min_p: options.MinP = _SAMPLING.min_p,
    seed: options.Seed = None,
    save_cache: options.SaveCache = False,
    verify: options.Verify = False,
    trace: options.Trace = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
) -> None:
    """Generate text with a model that need not fit in memory."""
    text = _prompt(prompt, file)
    from flashmoe.api import load  # after the arguments are known to be good: it takes a moment to import

    console = stderr_console(quiet)
    sampling = Sampling(temp, top_k, top_p, min_p, seed)
    with LoadProgress(console) as progress:
        loaded = load(
            model,
            engine=engine,
            ram=ram,
            cache=cache,
            vram=vram,
            policy=policy,
            prefetch=prefetch,
            layout=layout,
            n_ctx=ctx_size,
            n_ubatch=ubatch,
            threads=threads,
            trace=trace is not None,
            save_cache=save_cache,
            verify=verify,
            progress=progress.update,
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
                    progress.stop()
                    made.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            except KeyboardInterrupt:
                console.print("\n(stopped)", style="dim")
            if not made or not made[-1].endswith("\n"):
                sys.stdout.write("\n")
            report = loaded.report("".join(made))
    show(console, report)
    if trace and loaded.recorder is not None:
        loaded.recorder.save(trace)
    if json_file:
        write_json(json_file, report.as_dict())


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
