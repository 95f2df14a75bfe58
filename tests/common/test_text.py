"""Texts and file names of every kind are taken, or refused in a line."""

from __future__ import annotations

import codecs
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import flashmoe as package
from flashmoe.common.text import argument, decode, printable
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import UsageError
from tests.cli.runner import flashmoe, own_process
from tests.conftest import Tiny
from tests.models.writer import split
from tests.serving.copies import copy

#: Names that were a trouble somewhere: to rich, to the names of parts, to terminals, to encoders.
NAMES = (
    b"[bold].gguf", b"[red]m.gguf", b"best-of-both-Q4_0.gguf", b"x-00002-of-00003.gguf", b"caf\xe9.gguf", b"\xff\xfe",
    b"a\nb.gguf", b"\x1b[31mred.gguf", "\u202e.gguf".encode(), "\u4e2d\u6587 \U0001f600.gguf".encode(), b"-m.gguf",
    b"%s{0}$HOME`id`.gguf", b" .gguf", b"it's \"m\".gguf", b"hf:m.gguf", b"m" * 240 + b".gguf",
)  # fmt: skip
file_names = st.one_of(st.sampled_from(NAMES), st.binary(min_size=1, max_size=60)).filter(
    lambda name: not set(name) & {0, ord("/")} and name not in (b".", b"..")
)


