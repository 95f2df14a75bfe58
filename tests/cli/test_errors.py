"""Everything that a user can get wrong: one line that says what to do, and exit status 1 or 2."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.cli.runner import Result, flashmoe, own_process
from tests.conftest import Tiny
from tests.models import dense, split

SHORT = ("-p", "hello", "-n", 1, "-t", 1)


def fails(status: int, message: str, *arguments: object, **options: str | None) -> Result:
    """Run and expect one line on stderr, nothing on stdout."""
    result = flashmoe("run", *arguments, *(() if options else SHORT), **options)  # type: ignore[arg-type]
    assert result.status == status, result
    assert re.search(message, result.message), result.message
    assert result.message.startswith("error: ")
    assert result.out == ""
    return result


def test_as_a_process(tmp_path: Path) -> None:
    result = own_process("run", tmp_path / "none.gguf", *SHORT)
    assert (result.status, result.out) == (1, "")
    assert result.message == f"error: {tmp_path / 'none.gguf'}: no such file"


def test_brackets_in_a_name_are_not_markup(tmp_path: Path) -> None:
    fails(1, r"\[bold\]m\[/\]\.gguf: no such file", tmp_path / "[bold]m[" / "].gguf")


def test_folder(tmp_path: Path, tiny: Tiny) -> None:
    fails(1, "is a folder; name a GGUF file in it$", tmp_path)
    fails(1, "is a folder; name a GGUF file in it: .*.gguf", tiny("llama").parent)


def test_not_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("<html>not found</html>" * 10)
    fails(1, "a web page, not the file itself: download that again", tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_text("not found" * 10)
    fails(1, "not a GGUF file", tmp_path / "m.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    fails(1, "not a GGUF file", tmp_path / "empty.gguf")


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.999])
def test_truncated(share: float, tmp_path: Path, tiny: Tiny) -> None:
    data = tiny("llama").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(share * len(data))])
    fails(1, "damaged or truncated GGUF .* download the file again", tmp_path / "m.gguf")


def test_missing_part(tmp_path: Path, tiny: Tiny) -> None:
    (tmp_path / "m.gguf").write_bytes(tiny("llama").read_bytes())
    parts = split(tmp_path / "m.gguf", 3)
    parts[1].unlink()
    fails(1, "m-00002-of-00003.gguf: no such file", parts[0])
    fails(1, "name the first part", parts[2])


def test_dense_model(tmp_path: Path) -> None:
    fails(1, r"a dense model \(llama\), it has no experts to stream", dense(tmp_path / "m.gguf"))


def renamed(path: Path, target: Path, old: bytes, new: bytes) -> Path:
    """A copy of a model in which a name is another of the same length."""
    assert len(old) == len(new)
    target.write_bytes(path.read_bytes().replace(old, new))
    return target


def test_unsupported_architecture(tmp_path: Path, tiny: Tiny) -> None:
    path = renamed(tiny("olmoe"), tmp_path / "m.gguf", b"olmoe", b"wholy")
    fails(1, "does not know the architecture 'wholy'", path)


def test_model_that_lacks_a_tensor(tmp_path: Path, tiny: Tiny) -> None:
    path = renamed(tiny("olmoe"), tmp_path / "m.gguf", b"blk.1.attn_q.weight", b"blk.1.attn_z.weight")
    fails(1, "llama.cpp cannot load this model .*blk.1.attn_q.weight", path)


def test_expert_that_lacks_a_weight(tmp_path: Path, tiny: Tiny) -> None:
    path = renamed(tiny("olmoe"), tmp_path / "m.gguf", b"blk.1.ffn_up_exps", b"blk.1.ffn_zz_exps")
    fails(1, "llama.cpp cannot load this model .*ffn_up_exps", path)


def test_unreadable_file(tmp_path: Path, tiny: Tiny) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    (tmp_path / "m.gguf").write_bytes(tiny("llama").read_bytes())
    (tmp_path / "m.gguf").chmod(0)
    fails(1, "cannot be read", tmp_path / "m.gguf")


def test_budget_below_the_minimum_names_one_that_works(tiny: Tiny) -> None:
    """In a process of its own: this one's memory has grown with the tests."""
    for budget in ("1MiB", "100MiB"):
        result = own_process("run", tiny("llama"), *SHORT, "--ram", budget)
        assert result.status == 1
        found = re.search(
            r"--ram .* is too small for this model: the smallest that works is (\d+MiB)$", result.message
        )
        assert found is not None, result.message
        least = found[1]
    assert own_process("run", tiny("llama"), *SHORT, "--ram", least).status == 0


