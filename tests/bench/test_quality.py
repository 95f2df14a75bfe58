"""The meter of approximations: windows, figures, table, JSON and figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flashmoe.bench.choices import answer, read_choices
from flashmoe.bench.quality import EXACT, LADDER, LIMITS, QualityPlan, cut, log_softmax, run
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.errors import UsageError
from flashmoe.routing.approximation import LEVELS
from flashmoe.runtime.load import load
from tests.cli.runner import flashmoe

TEXT = "The harbour was quiet, and the boats lay on the stones. " * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def report(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Of the command, with its figure."""
    folder = tmp_path_factory.mktemp("quality")
    (folder / "text.txt").write_text(TEXT)
    arguments = (
        "--cache",
        "25%,100%",
        "--tokens",
        40,
        "--approx",
        "cache:0",
        "--approx",
        "cache:0.5+drop:0.8",
    )
    files = ("--text", folder / "text.txt", "--json", folder / "out.json", "--plot", folder / "out.svg")
    done = flashmoe("quality", demo, "-c", 64, "-t", 1, "--prefetch", "none", *arguments, *files)
    assert done.status == 0, done.err
    assert "40 decoded tokens" in done.out
    assert " cache:0.5+drop:0.8 " in done.out
    assert "…" not in done.out
    assert (folder / "out.svg").read_text().startswith("<?xml")
    return json.loads((folder / "out.json").read_text())


def test_rows(report: dict[str, object]) -> None:
    rows: list[dict[str, float]] = report["rows"]  # type: ignore[assignment]
    assert [(row["size"], row["approx"]) for row in rows] == [
        (size, mode) for size in ("25%", "100%") for mode in (EXACT, "cache:0", "cache:0.5+drop:0.8")
    ]
    small, same, lossy, whole, _, nothing_missing = rows
    for row in (same, whole):
        assert (row["perplexity"], row["kl_divergence"], row["top1_agreement"]) == (small["perplexity"], 0, 1)
    assert same["misses_per_token"] == small["misses_per_token"]
    assert lossy["kl_divergence"] > 0
    assert lossy["misses_per_token"] < small["misses_per_token"]
    assert 0 < lossy["replaced_share"] < 1
    assert 0 < lossy["mass_lost_share"] < 1
    assert lossy["perplexity_change"] == pytest.approx(lossy["perplexity"] / small["perplexity"] - 1)
    assert nothing_missing["kl_divergence"] < lossy["kl_divergence"]


def test_perplexity_is_stocks(report: dict[str, object], demo: Path, lib: Library) -> None:
    """The same windows, evaluated by stock llama.cpp."""
    model = StockModel(lib, demo)
    context = model.context(n_ctx=64, n_ubatch=16, threads=1)
    try:
        from flashmoe.bench.tokens import text_tokens

        losses = []
        for window in cut(text_tokens(TEXT, 100, demo, lib), 64, 40):
            context.rewind(0)
            context.decode(window[:16])
            for token, following in zip(window[16:], window[17:], strict=False):
                context.decode([token])
                losses.append(-log_softmax(context.logits())[following])
        assert len(losses) == 40
        rows: list[dict[str, float]] = report["rows"]  # type: ignore[assignment]
        assert rows[0]["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
    finally:
        context.close()
        model.close()


def test_calibrated_levels(demo: Path, text: Path, tmp_path: Path, own_home: Path) -> None:
    """They are what is measured, and from then on what the model's levels stand for."""
    given = ("--text", text, "-c", 64, "-t", 1, "--cache", "25%", "--prefetch", "none", "--tokens", 20)
    done = flashmoe("quality", demo, *given, "--calibrate", "--json", tmp_path / "out.json")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["approx"] for row in report["rows"]] == [EXACT, *LADDER]
    for level, limit in LIMITS.items():
        rule = report["levels"][level]
        allowed = [EXACT, *LADDER].index(EXACT if rule == "0" else rule)
        costs = [row["perplexity_change"] + row["change_error"] for row in report["rows"]]
        assert max(costs[1 : allowed + 1], default=0) <= limit
        assert allowed == len(LADDER) or costs[allowed + 1] > limit
        assert f"--approx {level}: {'exact' if rule == '0' else rule}" in done.out
        with load(demo, cache="25%", threads=1, prefetch="none", approx=level) as model:
            assert (model.rewritten.rule if model.rewritten else "0") == rule
    (note,) = (own_home / "flashmoe/levels").iterdir()
    note.write_text('{"1": "cash:1"}')  # damaged: the default ones
    with load(demo, cache="25%", threads=1, prefetch="none", approx="1") as model:
        assert model.rewritten is not None
        assert model.rewritten.rule == LEVELS["1"]


