"""The running texts: stories, manuals and Python sources, as lists of cleaned documents."""

from __future__ import annotations

import ast
import bz2
import lzma
import re
import struct
import sysconfig
import zlib
from pathlib import Path

import markup


def austen(root: Path) -> list[str]:
    """Jane Austen's novels, cut at their chapters (they sit in an R data base as character vectors)."""
    data = (root / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    documents = []
    at = 0
    while at + 5 < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        # The length counts the stored block: the compressed stream may carry a type byte in front.
        step, block = _r_block(data, at, length)
        at += step
        lines = _r_strings(block)
        if len(lines) > 1000:
            documents += _chapters(lines)
    return documents


def _r_block(data: bytes, at: int, length: int) -> tuple[int, bytes]:
    """One block of an R lazy-load data base: (bytes to step over, the unpacked block)."""
    body = data[at + 4 :]
    if body[:1] == b"2":
        unpacker = bz2.BZ2Decompressor()
        block = unpacker.decompress(body[1:])
        return 5 + len(body) - 1 - len(unpacker.unused_data), block
    if body[:1] == b"Z":
        raw = lzma.LZMADecompressor(
            format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME}]
        )
        block = raw.decompress(body[1:], max_length=length)
        return 5 + len(body) - 1 - len(raw.unused_data), block
    unpacker = zlib.decompressobj()
    block = unpacker.decompress(body)
    return 4 + len(body) - len(unpacker.unused_data), block


def _r_strings(block: bytes) -> list[str]:
    """The strings of the longest character vector in an XDR-serialised R object."""
    best: list[str] = []
    at = block.find(b"\x00\x00\x00\x10")
    while at >= 0:
        count = struct.unpack(">I", block[at + 4 : at + 8])[0] if at + 8 <= len(block) else 0
        if len(best) < count < 100_000:
            strings = []
            cursor = at + 8
            for _ in range(count):
                flags, size = struct.unpack(">Ii", block[cursor : cursor + 8])
                if flags & 0xFF != 9:
                    break
                size = max(size, 0)
                strings.append(block[cursor + 8 : cursor + 8 + size].decode("utf-8", "replace"))
                cursor += 8 + size
            if len(strings) == count:
                best = strings
        at = block.find(b"\x00\x00\x00\x10", at + 1)
    return best


def _chapters(lines: list[str]) -> list[str]:
    """A novel's lines as one document per chapter."""
    text = "\n".join(lines)
    parts = re.split(r"(?im)^\s*(?:chapter|volume)\s+[ivxlc\d]+\.?\s*$", text)
    cleaned = ["\n\n".join(markup.unwrap(part)).replace("_", "").replace("--", " - ") for part in parts]
    return [markup.plain(part) for part in cleaned if len(part) > 1000]


def world_english_bible(root: Path) -> list[str]:
    """The World English Bible (public domain), one document per book, out of SWORD's compressed modules."""
    documents = []
    folder = root / "sword-text-web/usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for testament in ("ot", "nt"):
        index = (folder / f"{testament}.bzs").read_bytes()
        body = (folder / f"{testament}.bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", index):
            if not size:
                continue
            text = zlib.decompress(body[start : start + size]).decode("utf-8", "replace")
            text = re.sub(r"(?s)<note.*?</note>|<title.*?</title>", "", text)
            text = re.sub(r"</?(?:p|lg|div|chapter)\b[^>]*>|<milestone[^>]*>|</?l\b[^>]*>", "\n", text)
            text = re.sub(r"<[^>]+>|\x00", " ", text)
            blocks = [" ".join(block.split()) for block in text.split("\n")]
            blocks = [
                re.sub(r"\s+([,.;:!?])", r"\1", markup.plain(block)) for block in blocks if len(block) > 1
            ]
            documents += _pack(blocks, 6000)
    return documents


def _pack(paragraphs: list[str], size: int) -> list[str]:
    """Paragraphs gathered into documents of about `size` characters."""
    documents, current = [], ""
    for paragraph in paragraphs:
        current += paragraph + "\n\n"
        if len(current) > size:
            documents.append(current.strip())
            current = ""
    return documents + ([current.strip()] if len(current) > 300 else [])


def wesnoth(root: Path) -> list[str]:
    """Stories and dialogue of The Battle for Wesnoth's campaigns, one document per scenario."""
    documents = []
    pattern = re.compile(r'(speaker|message|story|name|note)\s*=\s*(?:_\s*)?("(?:[^"]|"")*"|[\w .]+)')
    for path in sorted(root.glob("wesnoth-*/**/scenarios/*.cfg")):
        paragraphs, speaker = [], ""
        for key, value in pattern.findall(path.read_text("utf-8", "replace")):
            text = " ".join(value.strip('"').replace('""', '"').split())
            text = markup.plain(re.sub(r"<[^>]+>|\^", "", text))
            if key == "speaker":
                speaker = text if text not in ("narrator", "unit", "second_unit") else ""
            elif key in ("message", "story") and len(text) > 12 and "$" not in text and "{" not in text:
                said = key == "message" and speaker
                paragraphs.append(f'{speaker} said: "{text}"' if said else text)
        document = "\n\n".join(dict.fromkeys(paragraphs))
        if len(document) > 400:
            documents.append(document)
    return documents