@pytest.mark.parametrize("ram", ["lots", "-1GiB", "6 gallons", ""])
def test_budget_that_cannot_be_read(ram: str, tiny: Tiny) -> None:
    fails(2, "cannot read the size", tiny("llama"), "--ram", ram)


@pytest.mark.parametrize("cache", ["lots", "-5", "5%%", "half", "", "\u00b2", "9" * 5000])
def test_cache_that_cannot_be_read(cache: str, tiny: Tiny) -> None:
    fails(2, "cannot read --cache", tiny("llama"), "--cache", cache)


def test_budget_and_cache(tiny: Tiny) -> None:
    fails(2, "not both", tiny("llama"), "--cache", "50%", "--ram", "1GiB")


def test_unknown_policy(tiny: Tiny) -> None:
    fails(2, "unknown policy 'best': use one of lru, lfu", tiny("llama"), "--policy", "best")


def test_context(tiny: Tiny) -> None:
    for wrong in (0, -5, 5_000_000_000):
        fails(2, "at least 1, and at most", tiny("llama"), "-c", wrong)


def test_threads(tiny: Tiny) -> None:
    fails(
        2, "at most 512 threads", tiny("llama"), "-t", 513, stdin="x"
    )  # beyond that the library ends the process


def test_prompt_longer_than_the_context(tiny: Tiny) -> None:
    arguments = (tiny("llama"), "-c", 256, "--cache", "50%", "-t", 1)
    fails(2, r"the prompt has \d+ tokens, the context 256", *arguments, stdin="xyz" * 200)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(prompt: str, tiny: Tiny) -> None:
    fails(2, "the prompt is empty", tiny("llama"), stdin=prompt)


