"""`flashmoe quality`: what an approximation costs and what it saves, on a text, token by token as decoding does it.

The text is cut into windows of a context each. The first tokens of a window are a prompt, the others are decoded one by
one; every decoded token's distribution over the vocabulary is compared with the exact run's, which comes first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.bench.choices import Question, answer
from flashmoe.bench.spec import Size
from flashmoe.common.text import read_text_file
from flashmoe.errors import UsageError
from flashmoe.routing.approximation import parse
from flashmoe.runtime.generation import split
from flashmoe.runtime.levels import save_levels
from flashmoe.runtime.load import load
from flashmoe.runtime.model import Model
from flashmoe.runtime.options import LoadOptions

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

EXACT = "exact"
#: What a calibration tries, from the least to the most; and how much perplexity each level may cost.
LADDER = ("cache:0.05", "cache:0.1", "cache:0.2", "cache:0.4", "cache:0.7", "cache:1", "cache:1.5", "cache:2")
LIMITS = {"1": 0.01, "2": 0.02, "3": 0.05}
WINDOW = 512  # tokens, where the context is not given
_PROMPT = 16  # tokens of each window
_LEAST = _PROMPT + 2  # tokens of a window: one to decode, and the next


@dataclass(frozen=True)
class QualityPlan:
    """A text, and the runs over it: for every size an exact one, then one for each approximation.

    tokens: at most so many are decoded in each run; 0: all.
    """

    model: str
    sizes: Sequence[Size] = (Size("auto"),)
    modes: Sequence[str] = ()
    text: Path | None = None  # default: the one that comes with the package
    tokens: int = 0
    questions: Sequence[Question] = ()  # to be answered in every run
    options: LoadOptions = LoadOptions()

    def __post_init__(self) -> None:
        for mode in self.modes:
            parse(mode)  # raises what is wrong with it
        if self.tokens < 0:
            raise UsageError("--tokens must be at least 1, or 0 for all")


def run(plan: QualityPlan, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Measure; the report, in the layout of `--json`. Raises UsageError for a text that is too short, and what `load`
    raises."""
    text = _text(plan.text)
    modes = [EXACT, *plan.modes]
    total = len(plan.sizes) * len(modes)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    given: list[int] = []  # the exact run's answers
    with tempfile.TemporaryFile() as file:
        exact = _Exact(file, kept=total > 1)
        for size in plan.sizes:
            for mode in modes:
                name = f"{size.text}, {mode}"
                progress(name, len(rows), total)
                options = replace(
                    plan.options,
                    ram=size.ram,
                    cache=size.cache,
                    approx="" if mode == EXACT else mode,
                    n_ctx=plan.options.n_ctx or WINDOW,
                )
                with load(plan.model, options=options) as model:
                    windows = cut(model.engine.tokenize(text), model.engine.n_ctx, plan.tokens)
                    rows.append({"size": size.text, "approx": mode} | _measure(model, windows, exact))
                    answers = [answer(model, question, _PROMPT) for question in plan.questions]
                    given = given or answers
                    rows[-1] |= _answered(plan.questions, answers, given)
                    facts = facts or _facts(model, windows)
        progress("done", total, total)
    first = rows[0]["perplexity"]
    for row in rows:
        row["perplexity_change"] = row["perplexity"] / first - 1
        row["change_error"] = row.pop("log_error")
    return {**facts, "text": str(plan.text or "the package's"), "rows": rows}