def endless_sky(root: Path) -> list[str]:
    """Conversations and descriptions of Endless Sky, one document per top-level entry."""
    documents = []
    for path in sorted((root / "endless-sky-data/usr/share/games/endless-sky/data").glob("**/*.txt")):
        for entry in re.split(r"\n(?=\S)", path.read_text("utf-8", "replace")):
            lines = []
            for line in entry.splitlines():
                match = re.search(r"`([^`]{30,})`", line) or re.search(r'description\s+"([^"]{30,})"', line)
                if match and line.strip()[:1] in "`d":
                    lines.append(
                        re.sub(r"<(\w+)>", lambda m: _FILLER.get(m.group(1), "Earth"), match.group(1).strip())
                    )
            document = "\n\n".join(dict.fromkeys(lines))
            if len(document) > 250:
                documents.append(markup.plain(document))
    return documents


_FILLER = {
    "first": "Alex",
    "last": "Morgan",
    "ship": "Swallow",
    "origin": "Earth",
    "destination": "New Boston",
    "planet": "New Boston",
    "system": "Sol",
    "payment": "10,000 credits",
    "day": "Monday",
    "date": "tomorrow",
    "commodity": "food",
    "tons": "ten tons",
    "cargo": "the cargo",
    "bunks": "five",
    "npc": "Sparrow",
    "passengers": "the passengers",
    "stopovers": "the stops",
    "model": "Sparrow",
    "fare": "3,000 credits",
}


def anarchist_faq(root: Path) -> list[str]:
    """The Anarchist FAQ: long, well-formed essay prose."""
    return _html_documents(
        sorted((root / "anarchism/usr/share/doc/anarchism/html").glob("sec*.html")), size=8000
    )


def debian_handbook(root: Path) -> list[str]:
    """The Debian Administrator's Handbook, English edition."""
    pages = sorted((root / "debian-handbook/usr/share/doc/debian-handbook/html/en-US").glob("*.html"))
    return _html_documents(pages, size=8000)


def sqlite_manual(root: Path) -> list[str]:
    """SQLite's documentation (public domain)."""
    pages = [
        page for page in sorted((root / "sqlite3-doc").glob("**/*.html")) if "releaselog" not in str(page)
    ]
    pages = [page for page in pages if "/c3ref/" not in str(page) and "changes" not in page.name]
    return _html_documents(pages, size=8000)


def python_manual(root: Path) -> list[str]:
    """Python's documentation, prose and examples, one document per page or long section."""
    documents = []
    for part in ("tutorial", "howto", "faq", "library", "reference", "using"):
        for page in sorted((root / f"python3.11-doc/usr/share/doc/python3.11/html/{part}").glob("*.html")):
            html = page.read_text("utf-8", "replace")
            html = html[html.find('<div class="body"') : html.find('<div class="sphinxsidebar"')]
            paragraphs = markup.html_paragraphs(html, ("headerlink", "contents", "toctree-wrapper"))
            paragraphs = [text for text in paragraphs if len(text) > 20 and markup.mostly_ascii(text)]
            documents += _pack(paragraphs, 6000)
    return documents


def _html_documents(pages: list[Path], size: int) -> list[str]:
    """Prose paragraphs of HTML pages, gathered into documents that never span two pages."""
    documents = []
    for page in pages:
        text = markup.prose(markup.html_paragraphs(page.read_text("utf-8", "replace")))
        documents += _pack(text.split("\n\n"), size)
    return [document for document in documents if markup.mostly_ascii(document)]


def python_sources(_: Path) -> list[str]:
    """Modules of the running interpreter's standard library, without tests, data tables and licence headers."""
    root = Path(sysconfig.get_path("stdlib"))
    unwanted = re.compile(
        r"/(test|tests|idlelib|lib2to3|turtledemo|site-packages|dist-packages|encodings|pydoc_data|"
        r"ensurepip|msilib|config-[^/]*|__pycache__)(/|$)"
    )
    documents = []
    for path in sorted(root.glob("**/*.py")):
        if unwanted.search(str(path.relative_to(root.parent))) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text("utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        text = re.sub(r"\A(?:#[^\n]*\n|\s*\n)+", "", text)
        if len(text) < 300 or not markup.mostly_ascii(text) or max(map(len, text.splitlines())) > 200:
            continue
        documents += _code_pieces(text)
    return documents


def _code_pieces(text: str, size: int = 6000) -> list[str]:
    """A module cut at top-level definitions into documents of about `size` characters."""
    pieces, current = [], ""
    for part in re.split(r"\n(?=(?:class|def|async def)\b|@)", text):
        if current and len(current) + len(part) > size:
            pieces.append(current)
            current = ""
        current = f"{current}\n{part}" if current else part
    pieces.append(current)
    return [piece.strip() + "\n" for piece in pieces if len(piece) > 200]


SOURCES = {
    "austen": austen,
    "bible": world_english_bible,
    "wesnoth": wesnoth,
    "endless-sky": endless_sky,
    "anarchism": anarchist_faq,
    "handbook": debian_handbook,
    "sqlite": sqlite_manual,
    "python-manual": python_manual,
    "python-code": python_sources,
}
