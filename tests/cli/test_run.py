"""`flashmoe run`: what goes where, and what every option does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from tests.cli.runner import COMMAND, Result, flashmoe, own_process
from tests.conftest import Tiny
from tests.models import split

PROMPT = "the sky is hello world"
FLAT = (
    "--temp",
    2,
    "--top-k",
    0,
    "--top-p",
    1,
    "--min-p",
    0,
)  # any token may come: text differs from seed to seed


def run(model: Path | str, *arguments: object, stdin: str | None = None) -> Result:
    """`flashmoe run`, one thread, a short answer."""
    given = set(map(str, arguments))
    defaults: list[object] = ["-t", 1]
    if "-n" not in given:
        defaults += ["-n", 12]
    if not {"--cache", "--ram"} & given:
        defaults += ["--cache", "50%"]
    result = flashmoe("run", model, *defaults, *arguments, stdin=stdin)
    return result


def greedy(model: Path | str, *arguments: object, stdin: str | None = None) -> Result:
    result = run(model, "--temp", 0, *arguments, stdin=stdin)
    assert result.status == 0, result.err
    return result


def test_text_on_stdout_report_on_stderr(tiny: Tiny) -> None:
    first = greedy(tiny("llama"), "-p", PROMPT)
    assert first.out.endswith("\n")
    assert first.out.strip()
    assert "tokens/s" not in first.out
    for word in (
        "prefill",
        "decode",
        "tokens/s",
        "hit rate",
        "read per token",
        "stalled",
        "-bound",
        "memory",
    ):
        assert word in first.err
    assert greedy(tiny("llama"), "-p", PROMPT).out == first.out  # greedy: the same again


def test_as_a_process(tiny: Tiny) -> None:
    arguments = ("run", tiny("llama"), "-t", 1, "-n", 12, "--cache", "50%", "--temp", 0)
    result = own_process(*arguments, stdin=PROMPT)
    assert result.status == 0
    assert result.out == greedy(tiny("llama"), stdin=PROMPT).out
    assert "tokens/s" in result.err


def test_quiet_says_nothing(tiny: Tiny) -> None:
    loud, quiet = greedy(tiny("llama"), "-p", PROMPT), greedy(tiny("llama"), "-p", PROMPT, "-q")
    assert quiet.err == ""
    assert quiet.out == loud.out


def test_prompt_from_file_and_standard_input(tiny: Tiny, tmp_path: Path) -> None:
    expected = greedy(tiny("llama"), "-p", PROMPT).out
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert greedy(tiny("llama"), "-f", tmp_path / "prompt.txt").out == expected
    assert greedy(tiny("llama"), stdin=PROMPT).out == expected
    assert greedy(tiny("llama"), "-p", PROMPT + " and").out != expected


def test_report_as_json(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    prompt = PROMPT + "."  # micro-batches of two tokens: one that is left over would count as decoding
    result = greedy(tiny("llama"), "-p", prompt, "--json", path, "--policy", "lfu", "-n", 16)
    report = json.loads(path.read_text())
    assert report["prefill"]["tokens"] % 2 == 0
    for key, parts in {
        "prefill": ("tokens", "tokens_per_second"),
        "decode": ("tokens", "tokens_per_second"),
        "cache": ("slots", "hits", "misses", "hit_rate"),
        "io": ("read_bytes", "read_bytes_per_second", "ceiling_bytes_per_second", "stall_share"),
        "memory": ("budget_bytes", "peak_bytes"),
    }.items():
        for part in parts:
            assert isinstance(report[key][part], (int, float)), (key, part)
    assert report["bound"] in ("ssd", "compute", "memory")
    assert report["text"].rstrip("\n") == result.out.rstrip("\n")
    assert report["model"] == "llama.gguf"
    assert report["policy"] == "lfu"
    assert report["cache"]["slots"] == 12
    assert report["decode"]["tokens"] == 15  # the first of 16 comes from the prompt
    top_k, layers = 2, 3
    assert report["cache"]["hits"] + report["cache"]["misses"] == 15 * top_k * layers
    assert report["memory"]["peak_bytes"] > 10 << 20


@pytest.mark.parametrize(
    ("cache", "slots"), [("25%", 16), ("300", 64), ("24", 24), ("100%", 64), ("1%", 16), ("1GiB", 64)]
)
def test_size_of_the_pool(cache: str, slots: int, tiny: Tiny, tmp_path: Path) -> None:
    """olmoe: 4 layers of 16 experts, 4 size groups that need 4 slots each."""
    path = tmp_path / "report.json"
    greedy(tiny("olmoe"), "-p", PROMPT, "--cache", cache, "--json", path, "-n", 1)
    report = json.loads(path.read_text())
    assert (report["cache"]["slots"], report["cache"]["total_experts"]) == (slots, 64)


def test_pool_in_bytes(tiny: Tiny, tmp_path: Path) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny("hunyuan-moe")))
    path = tmp_path / "report.json"
    half = catalog.expert_bytes // 2
    greedy(tiny("hunyuan-moe"), "-p", PROMPT, "--cache", f"{half >> 10}KiB", "--json", path, "-n", 1)
    slots = json.loads(path.read_text())["cache"]["slots"]
    assert 4 <= slots <= catalog.total_experts // 2
    result = run(tiny("hunyuan-moe"), "-p", PROMPT, "--cache", "1KiB")
    assert result.status == 1
    assert "needs at least" in result.message


def test_number_of_tokens(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    longer, shorter = (greedy(tiny("llama"), "-p", PROMPT, "-n", n).out for n in (20, 5))
    assert longer.startswith(shorter.rstrip("\n"))
    assert len(longer) > len(shorter)
    greedy(tiny("llama"), "-p", PROMPT, "-n", -1, "-c", 256, "--json", path)
    report = json.loads(path.read_text())
    # until the context was full, as the stock server sees it (test_answer_that_fills_the_context)
    assert report["prefill"]["tokens"] + report["decode"]["tokens"] == 255


def test_seed(tiny: Tiny) -> None:
    texts = [run(tiny("llama"), "-p", PROMPT, *FLAT, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_options(tiny: Tiny) -> None:
    expected = greedy(tiny("llama"), "-p", PROMPT).out
    assert run(tiny("llama"), "-p", PROMPT, "--temp", 2, "--top-k", 1).out == expected
    assert run(tiny("llama"), "-p", PROMPT, "--temp", 2, "--top-k", 0, "--top-p", 0).out == expected
    assert (
        run(tiny("llama"), "-p", PROMPT, "--temp", 2, "--top-k", 0, "--top-p", 1, "--min-p", 1).out
        == expected
    )


def test_micro_batch(tiny: Tiny, tmp_path: Path) -> None:
    """The server tells nobody whether a graph of one token is a prompt's: with -ub 1 all count as decoding."""
    path = tmp_path / "report.json"
    greedy(tiny("llama"), "-p", PROMPT, "--cache", "100%", "--json", path)
    whole = json.loads(path.read_text())
    greedy(tiny("llama"), "-p", PROMPT, "-ub", 1, "--cache", "100%", "--json", path)
    one = json.loads(path.read_text())
    tokens = whole["prefill"]["tokens"] + whole["decode"]["tokens"]
    assert one["prefill"]["tokens"] + one["decode"]["tokens"] == tokens

    def requests(report: dict) -> int:
        return sum(
            report["cache"][f"{phase}{kind}"] for phase in ("", "prefill_") for kind in ("hits", "misses")
        )

    # a request per token, layer and expert; tokens without outputs need no last layer
    needed = tokens * 3 * 2 - (whole["prefill"]["tokens"] - 1) * 2
    assert requests(one) == needed
    assert requests(whole) < needed  # distinct experts of the batch


