"""From what a user names to a file: a path, `demo`, or a model on the hub (see hub_names)."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from flashmoe.common.files import expanded
from flashmoe.errors import FlashMoEError, ModelError, UsageError
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.checkpoint import is_checkpoint
from flashmoe.storage.gguf import GGUF, Part, join, parse_remote, read_gguf
from flashmoe.storage.hub_names import PREFIX, HubName, choose, looks_like_one, parse, parts_of
from flashmoe.storage.remote import RemoteFile

Found = TypeVar("Found")

DEMO = "demo"
_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_TIMEOUT = 30.0  # seconds, for a list of files
_NOT_WRITTEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_OF_THE_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub")


def resolve(model: str | Path) -> Path:
    """The local path of a model, downloaded if need be (with progress, resumed where it broke off).

    Raises ModelError (no such file, no network, no such repository) and UsageError (several files to choose from).
    """
    if str(model) == DEMO:
        return demo_model()
    if (name := _on_hub(model)) is not None:
        return _download(name)
    path = expanded(model)
    if os.path.isdir(path):
        found = sorted(path.glob("*.gguf"))
        raise ModelError(
            f"{path}: is a folder; name a GGUF file in it{': ' + found[0].name if found else ''}"
            + (", or run it with --engine transformers" if is_checkpoint(path) else "")
        )
    return path


def read_catalog(model: str | Path) -> ExpertCatalog:
    """The experts of a GGUF model that `resolve` finds. Raises as that, and ModelError for a file without experts."""
    return ExpertCatalog.from_gguf(read_gguf(resolve(model)))


def resolve_checkpoint(model: str | Path) -> Path:
    """The local folder of a safetensors checkpoint, a path or a repository on the hub; downloaded if need be.

    Raises as `resolve`.
    """
    if str(model) == DEMO:
        raise UsageError("the demo model is a GGUF: run it without --engine transformers")
    name = _on_hub(model)
    if name is None:
        return expanded(model)
    from huggingface_hub import snapshot_download

    with _hub(name):
        if name.wish:
            raise UsageError(
                f"{name}: the transformers engine takes a whole repository: hf:{name.repository}"
            )
        return Path(
            snapshot_download(name.repository, revision=name.revision, allow_patterns=_CHECKPOINT_FILES)
        )


def demo_model() -> Path:
    """The bundled model."""
    return Path(str(files("flashmoe") / "data" / "demo.gguf"))


def default_policy(model: str | Path) -> str:
    """The eviction policy where none is named: the demo model's own trained one, else `adaptive` (docs/policies.md)."""
    trained = demo_model().with_name("demo.policy.safetensors")
    return f"flashmoe+:{trained}" if str(model) == DEMO and trained.is_file() else "adaptive"


def header(model: str) -> tuple[GGUF, bool]:
    """What a model says of itself, and whether it is on a drive here. Of one on the hub the header alone is read, by
    range requests; where there is no network, its files of an earlier download.

    Raises as `resolve`.
    """
    name = _on_hub(model)
    if name is None:
        return read_gguf(resolve(model)), True
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    def part(path: Path) -> Part:
        found = get_hf_file_metadata(hf_hub_url(name.repository, path.as_posix(), revision=name.revision))
        size = found.size or 0
        return parse_remote(path, size, RemoteFile(found.location, size))

    def read(file: str) -> tuple[GGUF, bool]:
        try:
            return join(Path(file), part), False
        except Exception as error:
            there = _cached_folder(name)
            if there is None or not _unreachable(error):
                raise
            if not all((there / piece).exists() for piece in parts_of(file)):
                raise
            return read_gguf(there / file), True

    with _hub(name):
        return _with_file(name, read)


def _on_hub(model: str | Path) -> HubName | None:
    """None for a file or folder of this machine, or one that was meant so."""
    text = str(model)
    if isinstance(model, Path) or (not text.startswith(PREFIX) and os.path.exists(expanded(text))):
        return None
    name = parse(text)
    if name is None and looks_like_one(text) and not os.path.isdir(Path(text).parent):
        return parse(PREFIX + text)
    return name


def _download(name: HubName) -> Path:
    from huggingface_hub import hf_hub_download

    def download(file: str) -> Path:
        got = [hf_hub_download(name.repository, piece, revision=name.revision) for piece in parts_of(file)]
        return Path(got[0])

    with _hub(name):
        return _with_file(name, download)


def _with_file(name: HubName, use: Callable[[str], Found]) -> Found:
    """What `use` makes of the (first) file that is meant: the one that is named, or the one of its quantisation."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    missing: Exception | None = None
    if name.wish.lower().endswith(".gguf"):
        try:
            return use(parts_of(name.wish)[0])
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            missing = error
    try:
        names = _list(name)
    except Exception:
        if missing:
            raise missing from None
        raise
    return use(choose(name, names))


def _list(name: HubName) -> list[str]:
    """The files of a repository; where there is no network, those of an earlier download."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name.repository, revision=name.revision, timeout=_TIMEOUT)
        return [file.rfilename for file in info.siblings or ()]
    except Exception as error:
        there = _cached_folder(name)
        if there is None or not _unreachable(error):
            raise
        return [path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()]


def _cached_folder(name: HubName) -> Path | None:
    """Where the files of an earlier download lie, by the layout of the hub's cache."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE) / f"models--{name.repository.replace('/', '--')}"
    revision = name.revision or "main"
    try:
        commit = (place / "refs" / revision).read_text().strip()
    except OSError:
        commit = revision
    folder = place / "snapshots" / commit
    return folder if folder.is_dir() else None


def _unreachable(error: Exception) -> bool:
    """Whether it was the network, and not what the hub has answered."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, OSError) or _of_the_network(error)


def _of_the_network(error: Exception) -> bool:
    """Whether it is an error of the libraries that download, or one of Python's that they have raised: of a proxy's
    address that is none, say, or of a package that one needs."""
    places = [type(error).__module__]
    if error.__traceback__:
        places.append(list(traceback.walk_tb(error.__traceback__))[-1][0].f_globals.get("__name__", ""))
    return any(place.split(".")[0] in _OF_THE_NETWORK for place in places)


@contextmanager
def _hub(name: HubName) -> Iterator[None]:
    """What goes wrong with the hub inside becomes a ModelError, or a UsageError for a name that cannot be one."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except FlashMoEError:
        raise
    except HFValidationError as error:
        raise UsageError(f"cannot read {str(name)!r}: {error}") from None
    except GatedRepoError:
        raise ModelError(
            f"{name}: a gated repository: accept its terms on its page, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"{name}: no such repository (or it is private: run `hf auth login`)") from None
    except RevisionNotFoundError:
        raise ModelError(f"{name}: the repository has no revision {name.revision!r}") from None
    except OfflineModeIsEnabled:
        raise ModelError(f"{name}: not downloaded yet, and this is offline: unset HF_HUB_OFFLINE") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name}: not downloaded yet, and the hub cannot be reached; check the network"
        ) from None
    except EntryNotFoundError:
        raise ModelError(f"{name}: the repository has no file {name.wish!r}") from None
    except OSError as error:  # httpx and the hub's own errors derive from it or wrap it
        if error.errno in _NOT_WRITTEN:
            where = f" in {error.filename}" if error.filename else ""
            raise ModelError(
                f"{name}: cannot be written{where} ({error.strerror}): name a folder that can be in HF_HOME"
            ) from None
        raise ModelError(
            f"{name}: download failed ({error}); check the network and the free disk space"
        ) from None
    except Exception as error:
        if not _of_the_network(error):
            raise
        raise ModelError(f"{name}: the hub cannot be reached ({error}); check the network") from None
