"""What is kept of kernels, and what is used: files of a user's cache folder, which may be damaged or gone."""

from __future__ import annotations

import ctypes.util
import json
import re
import warnings
from pathlib import Path

import pytest

from flashmoe.common import machine
from flashmoe.engines.llamacpp import instructions, kernels, tested
from flashmoe.engines.llamacpp.kernels import BUILT_IN, Choice
from flashmoe.engines.llamacpp.library import Library, kernels_name
from flashmoe.errors import FlashMoEWarning, LibraryError, UsageError
from tests.cli.runner import flashmoe
from tests.cli.test_json import check as check_names

FACTS = {"source": "a test", "repacks": True, "decode_ratio": 1.5, "prompt_ratio": 1.25}


def put(home: Path, name: str, content: bytes = b"no module") -> kernels.Kernels:
    """Keep a file that is none of kernels."""
    made = home / f".part-{name}"
    made.mkdir(parents=True)
    (made / f"libggml-cpu-{name}.so").write_bytes(content)
    return kernels.keep(made, f"libggml-cpu-{name}.so", FACTS | {"name": name})


def test_kept_used_and_removed(home: Path) -> None:
    assert kernels.kept() == []
    assert kernels.choice() == Choice(BUILT_IN, chosen=False)
    one, two = put(home, "one"), put(home, "two")
    assert [k.name for k in kernels.kept()] == ["one", "two"]
    assert kernels.in_use() is None
    kernels.use("two")
    assert kernels.in_use() == kernels.find("two")
    assert kernels.find("two").module == two.module
    kernels.remove(kernels.find("two"))
    assert (kernels.in_use(), kernels.choice()) == (None, Choice(BUILT_IN, chosen=False))
    assert [k.module for k in kernels.kept()] == [one.module]
    assert sorted(p.name for p in home.iterdir()) == ["in-use.json", one.module.parent.name]


def test_new_ones_take_the_place_of_those_of_the_same_name(home: Path) -> None:
    old = put(home, "one", b"old")
    kernels.use("one")
    new = put(home, "one", b"new")
    assert not old.module.exists()
    assert kernels.in_use() == kernels.find("one")
    assert kernels.find("one").module == new.module
    again = put(home, "one", b"new")
    assert again.module.read_bytes() == b"new"


@pytest.mark.parametrize("content", ["", "{", "null", "{}", '{"name": 1}', "\x00"])
def test_damaged_files_count_as_not_there(content: str, home: Path) -> None:
    one = put(home, "one")
    kernels.use("one")
    (home / "in-use.json").write_text(content)
    assert kernels.choice() == Choice()
    facts = one.module.parent / "kernels.json"
    for damaged in (content, json.dumps({**one.facts, "decode_ratio": content})):
        facts.write_text(damaged)
        assert kernels.kept() == []
        assert flashmoe("engine", "list").status == 0


def test_a_module_outside_of_its_folder_is_not_used(home: Path) -> None:
    one = put(home, "one")
    path = one.module.parent / "kernels.json"
    path.write_text(json.dumps({**one.facts, "module": "../../../libggml-cpu-one.so"}))
    assert [k.module for k in kernels.kept()] == [one.module]


def test_other_processors_and_wheels_have_folders_of_their_own(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "instructions", lambda: "others")
        assert kernels.folder() != home
        assert kernels.folder().parent == home.parent
    monkeypatch.setattr(kernels, "wheel_version", lambda: "2031.1.1")
    assert kernels.folder() != home


