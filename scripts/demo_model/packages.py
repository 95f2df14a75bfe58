"""Fetching the freely licensed texts: Debian packages, unpacked without installing them."""

from __future__ import annotations

import subprocess
from pathlib import Path

DEFAULT_CACHE = Path.home() / ".cache" / "flashmoe" / "demo-corpus"

CAMPAIGNS = ["did", "dm", "dw", "ei", "httt", "l", "low", "nr", "sof", "sota", "sotbe", "thot", "trow", "tsg"]
CAMPAIGNS += ["ttb", "utbs"]
WESNOTH = [f"wesnoth-1.16-{campaign}" for campaign in CAMPAIGNS]

PACKAGES = [
    "dict-gcide",
    "wordnet-base",
    "r-cran-janeaustenr",
    "anarchism",
    "dict-foldoc",
    "debian-handbook",
    "python3.11-doc",
    "sqlite3-doc",
    "sword-text-web",
    "endless-sky-data",
    *WESNOTH,
]

BULKY = ("png", "jpg", "ogg", "wav", "mo", "pdf", "epub", "svg")


def fetch(cache: Path = DEFAULT_CACHE) -> Path:
    """Download and unpack every package that is not there yet; return the folder that holds them."""
    debs, unpacked = cache / "debs", cache / "unpacked"
    debs.mkdir(parents=True, exist_ok=True)
    unpacked.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        target = unpacked / package
        if target.exists():
            continue
        if not list(debs.glob(f"{package}_*.deb")):
            done = subprocess.run(["apt-get", "download", package], cwd=debs, capture_output=True, text=True)
            if done.returncode:
                print(f"[packages] {package}: not available, left out ({done.stderr.strip()[:120]})")
                continue
        _unpack(sorted(debs.glob(f"{package}_*.deb"))[-1], target)
    return unpacked


def _unpack(deb: Path, target: Path) -> None:
    """Unpack the text parts of one package into `target`."""
    staging = target.with_suffix(".part")
    staging.mkdir(parents=True, exist_ok=True)
    excludes = [f"--exclude=*.{suffix}" for suffix in BULKY]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as source:
        subprocess.run(["tar", "-x", "-C", str(staging), *excludes], stdin=source.stdout, check=True)
    staging.rename(target)
