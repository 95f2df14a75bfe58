"""How people name a model on the hub: in words of our own, of other programs, or as an address that was pasted."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from flashmoe.errors import ModelError, UsageError

PREFIX = "hf:"
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_MARKS = "<>\"'`"  # around what was copied from a text
_PAGES = ("tree", "blob", "resolve", "raw", "blame", "commit", "commits")  # of a repository at a revision
# in the place of an organisation
_NO_MODELS = ("datasets", "spaces", "collections", "papers", "docs", "blog")
_REPOSITORY = re.compile(r"[\w.-]*\w[\w.-]*/[\w.-]*\w[\w.-]*")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
#: What lies beside models: of images and sound, and what was measured to make them.
_BESIDE = re.compile(r"(^|[-_.])mmproj([-_.]|$)|^imatrix|imatrix\.gguf$", re.IGNORECASE)
_MOST_LISTED = 8


@dataclass(frozen=True)
class HubName:
    """A repository, and what of it. wish: a file in it, or the name of a quantisation; "" for its only model."""

    repository: str
    wish: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        return PREFIX + self.repository + (f":{self.wish}" if self.wish else "")


def parse(name: str) -> HubName | None:
    """What a name says: hf:ORG/REPO[:FILE or QUANT], hf.co/..., an address of the hub's site. None for other names.

    Raises UsageError for a name that begins as one and goes on otherwise.
    """
    name = name.strip().strip(_MARKS)
    ours = name.lower().startswith(PREFIX)
    address = name[len(PREFIX) :].lstrip("/") if ours else name
    if "://" in address:
        return _parse_address(address)
    host, _, rest = address.partition("/")
    if host.lower() in _HOSTS:
        if any(page in _PAGES for page in rest.split("/")[2:3]):
            return _parse_address(f"https://{address}")
        return _parse_words(name, rest)
    return _parse_words(name, address) if ours else None


def _parse_words(name: str, words: str) -> HubName:
    """ORG/REPO, with :WISH (llama.cpp, ollama), @WISH (LM Studio), /FILE.gguf, or @REVISION/FILE (the hub's own)."""
    repository, _, wish = words.strip().partition(":")
    if not wish and "@" in repository:
        repository, _, wish = repository.partition("@")
        revision, _, file = wish.partition("/")
        if file:
            return HubName(_checked(repository, name), file, None if revision == "main" else revision)
    parts = repository.rstrip("/").split("/")
    if len(parts) > 2 and words.lower().endswith(".gguf") and not wish:
        parts, wish = parts[:2], "/".join(parts[2:])
    return HubName(_checked("/".join(parts), name), "" if wish == "latest" else wish)


def _parse_address(address: str) -> HubName:
    """https://HOST/ORG/REPO, with /tree, /blob or /resolve, a revision and a path."""
    try:
        parsed, own = urlsplit(address), urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    except ValueError:  # half of an IPv6 address
        raise UsageError(f"{address}: is no address") from None
    if parsed.scheme not in ("http", "https") or parsed.netloc.lower() not in (*_HOSTS, own):
        raise UsageError(f"{address}: is no address of the hub: download the model and name its file")
    parts = [unquote(part) for part in parsed.path.split("/") if part]
    if parts[:1] and parts[0] in _NO_MODELS:
        raise UsageError(f"{address}: is no model: give the address of its repository")
    repository, _, wish = "/".join(parts[:2]).partition(":")
    repository = _checked(repository.removesuffix(".git"), address)
    if parts[2:3] and parts[2] not in _PAGES:  # of discussions, settings: the repository is meant
        parts = parts[:2]
    if len(parts) < 4:  # the site shows a file's header so
        return HubName(repository, wish or "".join(parse_qs(parsed.query).get("show_file_info", [])[:1]))
    if parts[3] == "refs":  # of a pull request, or of a conversion
        parts[3:6] = ["/".join(parts[3:6])]
    return HubName(repository, "/".join(parts[4:]), None if parts[3] == "main" else parts[3])


def _checked(repository: str, name: str) -> str:
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(
            f"cannot read {name!r}: write hf:organisation/repository or hf:organisation/repository:file.gguf"
        )
    return repository


def looks_like_one(name: str) -> bool:
    """Whether a name that is no file may be meant so: ORG/REPO[:QUANT], as llama.cpp's -hf has it."""
    return bool(_REPOSITORY.fullmatch(name.partition(":")[0])) and not name.lower().endswith(".gguf")


def parts_of(file: str) -> list[str]:
    """All files of a split model, from the name of one of them; of another, its own name."""
    found = _PART.fullmatch(file)
    if not found:
        return [file]
    ending = file[len(found[1]) + len("-00001") :]
    return [f"{found[1]}-{i:05d}{ending}" for i in range(1, int(found[3]) + 1)] or [file]


def choose(name: HubName, names: list[str]) -> str:
    """The file of `names` that is meant, of a split model the first. Raises ModelError and UsageError, which list what
    there is."""
    files = [n for n in names if n.lower().endswith(".gguf") and n in (parts_of(n)[0], name.wish)]
    if name.wish in files:
        return name.wish
    models = [n for n in files if not _BESIDE.search(n.rpartition("/")[2])] or files
    if not models:
        raise ModelError(
            f"{name}: has no GGUF file; look for a repository with GGUF in its name"
            + (", or run this one with --engine transformers" if "config.json" in names else "")
        )
    wanted = _of_quantisation(models, name.wish) if name.wish else models
    if len(wanted) == 1:
        return wanted[0]
    listed = wanted or models
    shown = ", ".join(listed[:_MOST_LISTED]) + (", ..." if len(listed) > _MOST_LISTED else "")
    repository = PREFIX + name.repository
    if not wanted:
        raise ModelError(f"{repository}: the repository has no file {name.wish!r}, name one of {shown}")
    of_them = f" of {name.wish!r}" if name.wish else ""
    raise UsageError(
        f"{repository}: has {len(listed)} models{of_them}, name one as {repository}:FILE ({shown})"
    )


def _of_quantisation(models: list[str], wish: str) -> list[str]:
    """Those whose names end in it, or whose folder has its name; where several do, those without more before it."""
    tag = re.escape(wish.lower().removesuffix(".gguf").strip("/"))
    split = r"(-\d{5}-of-\d{5})?"
    for pattern in (
        rf"(.*/)?(.*(?<!ud)[-_.])?{tag}{split}\.gguf",  # UD-Q4_K_M is another than Q4_K_M
        rf"(.*/)?(.*[-_.])?{tag}{split}\.gguf",
        rf"(.*/)?{tag}/[^/]*\.gguf",
    ):
        found = [n for n in models if re.fullmatch(pattern, n.lower())]
        if found:
            return found
    return []