def test_a_new_wheel_is_spoken_of_once(home: Path, lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    put(home, "one")
    monkeypatch.setattr(kernels, "wheel_version", lambda: "2031.1.1")
    monkeypatch.setattr(tested, "prove", lambda *_: tested.Proof(True, True))
    with pytest.warns(FlashMoEWarning, match=r"xllamacpp 2031.1.1 is new here.*`flashmoe engine build`"):
        tested.tested_library()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tested.tested_library() is lib
    assert not kernels.choice().chosen


def test_kernels_that_fail_give_way(home: Path, lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at each start, and tried once."""
    one = put(home, "one")
    kernels.use("one")
    asked: list[Path | None] = []

    def prove(library: Path, module: Path | None = None) -> tested.Proof:
        asked.append(module)
        return tested.Proof(False, False, "ended by SIGILL") if module else tested.Proof(True, True)

    monkeypatch.setattr(tested, "prove", prove)
    for _ in range(2):
        with pytest.warns(
            FlashMoEWarning, match=f"{one.module}.*SIGILL.*built-in ones are used.*`flashmoe engine"
        ):
            assert tested.tested_library() is lib
    assert asked == [one.module, None]


def test_a_library_that_fails_with_repacked_weights_goes_without(
    home: Path, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tested, "prove", lambda *_: tested.Proof(True, False, "ended by SIGILL"))
    with pytest.warns(FlashMoEWarning, match="fails with repacked weights .*SIGILL"):
        assert not tested.self_test(lib.path).repacked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tested.self_test(lib.path).repacked


def test_modules_that_are_none(home: Path, lib: Library, tmp_path: Path) -> None:
    """ggml refuses them, with its reason, and the library goes on with its own kernels."""
    path = tmp_path / "libggml-cpu-x.so"
    libm = ctypes.util.find_library("m")
    for content in (b"", b"no module"):
        path.write_bytes(content)
        with pytest.raises(LibraryError, match="not a module that this llama.cpp can use"):
            lib.exchange_kernels(path)
    with pytest.raises(LibraryError, match="ggml_backend_init"):
        lib.exchange_kernels(Path(str(libm)))
    assert lib.module is None
    assert lib.kernels.startswith(BUILT_IN)


@pytest.mark.parametrize(
    ("file", "name"),
    [("libggml-cpu-zen4.so", "zen4"), ("libggml-cpu-armv8.2_1.so.0.1", "armv8.2_1"), ("ggml-cpu.so", "cpu")],
)
def test_names(file: str, name: str) -> None:
    assert kernels_name(Path("/x") / file) == name


def flags(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(instructions, "processor_flags", lambda: frozenset(text.split()))


AVX512 = "avx avx2 avx512f avx512cd avx512vl avx512dq avx512bw"


def test_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert instructions.compiled_for(["AVX", "AVX2", "FMA", "OPENMP"]) == "AVX2"
    assert instructions.compiled_for(["AVX2", "AVX512", "AMX_INT8"]) == "AVX-512"
    assert instructions.compiled_for(["SSE3"]) == ""
    flags(monkeypatch, AVX512)
    assert instructions.better_here(["AVX2"]) == "AVX-512"
    assert instructions.better_here(["AVX2", "AVX512"]) == ""
    flags(monkeypatch, "avx avx2 avx512f")  # in part: of no use
    assert instructions.better_here(["AVX2"]) == ""
    flags(monkeypatch, "asimd asimddp i8mm")
    assert instructions.better_here(["NEON"]) == "int8 products"
    flags(monkeypatch, "")
    assert instructions.better_here([]) == ""


def test_this_processor_has_flags() -> None:
    assert {"avx", "sse2", "asimd"} & machine.processor_flags()


def test_hint_until_something_is_chosen(home: Path, lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    flags(monkeypatch, "")
    assert kernels.hint(lib) == ""
    flags(monkeypatch, AVX512)
    monkeypatch.setattr(Library, "features", ["AVX", "AVX2"])
    expected = r"has AVX2, this processor AVX-512: `flashmoe engine build` .* up to 1\.\dx"
    assert re.search(expected, kernels.hint(lib))
    kernels.use(BUILT_IN)
    assert kernels.hint(lib) == ""


def test_commands(home: Path) -> None:
    put(home, "one")
    assert flashmoe("engine", "use", "one").status == 0
    listed = flashmoe("engine", "list", "--json", "-")
    check_names(json.loads(listed.out))
    rows = {row["name"]: row["in_use"] for row in json.loads(listed.out)}
    assert rows == {BUILT_IN: False, "one": True}
    assert [line.split()[:3] for line in flashmoe("engine", "list").out.splitlines()[1:]] == [
        [BUILT_IN, "the", "library"],
        ["in", "use", "one"],
    ]
    assert flashmoe("engine", "use", BUILT_IN).status == 0
    assert kernels.in_use() is None
    for command in ("use", "remove"):
        wrong = flashmoe("engine", command, "two")
        assert wrong.status == 2
        assert (
            "no kernels called 'two' for this wheel and processor; there are built-in, one" in wrong.message
        )
    assert flashmoe("engine", "remove", "one").status == 0
    assert kernels.kept() == []
    assert flashmoe("engine", "remove", BUILT_IN).status == 2


def test_kept_kernels_cannot_be_found_where_they_are_not(home: Path) -> None:
    with pytest.raises(UsageError, match="there are built-in$"):
        kernels.find("one")
