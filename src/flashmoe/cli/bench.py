"""`flashmoe bench`: paired runs against stock llama.cpp under the same memory limit; and models to run them on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from flashmoe.bench.spec import NO_BASELINE, Plan, cache_sizes, ram_sizes
from flashmoe.cli import options
from flashmoe.cli.groups import with_options
from flashmoe.cli.progress import measuring, stderr_console, stdout_console
from flashmoe.common.text import split_list
from flashmoe.common.units import format_bytes
from flashmoe.errors import UsageError
from flashmoe.runtime.report import approximately

_RUN = "run"


class _ModelOrCommand(TyperGroup):
    """`bench MODEL` is `bench run MODEL`; the name of another command may come after its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            place = next((i for i, arg in enumerate(args) if arg in self.commands and arg != _RUN), None)
            name = _RUN if place is None else args.pop(place)
            args = [name, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ModelOrCommand,
    help="Benchmark a model against stock llama.cpp under the same memory limit; `make-model` creates one.",
    add_completion=False,
)


@app.command(
    _RUN,
    hidden=True,
    no_args_is_help=True,
    epilog="`flashmoe bench make-model SHAPE OUT` creates a model with random weights to benchmark.",
)
@with_options
def run(
    *,
    model: Annotated[str, typer.Argument(help="Path of a GGUF file, hf:ORG/REPO[:FILE], or demo.")],
    ram: Annotated[
        str | None,
        typer.Option(
            "--ram",
            help="Memory budgets of the whole process, comma-separated: 6GiB, or 50% of the file's size.",
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", help="Sizes of the expert cache, instead of --ram: 50%,2GiB,300 (slots)."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            help="Baselines: mmap (same memory limit), plain (in RAM, same layout), stock (in RAM, repacked), none.",
        ),
    ] = "mmap",
    policy: Annotated[
        str, typer.Option("--policy", help="Eviction policies to measure, comma-separated.")
    ] = "default",
    prefetch: Annotated[
        str, typer.Option("--prefetch", help="Predictors to measure, comma-separated.")
    ] = "auto",
    layout: Annotated[
        str,
        typer.Option(
            "--layout", help="Layouts of the weights to measure, comma-separated: auto, plain, repacked."
        ),
    ] = "auto",
    approx: Annotated[
        str,
        typer.Option(
            "--approx",
            help="Approximations of the routing to measure, comma-separated: 0 (exact), cache:0.2, drop:0.5.",
        ),
    ] = "0",
    pairs: Annotated[
        int, typer.Option("--pairs", help="Number of measurements of each configuration, interleaved.")
    ] = 5,
    tokens: Annotated[int, typer.Option("--tokens", help="Number of tokens to decode and measure.")] = 48,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Number of prompt tokens.")] = 16,
    warmup: Annotated[
        int, typer.Option("--warmup", help="Number of warm-up tokens, decoded before measuring.")
    ] = 32,
    routing: Annotated[
        str,
        typer.Option(
            "--routing",
            help="Tokens to evaluate: uniform, zipf, text or text:FILE; or a routing trace that selects the experts.",
        ),
    ] = "uniform",
    computing: options.ComputeOptions,
    page_cache: Annotated[
        str,
        typer.Option(
            "--page-cache", help="Page cache before each measurement: cold (drop the model's pages) or warm."
        ),
    ] = "cold",
    seed: Annotated[
        int,
        typer.Option("-s", "--seed", help="Random seed of the tokens, or the first token of a trace.", min=0),
    ] = 0,
    allow_busy: Annotated[
        bool, typer.Option("--allow-busy", help="Report even if other programs are using the machine.")
    ] = False,
    json_file: options.Json = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Plot speed against memory, and the time line of one token, to a file."),
    ] = None,
    quiet: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> None:
    """Benchmark a model against stock llama.cpp: interleaved runs (A B A B), each in its own process."""
    if (ram is None) == (cache is None):
        raise UsageError("give the sizes to measure, either --ram (6GiB,50%) or --cache (50%,25%)")
    if page_cache not in ("cold", "warm"):
        raise UsageError(f"--page-cache {page_cache!r}: choose cold or warm")
    from flashmoe.bench import runner
    from flashmoe.storage.gguf import read_gguf
    from flashmoe.storage.hub import resolve

    path = resolve(model)
    file_bytes = sum(file.stat().st_size for file in read_gguf(path).files)
    plan = Plan(
        model=path,
        sizes=cache_sizes(cache) if cache is not None else ram_sizes(str(ram), file_bytes),
        baselines=[name for name in split_list(against) if name != NO_BASELINE],
        policies=split_list(policy),
        prefetchers=split_list(prefetch),
        layouts=split_list(layout),
        approximations=split_list(approx),
        pairs=pairs,
        n_prompt=prompt_tokens,
        n_warmup=warmup,
        n_decode=tokens,
        n_ubatch=computing.ubatch,
        routing=routing,
        threads=computing.threads,
        cold=page_cache == "cold",
        allow_busy=allow_busy,
        seed=seed,
        verify=computing.verify,
    )
    if plot_file:
        from flashmoe.bench.plot import draw
        from flashmoe.common.plotting import require_matplotlib

        require_matplotlib()
    with measuring(stderr_console(quiet)) as progress:
        report = runner.run(plan, progress)
    _print(report, stdout_console())
    if json_file:
        json_file.write(report)
    if plot_file:
        draw(report, plot_file)