def calibrate(
    plan: QualityPlan, progress: Progress = lambda what, done, total: None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Measure LADDER in the plan's first size; the levels, which `load` uses from now on, and the report.

    A level is the last step up to which the change of perplexity and its standard error stay below its limit.
    """
    report = run(replace(plan, sizes=plan.sizes[:1], modes=LADDER), progress)
    levels = dict.fromkeys(LIMITS, "0")
    for level, limit in LIMITS.items():
        for row in report["rows"][1:]:
            if row["perplexity_change"] + row["change_error"] > limit:
                break
            levels[level] = row["approx"]
    save_levels(report["identity"], levels)
    return levels, report | {"levels": levels}


def cut(tokens: Sequence[int], window: int, decoded: int = 0) -> list[list[int]]:
    """Windows of `window` tokens, with `decoded` decoded ones in all (0: as many as there are).

    A rest that is too short is left out. Raises UsageError where nothing is left.
    """
    found: list[list[int]] = []
    left = decoded or len(tokens)
    for start in range(0, len(tokens), window):
        part = list(tokens[start : start + min(window, left + _PROMPT + 1)])
        if len(part) < _LEAST or left <= 0:
            break
        found.append(part)
        left -= len(part) - _PROMPT - 1
    if not found:
        raise UsageError(f"the text has {len(tokens)} tokens: give one of at least {_LEAST} (--text)")
    return found


def log_softmax(logits: Floats) -> Floats:
    """Logarithms of probabilities, float32 [vocabulary]."""
    shifted = logits.astype(np.float64) - logits.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)  # type: ignore[no-any-return]


class _Exact:
    """The exact run's distributions, float32 [tokens, vocabulary], in a temporary file."""

    def __init__(self, file: Any, kept: bool) -> None:
        """kept: whether another run is compared with this one."""
        self._file, self._kept = file, kept
        self._rows: int | None = None  # once the exact run is over

    @contextmanager
    def run(self) -> Iterator[Callable[[Floats], Floats]]:
        """For one run: takes each distribution in turn, and gives the exact run's, which the first run is."""
        count = 0
        self._file.seek(0)

        def compare(own: Floats) -> Floats:
            nonlocal count
            count += 1
            if self._rows is None:
                if self._kept:
                    self._file.write(own.tobytes())
                return own
            return np.frombuffer(self._file.read(own.nbytes), np.float32)

        yield compare
        self._rows = count


def _measure(model: Model, windows: Sequence[Sequence[int]], exact: _Exact) -> dict[str, Any]:
    """One run over all windows."""
    decoder = model.decoder
    losses: list[float] = []
    differences: list[float] = []  # of losses, to the exact run's
    divergence: list[float] = []
    agreeing = 0
    with exact.run() as compare:
        for window in windows:
            decoder.rewind()
            for chunk in split(window[:_PROMPT], model.engine.n_ubatch):
                decoder.evaluate(chunk, decode=False)
            for token, following in zip(window[_PROMPT:], window[_PROMPT + 1 :], strict=False):
                decoder.evaluate([token], decode=True)
                own = log_softmax(decoder.logits())
                other = compare(own)
                losses.append(-float(own[following]))
                differences.append(float(other[following]) - float(own[following]))
                divergence.append(float((np.exp(other, dtype=np.float64) * (other - own)).sum()))
                agreeing += int(own.argmax() == other.argmax())
    stats, phase = model.cache_stats["decode"], model.telemetry.decode
    rewritten = model.rewritten.as_dict() if model.rewritten else {}
    return {
        "slots": sum(model.cache.elastic.slots),
        "total_experts": model.catalog.total_experts,
        "tokens": len(losses),
        "perplexity": float(np.exp(np.mean(losses))),
        "log_error": float(np.std(differences) / np.sqrt(len(losses))),
        "kl_divergence": float(np.mean(divergence)),
        "top1_agreement": agreeing / len(losses),
        **{
            share: rewritten.get(share, 0.0)
            for share in ("replaced_share", "dropped_share", "mass_lost_share")
        },
        "misses_per_token": (stats.misses + stats.late_hits) / len(losses),
        "hit_rate": stats.hit_rate,
        "read_bytes_per_token": stats.bytes_read / len(losses),
        "tokens_per_second": phase.tokens_per_second,
    }


def _answered(questions: Sequence[Question], answers: Sequence[int], exact: Sequence[int]) -> dict[str, Any]:
    """Shares of right answers, and of those that are the exact run's; nothing without questions."""
    if not questions:
        return {}
    right = [own == question.answer for own, question in zip(answers, questions, strict=True)]
    same = [own == other for own, other in zip(answers, exact, strict=True)]
    return {"correct_share": float(np.mean(right)), "same_answer_share": float(np.mean(same))}


def _facts(model: Model, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    return {
        "model": model.catalog.label,
        "identity": model.catalog.identity,
        "layers": len(model.catalog.layers),
        "experts": model.catalog.n_experts,
        "top_k": model.catalog.top_k,
        "policy": model.cache.policy.name,
        "windows": len(windows),
        "window_tokens": max(map(len, windows)),
    }


def _text(path: Path | None) -> str:
    """The text to measure on. Raises UsageError."""
    if path is None:
        return (files("flashmoe") / "data" / "quality.txt").read_text(encoding="utf-8")
    try:
        return read_text_file(path, f"{path}: the text")
    except OSError as error:
        raise UsageError(f"{path}: the text cannot be read ({error})") from None
