"""From a model's name to its files, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from flashmoe.errors import ModelError, UsageError
from flashmoe.storage import hub


def test_parts_of_a_split_model() -> None:
    assert hub._parts("Q4/m-00001-of-00003.gguf") == [f"Q4/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert hub._parts("m-00001-of-00001.gguf") == ["m-00001-of-00001.gguf"]
    for single in ("m.gguf", "m-00002-of-00003.gguf", "m-00001-of-many.gguf", "of-00001.gguf"):
        assert hub._parts(single) == [single]


def test_only_model_of_a_repository() -> None:
    files = ["README.md", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert hub._choose_model("a/b", files) == "m-00001-of-00002.gguf"
    assert hub._choose_model("a/b", ["x.gguf"]) == "x.gguf"
    with pytest.raises(ModelError, match="has no GGUF file"):
        hub._choose_model("a/b", ["model.safetensors"])
    with pytest.raises(UsageError, match=r"has 2 models, name one as hf:a/b:FILE \(x.gguf, y.gguf\)"):
        hub._choose_model("a/b", ["x.gguf", "y.gguf"])
    with pytest.raises(UsageError, match=r"has 20 models.*, \.\.\.\)"):
        hub._choose_model("a/b", [f"{i:02d}.gguf" for i in range(20)])


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/m.gguf") == tmp_path / "m.gguf"
    with pytest.raises(ModelError, match="is a folder; name a GGUF file in it$"):
        hub.resolve(tmp_path)
    (tmp_path / "found.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="in it: found.gguf"):
        hub.resolve(str(tmp_path))


def test_bundled_model() -> None:
    assert hub.resolve("demo") == hub.demo_model()
    assert hub.demo_model().name == "demo.gguf"


def test_download_of_all_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "list_repo_files",
        lambda *_: ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
    )
    expected = [("a/b", "m-00001-of-00002.gguf"), ("a/b", "m-00002-of-00002.gguf")]
    assert hub.resolve("hf:a/b") == tmp_path / "m-00001-of-00002.gguf"
    assert asked == expected
    assert hub.resolve("hf:a/b:m-00001-of-00002.gguf") == tmp_path / "m-00001-of-00002.gguf"
    assert asked == 2 * expected
    assert hub.resolve("hf:a/b:other.gguf") == tmp_path / "other.gguf"
    assert asked[-1] == ("a/b", "other.gguf")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EntryNotFoundError("404"), "has no file 'm.gguf'"),
        (LocalEntryNotFoundError("offline"), "the hub cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device.*free disk space"),
        (ConnectionError("refused"), "refused.*network"),
    ],
)
def test_failed_downloads(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ModelError, match=f"hf:a/b:m.gguf: .*{message}"):
        hub.resolve("hf:a/b:m.gguf")


def test_bugs_are_not_taken_for_a_lost_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ZeroDivisionError):
        hub.resolve("hf:a/b:m.gguf")


@pytest.mark.parametrize(
    "name", ["hf:", "hf:model", "hf:a/b/c", "hf:/b", "hf:a/", "hf:a b/c:m.gguf", "hf:../x/m"]
)
def test_malformed_names(name: str) -> None:
    with pytest.raises(UsageError, match="write hf:organisation/repository"):
        hub.resolve(name)
