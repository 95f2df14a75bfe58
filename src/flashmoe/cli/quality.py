"""`flashmoe quality`: perplexity of a model, and what approximate routing costs and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flashmoe.cli import options
from flashmoe.cli.progress import measuring, stderr_console, stdout_console
from flashmoe.errors import UsageError

EXACT = "exact"  # bench.quality's, which takes a moment to import


def quality(
    model: options.Model,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to evaluate (default: 18 KB that come with FlashMoE).")
    ] = None,
    approx: Annotated[
        list[str] | None,
        typer.Option(
            "--approx",
            help="Approximation to compare with the exact run, as flashmoe run takes it; can be given multiple times.",
        ),
    ] = None,
    ram: Annotated[
        str | None, typer.Option("--ram", help="Memory budgets of the whole process, comma-separated.")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", help="Sizes of the expert cache, instead of --ram: 25%,40% of the experts."),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            "--choices",
            help='Multiple-choice questions to answer in each run: a .jsonl file of {"question": "...", "choices": '
            '["...", "..."], "answer": 0}.',
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Maximum tokens to decode in each run; 0 for the whole text.")
    ] = 0,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Set what --approx 1, 2 and 3 stand for on this model: at most 1, 2 and 5 % of perplexity.",
        ),
    ] = False,
    policy: options.Policy = None,
    prefetch: options.Prefetch = "auto",
    layout: options.Layout = "auto",
    ctx_size: Annotated[
        int | None,
        typer.Option("-c", "--ctx-size", help="Tokens that a prediction may look back (default: 512)."),
    ] = None,
    threads: options.Threads = None,
    json_file: options.Json = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Plot speed against perplexity to a .png, .svg or .pdf file."),
    ] = None,
    quiet: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a model's perplexity on a text, and what approximate routing (--approx) costs and saves."""
    if ram is not None and cache is not None:
        raise UsageError("give the sizes to measure with --ram or with --cache, not both")
    from flashmoe.bench.choices import read_choices
    from flashmoe.bench.quality import QualityPlan, run
    from flashmoe.bench.quality import calibrate as set_levels
    from flashmoe.bench.spec import Size, cache_sizes, ram_sizes
    from flashmoe.runtime.options import LoadOptions
    from flashmoe.storage.gguf import read_gguf
    from flashmoe.storage.hub import resolve

    sizes = [Size("auto")]
    if cache is not None:
        sizes = cache_sizes(cache)
    elif ram is not None:
        sizes = ram_sizes(ram, sum(file.stat().st_size for file in read_gguf(resolve(model)).files))
    if calibrate and (approx or len(sizes) > 1):
        raise UsageError("--calibrate chooses the approximations itself, for one size: leave out --approx")
    if not sizes:
        raise UsageError("no size given: for example --cache 25%,40%")
    plan = QualityPlan(
        model=model,
        sizes=sizes,
        modes=approx or (),
        text=text,
        tokens=tokens,
        questions=read_choices(choices) if choices else (),
        options=LoadOptions(policy=policy, prefetch=prefetch, layout=layout, n_ctx=ctx_size, threads=threads),
    )
    if plot_file:
        from flashmoe.common.plotting import require_matplotlib

        require_matplotlib()
    with measuring(stderr_console(quiet)) as progress:
        levels, report = set_levels(plan, progress) if calibrate else ({}, run(plan, progress))
    stdout_console().print(table(report))
    if choices:
        for row in report["rows"]:
            stdout_console().print(
                f"{row['size']}, {row['approx']}: {row['correct_share']:.1%} of {len(plan.questions)} answers right, "
                f"{row['same_answer_share']:.1%} the exact run's",
                soft_wrap=True,
            )
    for level, rule in levels.items():
        stdout_console().print(f"--approx {level}: {'exact' if rule == '0' else rule}")
    if json_file:
        json_file.write(report)
    if plot_file:
        from flashmoe.bench.quality_plot import draw

        draw(report, plot_file)


def table(report: dict[str, Any]) -> Table:
    """A line per run."""
    rows = report["rows"]
    result = Table(
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        title=f"{report['model']}: {rows[0]['tokens']} decoded tokens in windows of {report['window_tokens']}",
        caption="ppl: perplexity; top-1: same likeliest token; repl., drop.: of the experts; misses per token",
    )
    result.add_column("run", no_wrap=True)
    for name in ("ppl", "change", "KL", "top-1", "repl.", "drop.", "miss", "tok/s"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row['perplexity']:.5g}"]
        if row["approx"] == EXACT:
            name, more = f"{row['size']}: exact", [""] * 5
        else:
            name, shares = f" {row['approx']}", ("top1_agreement", "replaced_share", "dropped_share")
            more = [_change(row["perplexity_change"]), f"{row['kl_divergence']:.4f}"]
            more += [f"{row[share]:.1%}" for share in shares]
        result.add_row(
            name, *cells, *more, f"{row['misses_per_token']:.2f}", f"{row['tokens_per_second']:.1f}"
        )
    return result


def _change(share: float) -> str:
    return f"{share:+.{2 if abs(share) < 1 else 0}%}"