def test_choices(demo: Path, text: Path, tmp_path: Path) -> None:
    """What the stock library finds likeliest is the exact run's answer; a whole run's shares add up."""
    rows = [
        {"question": "Which is a colour?", "choices": ["red", "chair", "seven"], "answer": 0},
        {"question": "Where do boats lie?", "choices": ["in the sky", "in the harbour"], "answer": "B"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_choices(tmp_path / "q.jsonl")
    assert [question.answer for question in questions] == [0, 1]
    assert questions[1].prompt == "Where do boats lie?\nA. in the sky\nB. in the harbour\nAnswer:"
    with load(demo, cache="100%", threads=1, n_ctx=128, prefetch="none") as model:
        tokens = model.engine.tokenize(questions[0].prompt)
        model.decoder.rewind()
        model.decoder.evaluate(tokens, decode=False)
        letters = [model.engine.tokenize(f" {letter}", begin=False)[-1] for letter in "ABC"]
        expected = int(model.decoder.logits()[letters].argmax())
        assert answer(model, questions[0], 16) == expected
    given = ("--text", text, "-c", 128, "-t", 1, "--cache", "25%", "--prefetch", "none", "--tokens", 4)
    files = ("--choices", tmp_path / "q.jsonl", "--json", tmp_path / "out.json")
    done = flashmoe("quality", demo, *given, *files, "--approx", "cache:1")
    assert done.status == 0, done.err
    exact, lossy = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert exact["same_answer_share"] == 1
    assert {exact["correct_share"], lossy["correct_share"], lossy["same_answer_share"]} <= {0, 0.5, 1}
    assert "25%, cache:1: " in done.out
    assert exact["tokens"] == lossy["tokens"] == 4  # of the text


@pytest.mark.parametrize(
    "line",
    ['{"question": "?", "choices": ["a"], "answer": 0}', '{"choices": ["a", "b"], "answer": 2}', "[", "3"],
)
def test_refused_questions(line: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "?", "choices": ["a", "b"], "answer": 1}\n' + line)
    with pytest.raises(UsageError, match="line 2: give"):
        read_choices(tmp_path / "q.jsonl")


def test_cut() -> None:
    assert [len(part) for part in cut(range(1000), 512)] == [512, 488]
    assert [len(part) for part in cut(range(529), 512)] == [512]  # the rest is too short
    parts = cut(range(1000), 100, 100)
    assert sum(len(part) - 17 for part in parts) == 100
    assert parts[1][0] == 100
    with pytest.raises(UsageError, match="at least 18"):
        cut(range(17), 512)


def test_refused(text: Path, demo: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--approx", "cash:1"), "choose cache:LAMBDA"),
        (("--text", tmp_path / "none.txt"), "none.txt: the text cannot be read"),
        (("--ram", "1GiB", "--cache", "5%"), "not both"),
        (("--cache", ","), "no size given"),
        (("--calibrate", "--approx", "1"), "leave out --approx"),
    ):
        done = flashmoe("quality", demo, *arguments)
        assert (done.status, "Traceback" in done.err) == (1, False) or done.status == 2
        assert message in done.err.replace("\n", " ")
    with pytest.raises(UsageError, match="at least"):
        run(QualityPlan(str(demo), text=text, tokens=-1))