def test_chat(tiny: Tiny) -> None:
    chat = greedy(tiny("llama"), "-p", "hello", "--chat").out
    assert chat.strip()
    plain = greedy(tiny("llama"), "-p", "hello").out
    assert chat != plain
    # a model without a template speaks ChatML
    without = greedy(tiny("olmoe"), "-p", "hello", "--chat", "-n", 40).out
    assert without.strip()
    assert (
        without == greedy(tiny("olmoe"), "-p", "hello", "--chat", "-n", 40, "--chat-template", "chatml").out
    )


def test_chat_template(tiny: Tiny, tmp_path: Path) -> None:
    """From the command line, by name and from a file, with arguments."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}{{ tail }}")
    plain = greedy(tiny("llama"), "-p", PROMPT + "!").out
    assert greedy(tiny("llama"), "--chat", "-p", PROMPT + "!", "--chat-template-file", template).out == plain
    assert (
        greedy(
            *(tiny("llama"), "--chat", "-p", PROMPT, "--chat-template", template.read_text()),
            *("--chat-template-kwargs", '{"tail": "!"}'),
        ).out
        == plain
    )
    result = run(tiny("llama"), "--chat", "-p", PROMPT, "--chat-template-file", tmp_path / "none")
    assert result.status == 2
    assert "the template cannot be read" in result.message
    result = run(tiny("llama"), "--chat", "-p", PROMPT, "--chat-template-kwargs", "[]")
    assert result.status == 2
    assert "must be a JSON object" in result.message


def test_grammar_and_schema(demo: Path) -> None:
    assert demo.is_file()
    text = greedy("demo", "-p", "The sky is", "--grammar", 'root ::= " blue" | " green"').out
    assert text in (" blue\n", " green\n")
    schema = '{"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}'
    text = greedy("demo", "--chat", "-p", "hello", "--json-schema", schema, "-n", 60).out
    assert json.loads(text) == {"n": 7}
    result = run("demo", "-p", "hello", "--json-schema", "{")
    assert result.status == 2
    assert "is no JSON" in result.message
    result = run("demo", "-p", "hello", "--grammar", "root ::= (")
    assert result.status == 2
    assert "grammar" in result.message


def test_split_model(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(tiny("llama").read_bytes())
    first = split(tmp_path / "m.gguf", 3)[0]
    assert greedy(first, "-p", PROMPT).out == greedy(tiny("llama"), "-p", PROMPT).out


def test_demo(demo: Path) -> None:
    assert demo.is_file()
    result = greedy("demo", "-p", "The history of the lighthouse", "--cache", "25%", "-n", 8)
    assert result.out.strip()


def test_routing_can_be_recorded(tiny: Tiny, tmp_path: Path) -> None:
    from flashmoe.routing.files import read

    greedy(tiny("llama"), "-p", PROMPT, "--trace", tmp_path / "t.safetensors", "-n", 6)
    trace = read(tmp_path / "t.safetensors")
    assert trace.expert_ids.shape[1:] == (3, 2)
    assert len(trace.expert_ids) > 6


def test_home_that_cannot_be_written(tiny: Tiny, tmp_path: Path) -> None:
    """Notes are a convenience: without them the library is tested anew."""
    (tmp_path / "file").write_text("not a folder")
    result = own_process(
        *("run", tiny("llama"), "-p", PROMPT, "-n", 2, "-t", 1, "--cache", "50%"),
        env={"XDG_CACHE_HOME": str(tmp_path / "file")},
    )
    assert result.status == 0, result.err


def test_pipe_that_closes_early(tiny: Tiny) -> None:
    process = subprocess.Popen(
        [
            *COMMAND,
            "run",
            str(tiny("llama")),
            "-p",
            PROMPT,
            "-t",
            "1",
            "--cache",
            "50%",
            "--temp",
            "0",
            "-n",
            "400",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    process.wait(60)
    assert "Traceback" not in error
    assert "Exception" not in error


def test_interrupt_stops_cleanly(demo: Path) -> None:
    """Ctrl-C in the middle of a generation: the text so far, the report, and no traceback."""
    process = subprocess.Popen(
        [*COMMAND, "run", "demo", "-p", "The history of the", "-t", "1", "--cache", "2%", *map(str, FLAT)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert demo.is_file()
    assert process.stdout
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert first
    assert b"Traceback" not in err
    assert b"Exception" not in err
    if b"(stopped)" in err:  # else it had come to its end
        assert out.endswith(b"\n")
        assert b"tokens/s" in err
    assert process.returncode == (130 if b"(stopped)" in err else 0)


def test_version_and_help() -> None:
    version = flashmoe("--version")
    assert version.status == 0
    assert version.out.startswith("flashmoe ")
    assert flashmoe("--help").status == 0
    text = flashmoe("run", "--help", env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).out
    for option in (
        "--ram",
        "--cache",
        "--policy",
        "--temp",
        "--top-k",
        "--top-p",
        "--min-p",
        "--seed",
        "--repeat-penalty",
        "--grammar",
        "--chat-template",
        "--reasoning-budget",
        "--json",
    ):
        assert option in text


def test_pack_then_run(tiny: Tiny, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny("olmoe"), tmp_path / "m.gguf"))
    repacked = greedy(path, "-p", PROMPT, "--layout", "repacked")
    made = flashmoe("pack", path)
    if made.status:
        assert "nothing to pack" in made.message
        pytest.skip("this processor repacks nothing")
    assert "m.flashpack: " in made.err
    assert "is whole and fits" in flashmoe("pack", path).err
    packed = greedy(path, "-p", PROMPT, "--json", tmp_path / "r.json")
    assert packed.out == repacked.out
    assert "weights packed" in packed.err
    assert "weights repacked" in repacked.err
    assert json.loads((tmp_path / "r.json").read_text())["layout"] == "packed"