def test_prompt_given_twice(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("hello")
    fails(2, "not both", tiny("llama"), "-f", tmp_path / "p")


def test_prompt_file(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        fails(2, "the prompt (cannot be read|is not UTF-8)", tiny("llama"), "-f", file, stdin="")


def test_report_that_cannot_be_written(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = (tiny("llama"), *SHORT, "-q", "--cache", "50%", "--json", tmp_path / "file" / "report.json")
    result = flashmoe("run", *arguments)
    assert result.status == 1
    assert "the report cannot be written" in result.message


def test_trace_that_cannot_be_written(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = (
        tiny("llama"),
        *SHORT,
        "-q",
        "--cache",
        "50%",
        "--trace",
        tmp_path / "file" / "t.safetensors",
    )
    result = flashmoe("run", *arguments)
    assert result.status == 1
    assert result.message


@pytest.mark.parametrize(
    "name", ["hf:", "hf:model", "hf:a/b/c", "hf:/", "hf:a/", "hf:/b:file.gguf", "hf:a b/c"]
)
def test_malformed_hub_name(name: str) -> None:
    fails(2, "hf:organisation/repository", name)


@pytest.mark.parametrize("name", ["hf:someone/model-GGUF", "hf:someone/model-GGUF:model-Q4_0.gguf"])
def test_hub_without_network(name: str) -> None:
    fails(1, f"{re.escape(name)}: .*(network|offline|cannot be reached)", name)


def test_unusable_library(tiny: Tiny, tmp_path: Path) -> None:
    result = flashmoe("run", tiny("llama"), *SHORT, env={"FLASHMOE_LIBLLAMA": str(tmp_path)})
    assert result.status == 1
    assert "no such library" in result.message


def test_wrong_options(tiny: Tiny) -> None:
    for arguments in (("--frobnicate",), ("-n", "many"), ()):
        result = flashmoe("run", *([tiny("llama")] if arguments else []), *arguments)
        assert result.status == 2
        assert "Traceback" not in result.err
        assert "Usage" in result.err


HUGE = "9" * 400
NESTED = "[" * 100_000


@pytest.mark.parametrize(
    "option",
    [
        ("-n", -2), ("-n", 99999999999), ("-c", 1), ("-c", HUGE), ("-t", HUGE), ("-ub", 0), ("--ram", HUGE),
        ("--reasoning-budget", 99999999999), ("--chat-template-kwargs", NESTED), ("-l", f"{HUGE}+1"),
        ("-j", NESTED), ("--save-cache-size", HUGE), ("--policy", "lru:" + HUGE), ("--prefetch", f"table:{HUGE}"),
    ],
    ids=lambda option: f"{option[0]} {option[1]}"[:20],
)  # fmt: skip
def test_values_out_of_range(option: tuple[str, object], tiny: Tiny) -> None:
    result = flashmoe("run", tiny("llama"), *SHORT, *option)
    assert (result.status, result.out) == (2, "")
    assert "Traceback" not in result.err


@pytest.mark.parametrize("verb", ["run", "plan", "verify", "pack", "doctor"])
@pytest.mark.parametrize(
    "name", ["x" * 5000, "~nosuchuser/m.gguf", "hf:" + "x" * 5000 + "/m"], ids=lambda n: n[:5]
)
def test_names_that_no_file_can_have(verb: str, name: str) -> None:
    result = flashmoe(verb, name, *(SHORT if verb == "run" else ()))
    assert result.status in (1, 2)
    assert result.message.startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "TRACE", "--capacity", "nan"), ("simulate", "TRACE", "--capacity", "inf"),
        ("simulate", "TRACE", "--compute", -1), ("plan", "demo", "-c", 0), ("plan", "demo", "-t", 100_000),
        ("plan", "demo", "--drive", "/none"), ("trace", "split", "TRACE", "-o", "a", "b", "--seed", -1),
        ("train", "policy", "TRACE", "-o", "p", "-t", 0), ("train", "prefetch", "TRACE", "-o", "p", "--seed", -1),
        ("bench", "run", "demo", "--cache", "50%,x"), ("bench", "run", "demo", "--ram", HUGE + "%"),
        ("bench", "make-model", "OLMoE-1B-7B", "m", "-s", -1), ("serve", "demo", "--host", "a" * 300),
        ("serve", "demo", "--port", 0, "--alias", "\udcff"), ("serve", "demo", "--port", 0, "--api-key", "\udcff"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments))[:40],
)  # fmt: skip
def test_values_of_other_commands(arguments: tuple[object, ...], tmp_path: Path) -> None:
    rows = [{"experts": [[i % 8, (i + 1) % 8]], "token": i} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = flashmoe(*(tmp_path / "t.jsonl" if word == "TRACE" else word for word in arguments))
    assert (result.status, result.out) == (2, "")
    assert "Traceback" not in result.err


def test_outputs_do_not_replace_what_took_hours(tiny: Tiny, tmp_path: Path) -> None:
    """The name of the model, or of a trace, where that of a report or of another trace was meant."""
    model, trace = tmp_path / "m.gguf", tmp_path / "t.safetensors"
    model.write_bytes(tiny("llama").read_bytes())
    common = (model, *SHORT, "-q", "--cache", "50%")
    for _ in range(2):  # a trace may take a trace's place
        assert flashmoe("run", *common, "--trace", trace).status == 0
    for option, path in (("--json", model), ("--trace", model), ("--json", trace)):
        before = path.read_bytes()
        result = flashmoe("run", *common, option, path)
        assert (result.status, result.out) == (2, "")
        assert "name another for the" in result.message
        assert path.read_bytes() == before
    before = trace.read_bytes()
    result = flashmoe("train", "prefetch", trace, "-o", trace, "-q")
    assert (result.status, trace.read_bytes()) == (2, before)
    assert "a trace or a trained file is there; choose another place" in result.message


def test_names_too_long_for_what_lies_beside(tiny: Tiny, tmp_path: Path) -> None:
    """The longest name that a file can have: its pack's cannot be."""
    path = tmp_path / ("x" * 250 + ".gguf")
    path.write_bytes(tiny("llama").read_bytes())
    assert flashmoe("run", path, *SHORT, "--cache", "50%").status == 0
    for verb in ("verify", "pack"):
        assert "cannot be written (File name too long)" in flashmoe(verb, path, "-q").message


def test_projectors_that_are_none(tiny: Tiny, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    fails(1, "is a pipe or a device", tiny("llama"), *SHORT, "--mmproj", tmp_path / "pipe", stdin="")
    fails(
        1, "is no projector, but a GGUF of llama", tiny("llama"), *SHORT, "--mmproj", tiny("llama"), stdin=""
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temp", "nan", "temperature is nan: give a finite number"),
        ("--top-p", "inf", "top_p is inf"),
        ("--repeat-penalty", "-1e309", "repeat_penalty is -inf"),
        ("-j", "[]", "the JSON schema is none"),
    ],
)
def test_values_that_json_does_not_have(option: str, value: str, message: str, tiny: Tiny) -> None:
    fails(2, message, tiny("llama"), *SHORT, option, value, stdin="")
