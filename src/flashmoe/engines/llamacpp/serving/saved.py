"""Conversations that outlive the process: what the server's slots hold, kept on the drive for the next start.

A folder has one file for each conversation, in llama.cpp's own format (tokens, state, checkpoints), and a list of them
that is written last: what the list does not name does not count. A file is handed to the library only if its size and
its checksum are those in the list, and the list is of the same model, library and kind of KV cache. The folder is the
user's alone: texts can be read from it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from flashmoe.common.files import write_atomically
from flashmoe.errors import FlashMoEError, warn

if TYPE_CHECKING:
    from flashmoe.engines.llamacpp.serving.server import InnerServer

FORMAT = "flashmoe-conversations"
VERSION = 1
_LIST = "conversations.json"
_PIECE = 1 << 24


class SavedConversations:
    """The folder of one model: `restore` when its server has started, `save` before that ends.

    What fails is a warning.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], most_bytes: int) -> None:
        """identity: what a state depends on, JSON. most_bytes: of all files together."""
        self.folder, self._most = folder, most_bytes
        self._identity = json.loads(json.dumps(identity))

    def prepare(self) -> None:
        """Have the folder. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def restore(self, server: InnerServer) -> int:
        """Give conversations back to the server's slots; how many."""
        restored = 0
        for slot, (name, size, checksum) in enumerate(self._listed()[: server.parallel]):
            try:
                if (self.folder / name).stat().st_size != size or _checksum(self.folder / name) != checksum:
                    raise FlashMoEError("it is damaged")
                server.ask("POST", f"/slots/{slot}?action=restore", {"filename": name})
                restored += 1
            except OSError as error:
                self._warn(f"{name}: a conversation cannot be read ({error.strerror})")
            except FlashMoEError as error:
                self._warn(f"{name}: a conversation is not given back ({error})")
        return restored

    def save(self, server: InnerServer) -> int:
        """Keep what the slots hold, the longest first as far as there is room; how many conversations."""
        kept, used = [], 0
        try:
            for slot in self._slots(server):
                name = f"{secrets.token_hex(8)}.state"
                path = self.folder / name
                answer = server.ask("POST", f"/slots/{slot}?action=save", {"filename": name})
                path.chmod(0o600)
                size = path.stat().st_size
                if not answer["n_saved"] or used + size > self._most:
                    path.unlink()
                    continue
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                kept.append((name, size, _checksum(path)))
                used += size
            listed = {
                "format": FORMAT,
                "version": VERSION,
                "identity": self._identity,
                "conversations": kept,
            }
            write_atomically(self.folder / _LIST, json.dumps(listed, indent=1).encode(), private=True)
        except OSError as error:
            self._warn(f"conversations could not be saved ({error.strerror}): the next start reads them anew")
            kept = self._listed()
        except FlashMoEError as error:
            self._warn(f"conversations could not be saved ({error}): the next start reads them anew")
            kept = self._listed()
        self._remove_others({name for name, *_ in kept})
        return len(kept)

    def _slots(self, server: InnerServer) -> Iterator[int]:
        """Slots that hold a conversation, the longest first."""
        slots = server.ask("GET", "/slots")
        tokens = {slot["id"]: slot.get("n_prompt_tokens", 1) for slot in slots}
        yield from sorted(tokens, key=lambda slot: -tokens[slot])

    def _listed(self) -> list[tuple[str, int, str]]:
        """The files of the list: name, bytes, checksum; none, with a warning, where it is damaged or another's."""
        path = self.folder / _LIST
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (OSError, ValueError):
            self._warn("the list of saved conversations is damaged: starting without them")
            return []
        try:
            if (listed["format"], listed["version"], listed["identity"]) != (FORMAT, VERSION, self._identity):
                return []
            files = [
                (str(name), int(size), str(checksum)) for name, size, checksum in listed["conversations"]
            ]
        except (KeyError, TypeError, ValueError):
            self._warn("the list of saved conversations is damaged: starting without them")
            return []
        return [entry for entry in files if entry[0] == Path(entry[0]).name]

    def _remove_others(self, names: set[str]) -> None:
        for path in self.folder.glob("*.state"):
            if path.name not in names:
                with suppress(OSError):
                    path.unlink()

    def _warn(self, message: str) -> None:
        warn(f"{self.folder}: {message}", 4)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
