"""Reading the dictionaries: WordNet, GCIDE and FOLDOC, as entries and as running text."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass, field
from pathlib import Path

import markup

KINDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@dataclass
class Sense:
    """One meaning of a word in WordNet."""

    words: list[str]
    kind: str
    gloss: str
    examples: list[str]
    hypernym: str = ""
    proper: bool = False
    topic: int = 0
    offset: str = ""
    antonyms: dict[str, str] = field(default_factory=dict)


def wordnet(root: Path) -> list[Sense]:
    """Every WordNet sense with its words, gloss, examples, first hypernym and antonyms."""
    folder = root / "wordnet-base/usr/share/wordnet"
    senses: dict[tuple[str, str], Sense] = {}
    pointers: list[tuple[Sense, list[str], str]] = []
    for name in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{name}").read_text("utf-8", "replace").splitlines():
            if line.startswith("  "):
                continue
            data, _, gloss = line.partition(" | ")
            parts = data.split()
            count = int(parts[3], 16)
            raw = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in parts[4 : 4 + 2 * count : 2]]
            definition, examples = _split_gloss(gloss)
            sense = Sense(
                raw,
                parts[2],
                definition,
                examples,
                proper=raw[0][:1].isupper(),
                topic=int(parts[1]),
                offset=parts[0],
            )
            kind = "a" if parts[2] == "s" else parts[2]
            senses[kind, parts[0]] = sense
            pointers.append((sense, parts[4 + 2 * count :], kind))
    for sense, parts, _ in pointers:
        _link(sense, parts, senses)
    return list(senses.values())


def _split_gloss(gloss: str) -> tuple[str, list[str]]:
    """The definition and the quoted examples of a gloss."""
    examples = [text.strip() for text in re.findall(r'"([^"]{8,})"', gloss)]
    definition = re.split(r';\s*"|\s*"', gloss.strip(), maxsplit=1)[0].strip(" ;")
    return definition, examples


def _link(sense: Sense, parts: list[str], senses: dict[tuple[str, str], Sense]) -> None:
    """Fill in the hypernym and the antonyms that the pointers of a sense name."""
    for symbol, offset, kind, ends in zip(parts[1::4], parts[2::4], parts[3::4], parts[4::4], strict=False):
        other = senses.get((kind, offset))
        if other is None:
            continue
        if symbol in ("@", "@i") and not sense.hypernym:
            sense.hypernym = other.words[0]
        elif symbol == "!" and ends != "0000":
            source, target = int(ends[:2], 16) - 1, int(ends[2:], 16) - 1
            if source < len(sense.words) and target < len(other.words):
                sense.antonyms[sense.words[source]] = other.words[target]


def first_senses(root: Path, senses: list[Sense]) -> dict[tuple[str, str], Sense]:
    """The most usual sense of every usual (word, kind); WordNet's index lists senses by how common they are."""
    by_words: dict[tuple[str, str], list[Sense]] = {}
    for sense in senses:
        for word in sense.words:
            by_words.setdefault((word.lower(), "a" if sense.kind == "s" else sense.kind), []).append(sense)
    offsets, tagged = {}, {}
    folder = root / "wordnet-base/usr/share/wordnet"
    for name in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"index.{name}").read_text("utf-8", "replace").splitlines():
            if not line.startswith(" "):
                parts = line.split()
                key = parts[0].replace("_", " "), parts[1]
                offsets[key] = parts[6 + int(parts[3])]
                tagged[key] = int(parts[5 + int(parts[3])])
    usual = {}
    for (word, kind), found in by_words.items():
        # "run" is asked about as the verb: kinds that the tagged texts hardly use are left out.
        if 2 * tagged.get((word, kind), 0) >= max(tagged.get((word, other), 0) for other in "nvar"):
            chosen = (sense for sense in found if sense.offset == offsets.get((word, kind)))
            usual[word, kind] = next(chosen, found[0])
    return usual


def wordnet_text(senses: list[Sense]) -> list[str]:
    """WordNet as running text: word, kind, meaning, examples, words alike."""
    entries = []
    for sense in senses:
        entry = f"{sense.words[0]} ({KINDS[sense.kind]}): {sense.gloss}."
        if sense.examples:
            entry += "".join(f" {text[0].upper()}{text[1:].rstrip('.')}." for text in sense.examples[:3])
        if len(sense.words) > 1:
            entry += f" Also: {', '.join(sense.words[1:5])}."
        if markup.mostly_ascii(entry):
            entries.append(markup.plain(entry))
    return entries


def _unpacked(path: Path) -> str:
    """The text of a dictd file, which gzip can read."""
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def gcide_text(root: Path) -> list[str]:
    """GCIDE entries without pronunciation, etymology and markup; entries that stay messy are dropped."""
    raw = _unpacked(root / "dict-gcide/usr/share/dictd/gcide.dict.dz")
    entries = []
    for entry in re.split(r"\n(?=[A-Z][\w' -]* \\)", raw):
        head, _, body = entry.partition("\n")
        word = head.split(" \\")[0].strip()
        kind = re.search(r"\\,?\s*(?:\([^)]*\),?\s*)?((?:n|a|adv|v\. t|v\. i|prep|interj|conj|v)\.)", head)
        # A head may run over several lines: the body starts at the first indented sense or sentence.
        text = re.sub(r"\[[^\[\]]*\]", "", entry.partition("\n   ")[2])
        text = re.sub(r"\[[^\[\]]*\]", "", text)
        text = re.sub(r"\s*--\s*[A-Z][\w. ]*(?:\([^)]*\))?\.?", "", text)
        text = re.sub(r"[{}]", "", text)
        text = re.sub(r"\n\s*(?:Syn|Note):.*?(?=\n\s*\n|\Z)", "", text, flags=re.S)
        text = re.sub(r"\((?:[A-Z][\w.&]*\.? ?)+\)", "", text)
        text = " ".join(text.split())
        if not kind or len(text) < 40 or re.search(r"[\[\]\\~^`=<>*|\ufffd]", text) or not text.isascii():
            continue
        if body and text[:1].isalnum():
            entries.append(f"{word} ({kind.group(1)}) {text}")
    return entries


def foldoc(root: Path) -> list[tuple[str, list[str]]]:
    """FOLDOC entries: (term, paragraphs), cross-reference braces and dates removed."""
    raw = _unpacked(root / "dict-foldoc/usr/share/dictd/foldoc.dict.dz")
    entries = []
    for entry in re.split(r"\n(?=\S)", raw):
        term, _, body = entry.partition("\n")
        body = re.sub(r"\(\d{4}-\d\d-\d\d\)", "", body)
        body = re.sub(r"\[.*?\]|\(https?:[^)]*\)|\bHome \(.*?\)", "", body, flags=re.S)
        body = re.sub(r"<[^>]*>|[{}]", "", body)
        paragraphs = [markup.plain(text) for text in markup.unwrap(body)]
        paragraphs = [text for text in paragraphs if len(text) > 40 and "@" not in text and text[0].isalnum()]
        if paragraphs and len(term) < 40 and markup.mostly_ascii("".join(paragraphs)):
            entries.append((term.strip(), paragraphs))
    return entries


def foldoc_text(entries: list[tuple[str, list[str]]]) -> list[str]:
    """FOLDOC as running text, one document per entry."""
    return [f"{term}\n\n" + "\n\n".join(paragraphs) for term, paragraphs in entries]