@app.command("make-model")
def make(
    shape: Annotated[
        str,
        typer.Argument(
            help="Model shape: OLMoE-1B-7B, DeepSeek-V2-Lite, Qwen3-30B-A3B, gpt-oss-20b or gpt-oss-120b."
        ),
    ],
    out: Annotated[Path | None, typer.Argument(help="Output file (default: SHAPE-QUANT.gguf).")] = None,
    quant: Annotated[
        str, typer.Option("--quant", help="Quantization of the experts: Q4_0, Q4_K, Q8_0 or MXFP4.")
    ] = "Q4_0",
    scale: Annotated[
        float, typer.Option("--scale", help="Scale factor for all dimensions, e.g. 0.1 for tests.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("-s", "--seed", help="Random seed of the weights.", min=0)] = 0,
    quiet: options.NoProgress = False,
) -> None:
    """Create a model with random weights and the shape of a real one."""
    from flashmoe.bench.make_model import make_model
    from flashmoe.bench.shapes import find_shape

    name, full = find_shape(shape)
    path = out or Path(f"{name}-{quant}.gguf")
    console = stderr_console(quiet)
    columns = (TextColumn(name), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        nbytes = make_model(
            name,
            full.scaled(scale),
            path,
            quant=quant,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(f"{path}: {format_bytes(nbytes)} of random weights, no language model", highlight=False)


def _print(report: dict[str, Any], console: Console) -> None:
    """The table of a report, and what is to be known about it."""
    model, machine, settings, rows = (report[k] for k in ("model", "machine", "settings", "rows"))
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        title=f"{Path(model['path']).name} ({format_bytes(model['file_bytes'])}): decode tokens/s, "
        f"median of {settings['pairs']}; ratios with their quartiles; {Path(settings['routing']).name} routing",
    )
    for name in ("size", "policy", "FlashMoE", "hits", "stall", "against", "its", "ratio"):
        justify: Any = "left" if name in ("size", "policy", "against") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    for line in (
        f"{machine['processor']}, {machine['threads']} threads, {machine['library']}, kernels {machine['kernels']}",
        *dict.fromkeys(f"~ {approximately(row['approximate'])}" for row in rows if row["approximate"]),
        *(f"note: {note}" for note in [*_on_logits(rows), *report["notes"]]),
    ):
        console.print(line, style="dim", highlight=False, soft_wrap=True)


def _cells(row: dict[str, Any]) -> list[str]:
    policy = row["policy_used"] if row["policy"] == "default" else row["policy"]
    prefetch = "" if row["prefetch"] == "none" else f" + {row['prefetch']}"
    approx = f", ~{row['approximate']['approx']}" if row["approximate"] else ""
    theirs, quartiles = row["opponent_decode"], row["spread"]["ratio"]
    return [
        (row["size"] if row["budget_bytes"] is None else f"{format_bytes(row['budget_bytes'])}")
        + (" BUSY" if row["busy"] else ""),
        f"{policy}{prefetch}, {row['layout']}{approx}",
        f"{row['decode']['tokens_per_second']:.2f}",
        f"{row['cache']['hit_rate']:.1%}",
        f"{row['io']['stall_share']:.0%}",
        row["baseline"],
        f"{theirs['tokens_per_second']:.2f}" if theirs else row["opponent_error"] or "-",
        f"{row['ratio']:.2f} ({quartiles[0]:.2f}-{quartiles[1]:.2f})" if quartiles else "-",
    ]


def _on_logits(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether both sides computed the same, where that is to be expected."""
    compared = {row["baseline"]: True for row in rows if row["same_logits"] is not None}
    different = [f"{row['size']} against {row['baseline']}" for row in rows if row["same_logits"] is False]
    if different:
        return [f"LOGITS DIFFER: {', '.join(different)}"]
    return [f"last logits equal, byte for byte, to those of {' and '.join(compared)}"] if compared else []
