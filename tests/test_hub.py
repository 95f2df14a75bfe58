"""From a model's name to its files, without a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.errors import FlashMoEError, ModelError, UsageError
from flashmoe.storage import hub, hub_names
from flashmoe.storage.hub_names import HubName

Q4 = ["Q4/m-00001-of-00002.gguf", "Q4/m-00002-of-00002.gguf"]
FILES = [
    "README.md", "config.json", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-UD-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", *Q4,
    "IQ2/m-IQ2_XS.gguf", "IQ2/m-IQ2_XXS.gguf", "mmproj-F16.gguf", "m-F16.gguf", "imatrix_unsloth.gguf",
    "m.BF16-00001-of-00002.gguf", "m.BF16-00002-of-00002.gguf", "m-Q4_K_M.imatrix.gguf",
]  # fmt: skip


def test_parts_of_a_split_model() -> None:
    assert hub_names.parts_of("Q4/m-00001-of-00003.gguf") == [
        f"Q4/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)
    ]
    assert hub_names.parts_of("m-00002-of-00003.gguf")[0] == "m-00001-of-00003.gguf"
    assert hub_names.parts_of("m-00001-of-00001.gguf") == ["m-00001-of-00001.gguf"]
    twice = "a-00001-of-b-00001-of-00002.gguf"
    assert hub_names.parts_of(twice) == [twice, twice.replace("b-00001", "b-00002")]
    for single in (
        "m.gguf",
        "m-00001-of-many.gguf",
        "of-00001.gguf",
        "best-of-both.gguf",
        "m-00000-of-00000.gguf",
    ):
        assert hub_names.parts_of(single) == [single]


def choose(names: list[str], wish: str = "") -> str:
    return hub_names.choose(HubName("a/b", wish), names)


def test_only_model_of_a_repository() -> None:
    files = ["README.md", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert choose(files) == "m-00001-of-00002.gguf"
    assert choose(["x.gguf"]) == "x.gguf"
    assert (
        choose(["best-of-both.gguf", "mmproj-BF16.gguf", "imatrix.gguf", "x.imatrix.gguf"])
        == "best-of-both.gguf"
    )
    with pytest.raises(ModelError, match="has no GGUF file"):
        choose(["model.safetensors"])
    with pytest.raises(ModelError, match="--engine transformers"):
        choose(["model.safetensors", "config.json"])
    with pytest.raises(UsageError, match=r"has 2 models, name one as hf:a/b:FILE \(x.gguf, y.gguf\)"):
        choose(["x.gguf", "y.gguf"])
    with pytest.raises(UsageError, match=r"has 20 models.*, \.\.\.\)"):
        choose([f"{i:02d}.gguf" for i in range(20)])


@pytest.mark.parametrize(
    ("wish", "file"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("Q4_K_M.gguf", "m-Q4_K_M.gguf"),
        ("UD-Q4_K_M", "m-UD-Q4_K_M.gguf"),
        ("UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        ("Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        ("IQ2_XS", "IQ2/m-IQ2_XS.gguf"),
        ("Q4", Q4[0]),
        ("bf16", "m.BF16-00001-of-00002.gguf"),
        ("F16", "m-F16.gguf"),
        ("mmproj-F16.gguf", "mmproj-F16.gguf"),  # named as a whole
        ("m-Q8_0.gguf", "m-Q8_0.gguf"),
    ],
)
def test_quantisations(wish: str, file: str) -> None:
    assert choose(FILES, wish) == file


@pytest.mark.parametrize(
    ("wish", "message"),
    [("Q6_K", "no file 'Q6_K', name one of .*m-Q8_0.gguf"), ("IQ2", "has 2 models of 'IQ2'")],
)
def test_quantisations_that_are_not_one_file(wish: str, message: str) -> None:
    with pytest.raises(FlashMoEError, match=message):
        choose(FILES, wish)


@given(st.lists(st.sampled_from(FILES)), st.one_of(st.sampled_from(FILES), st.text(max_size=8)))
def test_any_wish_is_answered_by_a_file_or_a_list(names: list[str], wish: str) -> None:
    try:
        chosen = choose(sorted(set(names)), wish)
    except FlashMoEError:
        return
    assert chosen in names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("hf:a/b", HubName("a/b")),
        ("hf:a/b:m.gguf", HubName("a/b", "m.gguf")),
        ("hf:a/b:Q8_0", HubName("a/b", "Q8_0")),
        ("hf:a/b:latest", HubName("a/b")),
        ("hf://a/b/Q4/m.gguf", HubName("a/b", "Q4/m.gguf")),
        ("hf.co/a/b:Q8_0", HubName("a/b", "Q8_0")),
        ("huggingface.co/a/b@q8_0", HubName("a/b", "q8_0")),
        ("https://huggingface.co/a/b", HubName("a/b")),
        ("hf:https://huggingface.co/a/b/", HubName("a/b")),
        ("https://huggingface.co/a/b/tree/main", HubName("a/b")),
        ("https://huggingface.co/a/b/tree/main/Q4", HubName("a/b", "Q4")),
        ("https://huggingface.co/a/b/blob/main/m%20x.gguf", HubName("a/b", "m x.gguf")),
        ("https://hf.co/a/b/resolve/v2/Q4/m.gguf?download=true#x", HubName("a/b", "Q4/m.gguf", "v2")),
        ("http://127.0.0.1:99/a/b", HubName("a/b")),
        ("https://HuggingFace.co/a/b?show_file_info=Q4%2Fm.gguf", HubName("a/b", "Q4/m.gguf")),
        ("https://huggingface.co/a/b:Q8_0", HubName("a/b", "Q8_0")),
        ("https://huggingface.co/a/b/blob/refs%2Fpr%2F1/m.gguf\n", HubName("a/b", "m.gguf", "refs/pr/1")),
        ("huggingface.co/a/b/resolve/main/m.gguf", HubName("a/b", "m.gguf")),
        ("hf.co/a/b/Q4/m.gguf", HubName("a/b", "Q4/m.gguf")),
        ("hf:a/b:Q8_0 ", HubName("a/b", "Q8_0")),
        ("hf://a/b@v2/Q4/m.gguf", HubName("a/b", "Q4/m.gguf", "v2")),
        ("hf://a/b@main/m.gguf", HubName("a/b", "m.gguf")),
        ("HF:a/b:Q8_0", HubName("a/b", "Q8_0")),
        ('"hf:a/b:Q8_0"', HubName("a/b", "Q8_0")),
        ("<https://huggingface.co/a/b>", HubName("a/b")),
        ("https://huggingface.co/a/b.git", HubName("a/b")),
        ("https://huggingface.co/a/b/discussions/3", HubName("a/b")),
        ("https://huggingface.co/a/b/commit/v2", HubName("a/b", "", "v2")),
        ("https://huggingface.co/a/b/resolve/refs/pr/1/Q4/m.gguf", HubName("a/b", "Q4/m.gguf", "refs/pr/1")),
        ("models/m.gguf", None),
        ("demo", None),
        ("/home/me/m.gguf", None),
    ],
)
def test_names(name: str, meant: HubName | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:99")
    assert hub_names.parse(name) == meant


@given(
    st.builds(str.__add__, st.sampled_from(["hf:", "hf.co/", "https://hf.co/", "https://", ""]), st.text())
)
def test_any_name_is_one_or_none_or_refused(name: str) -> None:
    try:
        found = hub_names.parse(name)
    except UsageError:
        return
    assert found is None or found.repository.count("/") == 1


@pytest.mark.parametrize(
    "name",
    [
        "hf:", "hf:model", "hf:a/b/c", "hf:/b", "hf:a/", "hf:a b/c:m.gguf", "hf:../x/m", "hf.co/", "https://hf.co/a",
        "https://huggingface.co/",
    ],
)  # fmt: skip
def test_malformed_names(name: str) -> None:
    with pytest.raises(UsageError, match="write hf:organisation/repository"):
        hub.resolve(name)


def test_addresses_of_others() -> None:
    with pytest.raises(UsageError, match="no address of the hub: download the model"):
        hub.resolve("https://example.org/m.gguf")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/m.gguf") == tmp_path / "m.gguf"
    with pytest.raises(ModelError, match="is a folder; name a GGUF file in it$"):
        hub.resolve(tmp_path)
    (tmp_path / "found.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="in it: found.gguf"):
        hub.resolve(str(tmp_path))


def test_what_is_there_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what would be in a folder that is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert hub.resolve("a/b") == Path("a/b")
    (tmp_path / "hf.co/c").mkdir(parents=True)
    (tmp_path / "hf.co/c/d").touch()
    assert hub.resolve("hf.co/c/d") == Path("hf.co/c/d")


def test_bundled_model() -> None:
    assert hub.resolve("demo") == hub.demo_model()
    assert hub.demo_model().name == "demo.gguf"


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of every repository."""
    names: list[str] = []

    def info(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    return names


def test_download_of_all_parts(listed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def download(repository: str, name: str, revision: str | None) -> str:
        if name == "Q4.gguf":
            raise EntryNotFoundError("404")
        asked.append((repository, name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    listed += Q4
    expected = [("a/b", name, None) for name in Q4]
    names = ("hf:a/b", "a/b", "a/b:Q4", f"hf:a/b:{Q4[0]}", f"hf:a/b:{Q4[1]}", "hf:a/b:Q4.gguf")
    for number, name in enumerate(names, 1):
        assert hub.resolve(name) == tmp_path / Q4[0]
        assert asked == number * expected
    assert hub.resolve("https://huggingface.co/a/b/blob/v2/other.gguf") == tmp_path / "other.gguf"
    assert asked[-1] == ("a/b", "other.gguf", "v2")


@pytest.mark.parametrize("error", [ConnectionError("refused"), OfflineModeIsEnabled("off")])
def test_what_was_downloaded_is_found_without_a_network(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, revision: str(tmp_path / name))
    with pytest.raises(ModelError, match="network|HF_HUB_OFFLINE"):
        hub.resolve("hf:a/b")
    place = tmp_path / "models--a--b"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0123")
    (place / "snapshots/0123/Q4").mkdir(parents=True)
    for name in Q4:
        (place / "snapshots/0123" / name).touch()
    assert hub.resolve("hf:a/b") == tmp_path / Q4[0]
    with pytest.raises(ModelError, match="not a GGUF"):  # it is read from there
        hub.header("hf:a/b:Q4")
    (place / "snapshots/0123" / Q4[1]).unlink()
    with pytest.raises(ModelError, match="network|HF_HUB_OFFLINE"):
        hub.header("hf:a/b:Q4")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device.*free disk space"),
        (OSError(30, "Read-only file system", "/hub"), "cannot be written in /hub .Read-only.*HF_HOME"),
        (ConnectionError("refused"), "refused.*network"),
    ],
)
def test_failed_downloads(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ModelError, match=f"hf:a/b:m.gguf: .*{message}"):
        hub.resolve("hf:a/b:m.gguf")


def test_a_file_that_is_not_there(listed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    listed += ["other.gguf"]
    with pytest.raises(ModelError, match="has no file 'm.gguf', name one of other.gguf"):
        hub.resolve("hf:a/b:m.gguf")


def test_bugs_are_not_taken_for_a_lost_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ZeroDivisionError):
        hub.resolve("hf:a/b:m.gguf")