@given(st.text(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_text_with_and_without_a_mark(text: str, encoding: str) -> None:
    assume(not text.startswith("\ufeff") and not (encoding == "utf-16" and text.startswith("\0")))
    assert decode(text.encode(encoding), "it") == text


@given(st.binary())
def test_bytes_are_text_or_refused_in_a_line(data: bytes) -> None:
    error, text = None, ""
    try:
        text = decode(data, "standard input")
    except UsageError as raised:
        error = str(raised)
    if error:
        assert re.fullmatch(r"standard input is not UTF-8 text \(byte 0x\w\w at .*iconv.*", error)
    elif not data.startswith(
        (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
    ):
        assert text.encode() == data


@given(st.text(st.characters(codec=None)))
def test_a_name_can_be_shown_and_encoded(name: str) -> None:
    shown = printable(name)
    assert len(shown) == len(name)
    assert shown.encode().decode() == shown
    assert not set(shown) & set(map(chr, [*range(32), *range(127, 160)]))


def test_arguments_that_python_could_not_decode() -> None:
    assert argument("caf\u00e9", "-p") == "caf\u00e9"
    assert argument("caf\u00e9".encode().decode("ascii", "surrogateescape"), "-p") == "caf\u00e9"
    with pytest.raises(UsageError, match="-p is not UTF-8 text"):
        argument("caf\udce9", "-p")


@given(name=file_names)
@settings(max_examples=25)
def test_a_model_of_any_name(name: bytes, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its checksums are taken and compared; the report is JSON, and an error is one line."""
    folder = tmp_path_factory.mktemp("names")
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    os.link(tiny("olmoe"), path)
    for _ in range(2):
        result = flashmoe("verify", path, "--json", "-")
        if result.status:
            assert result.message.startswith("error: ")
            assert len(name) > 200  # no room for what is put behind it
        else:
            assert json.loads(result.out)["model"] == str(path)
    path.unlink()  # the model has other names
    path.write_bytes(b"")
    assert "not a GGUF" in flashmoe("verify", path).message


@pytest.mark.parametrize("name", [b"x[/bold].gguf", NAMES[2], NAMES[4], NAMES[6], NAMES[7]], ids=repr)
def test_a_model_of_an_odd_name_is_run(name: bytes, tiny: Tiny, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    os.link(tiny("qwen3moe"), path)
    trace, report = path.with_suffix(".safetensors"), path.with_suffix(".json")
    common = ("-n", 2, "-t", 1, "-c", 128, "--cache", "50%")
    run = own_process("run", path, "--chat", "-p", "hi", "--trace", trace, "--json", report, *common)
    assert run.status == 0, run.err
    assert json.loads(report.read_text())["model"] == printable(path.name)
    info = flashmoe("trace", "info", trace)
    assert info.status == 0, info.err
    missing = flashmoe("run", path.with_suffix(".none"), "-p", "hi")
    assert (missing.status, "no such file" in missing.message) == (1, True)


def test_of_in_the_names_of_parts(tiny: Tiny, tmp_path: Path) -> None:
    os.link(tiny("olmoe"), tmp_path / "best-of-00001-of-both.gguf")
    parts = split(tmp_path / "best-of-00001-of-both.gguf", 3)
    assert flashmoe("verify", parts[0]).status == 0
    shouted = [path.rename(path.with_suffix(".GGUF")) for path in parts]
    assert flashmoe("verify", shouted[0]).status == 0


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    """Opening one would wait for ever."""
    os.mkfifo(tmp_path / "m.gguf")
    assert "is a pipe or a device" in flashmoe("verify", tmp_path / "m.gguf").message


PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LOCALES = (
    {**PLAIN, "LC_ALL": "C"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "utf-8:strict"},
)
BABBLE = (
    "--temp",
    3,
    "--top-k",
    0,
    "--top-p",
    1,
    "--min-p",
    0,
    "-s",
    1,
    "-n",
    40,
    "-t",
    1,
    "--cache",
    "100%",
)


@pytest.mark.parametrize("locale", LOCALES, ids=repr)
def test_output_in_any_encoding(locale: dict[str, str], demo: Path, tmp_path: Path) -> None:
    """Text that the encoding does not have costs neither the rest nor the report."""
    command = ("run", demo, "-p", "caf\u00e9 \u4e2d", *BABBLE, "--json", tmp_path / "report")
    result = own_process(*command, env={**locale, "COLUMNS": "80"}, encoding=None)
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "report").read_text())["decode"]["tokens"] > 5


@pytest.mark.parametrize(
    ("data", "locale"),
    list(zip((b"caf\xe9", bytes(range(256)), b"\xff" * 9, b"\xc3"), LOCALES, strict=True)),
    ids=repr,
)
def test_input_that_is_no_text(data: bytes, locale: dict[str, str]) -> None:
    """Which bytes are text, `decode` says in any locale; here: that nothing else reads them before."""
    result = own_process("run", "demo", "-n", 1, stdin=data, env=locale, encoding=None)
    assert result.status == 2
    assert "standard input is not UTF-8 text" in result.message


@pytest.mark.parametrize("how", ["file", "standard input", "argument"])
def test_the_same_prompt_by_every_way(how: str, tiny: Tiny, tmp_path: Path) -> None:
    """A byte-order mark is none of it; the locale C does not change it."""
    text = "caf\u00e9 sky"
    (tmp_path / "f").write_bytes(codecs.BOM_UTF8 + text.encode())
    given, data = ("-p", text), None
    if how != "argument":
        given, data = (("-f", tmp_path / "f"), None) if how == "file" else ((), (tmp_path / "f").read_bytes())
    result = own_process(
        "run", tiny("olmoe"), *given, "-n", 1, "-t", 1, "-c", 64, "--json", tmp_path / "r",
        stdin=data, env=LOCALES[0], encoding=None,
    )  # fmt: skip
    assert result.status == 0, result.err
    with package.load(tiny("olmoe"), cache="100%", threads=1, n_ctx=64) as model:
        expected = len(model.engine.tokenize(text))
    assert json.loads((tmp_path / "r").read_text())["prefill"]["tokens"] == expected


def test_lines_of_prompts_end_at_line_ends_only(tmp_path: Path) -> None:
    from flashmoe.cli.trace import read_prompts

    path = tmp_path / "p.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + '"a\u2028b\u0085c"\r\n{"prompt": "d"}\n'.encode())
    assert list(read_prompts(path)) == ["a\u2028b\u0085c", "d"]


def test_tokens_longer_than_any_buffer(tiny: Tiny, tmp_path: Path, lib: Library) -> None:
    import gguf

    tokens = gguf.GGUFReader(tiny("olmoe")).fields["tokenizer.ggml.tokens"].contents()
    tokens[-1] = "x" * 5000
    path = copy(tiny("olmoe"), tmp_path / "long.gguf", tokenizer__ggml__tokens=tokens)
    with package.load(path, cache="100%", threads=1, n_ctx=64, library=lib) as model:
        assert model.engine.piece(len(tokens) - 1) == b"x" * 5000
        assert model.engine.piece(97) == b"a"
