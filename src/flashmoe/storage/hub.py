"""From what a user names to a file: a path, `demo`, or `hf:organisation/repository[:file]`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from flashmoe.errors import FlashMoEError, ModelError, UsageError
from flashmoe.storage.checkpoint import is_checkpoint
from flashmoe.storage.gguf import GGUF, Part, join, parse_remote
from flashmoe.storage.remote import RemoteFile

DEMO = "demo"
HUB_PREFIX = "hf:"
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve(model: str | Path) -> Path:
    """The local path of a model, downloaded if need be (with progress, resumed where it broke off).

    Raises ModelError (no such file, no network, no such repository) and UsageError (several files to choose from).
    """
    name = str(model)
    if name == DEMO:
        return demo_model()
    if name.startswith(HUB_PREFIX):
        return _download(name)
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        raise ModelError(
            f"{path}: is a folder; name a GGUF file in it{': ' + found[0].name if found else ''}"
            + (", or run it with --engine transformers" if is_checkpoint(path) else "")
        )
    return path


def resolve_checkpoint(model: str | Path) -> Path:
    """The local folder of a safetensors checkpoint, a path or hf:organisation/repository; downloaded if need be.

    Raises as `resolve`.
    """
    name = str(model)
    if name == DEMO:
        raise UsageError("the demo model is a GGUF: run it without --engine transformers")
    if not name.startswith(HUB_PREFIX):
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    with _hub(name) as (repository, file):
        if file:
            raise UsageError(f"{name}: the transformers engine takes a whole repository: hf:{repository}")
        return Path(snapshot_download(repository, allow_patterns=_CHECKPOINT_FILES))


def demo_model() -> Path:
    """The bundled model."""
    return Path(str(files("flashmoe") / "data" / "demo.gguf"))


def default_policy(model: str | Path) -> str:
    """The eviction policy where none is named: the demo model's own trained one, else `lfu-aged` (docs/policies.md)."""
    trained = demo_model().with_name("demo.policy.safetensors")
    return f"flashmoe+:{trained}" if str(model) == DEMO and trained.is_file() else "lfu-aged"


def remote(model: str) -> GGUF | None:
    """The header of a model on the hub, read by range requests; None where `model` names no such one.

    Raises as `resolve`.
    """
    if not model.startswith(HUB_PREFIX):
        return None
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with _hub(model) as (repository, file):
        file = file or _only_model(repository)

        def parse(path: Path) -> Part:
            found = get_hf_file_metadata(hf_hub_url(repository, path.as_posix()))
            size = found.size or 0
            return parse_remote(path, size, RemoteFile(found.location, size))

        return join(Path(file), parse)


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub(name) as (repository, file):
        parts = _parts(file or _only_model(repository))
        return Path([hf_hub_download(repository, part) for part in parts][0])


@contextmanager
def _hub(name: str) -> Iterator[tuple[str, str]]:
    """Repository and file ("" if none) of a name; what goes wrong with the hub inside becomes a ModelError.

    Raises UsageError.
    """
    repository, _, file = name.removeprefix(HUB_PREFIX).partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(
            f"cannot read {name!r}: write hf:organisation/repository or hf:organisation/repository:file.gguf"
        )
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield repository, file
    except FlashMoEError:
        raise
    except RepositoryNotFoundError:
        raise ModelError(f"{name}: no such repository (or it is private: run `hf auth login`)") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name}: not downloaded yet, and the hub cannot be reached; check the network"
        ) from None
    except EntryNotFoundError:
        raise ModelError(f"{name}: the repository has no file {file!r}") from None
    except OSError as error:  # httpx and the hub's own errors derive from it or wrap it
        raise ModelError(
            f"{name}: download failed ({error}); check the network and the free disk space"
        ) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in (
            "httpx",
            "httpx2",
            "httpcore",
            "httpcore2",
            "huggingface_hub",
        ):
            raise
        raise ModelError(f"{name}: the hub cannot be reached ({error}); check the network") from None


def _only_model(repository: str) -> str:
    from huggingface_hub import HfApi

    return _choose_model(repository, HfApi().list_repo_files(repository))


def _choose_model(repository: str, names: list[str]) -> str:
    models = [n for n in names if n.endswith(".gguf") and not _is_later_part(n)]
    if len(models) == 1:
        return models[0]
    if not models:
        raise ModelError(f"hf:{repository}: has no GGUF file; look for a repository with GGUF in its name")
    shown = ", ".join(models[:8]) + (", ..." if len(models) > 8 else "")
    raise UsageError(f"hf:{repository}: has {len(models)} models, name one as hf:{repository}:FILE ({shown})")


def _is_later_part(name: str) -> bool:
    return "-of-" in name and "-00001-of-" not in name


def _parts(file: str) -> list[str]:
    """All files of a split model, from the name of its first."""
    head, separator, tail = file.partition("-00001-of-")
    count = tail.removesuffix(".gguf")
    if not separator or not count.isdigit():
        return [file]
    return [f"{head}-{i:05d}-of-{tail}" for i in range(1, int(count) + 1)]
