"""The source archive of the installed wheel: found through pip's own settings, checked, and its ggml unpacked.

pip itself would spend minutes on it: it prepares a build of the whole package before it hands the file over. So the
index is asked as pip asks it (Simple repository API, PEP 503 and PEP 691).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import ssl
import subprocess
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from flashmoe.common.children import module_command
from flashmoe.errors import FlashMoEError

_PYPI = "https://pypi.org/simple"
_PACKAGE = "xllamacpp"
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
_TIMEOUT = 60
_PIECE = 1 << 20
_MOST = 1 << 30  # bytes unpacked
#: Raised where an archive cannot be read to its end.
DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError)
_GGML = "/thirdparty/llama.cpp/ggml/"

Progress = Callable[[str, int, int], None]


def archive_name(version: str) -> str:
    """What the source archive of a version of the wheel is called."""
    return f"{_PACKAGE}-{version}.tar.gz"


def fetch(version: str, folder: Path, progress: Progress) -> Path:
    """Download the source archive of a version of the wheel into `folder`, checked by the index's checksum.

    progress: called with "fetch", the bytes done and their number. Raises FlashMoEError, which says what to do offline.
    """
    settings = _pip_settings()
    reasons = []
    for index in _indexes(settings):
        try:
            address, checksum = _find(index, archive_name(version), settings)
        except (OSError, ValueError, LookupError) as error:
            reasons.append(f"{_shown(index)}: {error}")
            continue
        target = folder / archive_name(version)
        try:
            _download(address, target, checksum, settings, progress)
        except OSError as error:
            reasons.append(f"{_shown(address)}: {error}")
            continue
        return target
    raise FlashMoEError(
        f"{archive_name(version)}: cannot be downloaded ({'; '.join(reasons)}). Without a network, fetch that file "
        "from PyPI on another machine and give it to `flashmoe engine build FILE`"
    )


def unpack(archive: Path, version: str, folder: Path) -> Path:
    """Unpack ggml from the wheel's source archive into `folder`; where it is. Raises FlashMoEError."""
    root = f"{_PACKAGE}-{version}"
    try:
        with tarfile.open(archive) as tar:
            members, size = [], 0
            for member in tar:
                size += member.size
                inside = member.name.startswith(root + _GGML) and ".." not in Path(member.name).parts
                if inside and (member.isfile() or member.isdir()):
                    members.append(member)
                if size > _MOST:
                    raise FlashMoEError(f"{archive}: too large for a source archive")
            read_to_end(tar)
            for member in members:
                member.mode = 0o755 if member.isdir() else 0o644
                tar.extract(member, folder, set_attrs=False)
    except DAMAGED as error:
        raise FlashMoEError(
            f"{archive}: cannot be unpacked ({error}); fetch {archive_name(version)} again"
        ) from None
    ggml = folder / (root + _GGML)
    if not (ggml / "CMakeLists.txt").is_file():
        raise FlashMoEError(
            f"{archive}: has no ggml of xllamacpp {version}, the wheel that is installed; fetch {archive_name(version)}"
        )
    (ggml / "ggml.pc.in").touch()  # CMake asks for it, and the archive lacks it
    return ggml


def read_to_end(tar: tarfile.TarFile) -> None:
    """Read what follows the last member: only there is an archive compared with its checksum. Raises DAMAGED."""
    while tar.fileobj and tar.fileobj.read(_PIECE):
        pass


def _pip_settings() -> dict[str, str]:
    """pip's settings by name, without the command that they are for; none where there is no pip."""
    try:
        command = module_command("pip", "config", "list")
        text = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT).stdout
    except (OSError, subprocess.SubprocessError):
        text = ""
    found = dict(re.findall(r"^(?::env:|global|install|download)\.([\w-]+)='(.*)'$", text, re.M))
    for name in ("index-url", "extra-index-url", "cert"):
        if value := os.environ.get("PIP_" + name.upper().replace("-", "_")):
            found[name] = value
    return found


def _indexes(settings: dict[str, str]) -> list[str]:
    """The package indexes, the one that pip asks first in front."""
    more = settings.get("extra-index-url", "").replace("\\n", " ").split()
    return [settings.get("index-url", _PYPI), *more]


def _shown(address: str) -> str:
    """An address without a password."""
    return re.sub(r"//[^/@]*@", "//", address)


def _open(address: str, settings: dict[str, str]) -> Any:
    """Open an address, with the certificates and the password that the settings have. Raises OSError."""
    parts = urllib.parse.urlsplit(address)
    headers = {"Accept": _ACCEPT}
    if parts.username:
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
        address = _shown(address)
    context = ssl.create_default_context(cafile=settings["cert"]) if settings.get("cert") else None
    return urllib.request.urlopen(
        urllib.request.Request(address, headers=headers), timeout=_TIMEOUT, context=context
    )


def _find(index: str, name: str, settings: dict[str, str]) -> tuple[str, str]:
    """Address and SHA-256 of a file in an index. Raises LookupError, ValueError and OSError."""
    page = f"{index.rstrip('/')}/{_PACKAGE}/"
    with _open(page + "index.html" if page.startswith("file:") else page, settings) as answer:
        body, base, kind = answer.read(), answer.url, answer.headers.get_content_type()
    for file, address, checksum in _of_json(body) if kind.endswith("json") else _of_html(body):
        if file == name:
            if not checksum:
                raise LookupError(f"has no checksum of {name}")
            return _with_password_of(index, urllib.parse.urljoin(base, address)), checksum
    raise LookupError(f"has no {name}")


def _with_password_of(index: str, address: str) -> str:
    """An address on an index's own host, with what the index is asked with."""
    user, at, host = urllib.parse.urlsplit(index).netloc.rpartition("@")
    parts = urllib.parse.urlsplit(address)
    return parts._replace(netloc=f"{user}{at}{host}").geturl() if parts.netloc == host else address


def _of_json(body: bytes) -> Iterator[tuple[str, str, str]]:
    for file in json.loads(body)["files"]:
        yield file["filename"], file["url"], file["hashes"].get("sha256", "")


def _of_html(body: bytes) -> Iterator[tuple[str, str, str]]:
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            links.extend(value for name, value in attributes if tag == "a" and name == "href" and value)

    Links().feed(body.decode(errors="replace"))
    for link in links:
        address, _, fragment = link.partition("#")
        name = urllib.parse.unquote(urllib.parse.urlsplit(address).path.rpartition("/")[2])
        yield name, address, fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""


def _download(
    address: str, target: Path, checksum: str, settings: dict[str, str], progress: Progress
) -> None:
    """Raises OSError, and FlashMoEError where the file is another than the index says."""
    digest = hashlib.sha256()
    with _open(address, settings) as answer, open(target, "wb") as file:
        total, done = int(answer.headers.get("Content-Length") or 0), 0
        while piece := answer.read(_PIECE):
            file.write(piece)
            digest.update(piece)
            done += len(piece)
            progress("fetch", done, max(total, done))
    if digest.hexdigest() != checksum:
        raise FlashMoEError(
            f"{_shown(address)}: is not the file that the index names (another checksum); try again"
        )
