"""The commands of `flashmoe chat`: lines that begin with a slash."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashmoe.common.files import expanded, write_atomically
from flashmoe.errors import FlashMoEError, UsageError
from flashmoe.runtime.conversation import Conversation

if TYPE_CHECKING:
    from flashmoe.runtime.model import Model


class Commands:
    """The slash commands of a conversation. `quit` is set by /quit."""

    def __init__(self, model: Model, conversation: Conversation) -> None:
        self._model, self._conversation = model, conversation
        self.quit = False
        self._table: dict[str, tuple[str, str, Callable[[str], str]]] = {
            "help": ("", "this list", self._help),
            "stats": ("", "speed, hit rate, reads and memory so far", self._stats),
            "system": ("[TEXT]", "set the system prompt, or without a text remove it", self._system),
            "reset": ("", "begin a new conversation", self._reset),
            "save": ("FILE", "write the conversation to a JSON file", self._save),
            "load": ("FILE", "go on with a saved conversation", self._load),
            "quit": ("", "leave (or Ctrl-D)", self._quit),
        }

    @property
    def names(self) -> list[str]:
        """The commands as they are typed."""
        return [f"/{name}" for name in self._table]

    def run(self, line: str) -> str | None:
        """Do what `line` says and return the answer; None where it is not a command. Raises FlashMoEError."""
        match = re.fullmatch(r"/(\w*)(?:\s+(.*?))?\s*", line, re.DOTALL)
        if not match:
            return None
        name, argument = match[1], match[2] or ""
        if name not in self._table:
            raise UsageError(f"no command /{name}: /help lists them")
        operand, _, function = self._table[name]
        if argument and not operand:
            raise UsageError(f"/{name} takes nothing more")
        if not argument and operand.isalpha():
            raise UsageError(f"/{name} needs a {operand.lower()}: /{name} {operand}")
        return function(argument)

    def _help(self, _: str) -> str:
        rows = [(f"/{name} {operand}", text) for name, (operand, text, _) in self._table.items()]
        return "\n".join(f"{command:15}{text}" for command, text in rows)

    def _stats(self, _: str) -> str:
        turn = self._conversation.turn
        return "\n".join(
            [
                *self._model.report().lines(),
                f"context {self._conversation.used} of {self._model.engine.n_ctx} tokens; "
                f"the last turn read {turn.read} and found {turn.reused} there",
            ]
        )

    def _system(self, text: str) -> str:
        self._conversation.system = text
        return "the next answer follows this" if text else "no system prompt"

    def _reset(self, _: str) -> str:
        self._conversation.reset()
        return "a new conversation"

    def _save(self, name: str) -> str:
        path, talk = expanded(name), self._conversation
        system = [{"role": "system", "content": talk.system}] if talk.system else []
        saved = {"model": self._model.catalog.label, "messages": [*system, *talk.messages]}
        try:
            write_atomically(path, json.dumps(saved, ensure_ascii=False, indent=1).encode(errors="replace"))
        except OSError as error:
            raise FlashMoEError(f"{path}: cannot be written ({error.strerror})") from None
        return f"{path}: {len(talk.messages)} messages"

    def _load(self, name: str) -> str:
        path = expanded(name)
        try:
            messages = [_message(m) for m in json.loads(path.read_bytes())["messages"]]
        except OSError as error:
            raise FlashMoEError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FlashMoEError(f"{path}: is not a saved conversation") from None
        system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
        if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise FlashMoEError(f"{path}: has no messages of user and assistant in turns")
        self._conversation.system = system
        self._conversation.reset(messages)
        return f"{path}: {len(messages)} messages; the next answer reads them"

    def _quit(self, _: str) -> str:
        self.quit = True
        return ""


def _message(saved: Any) -> dict[str, str]:
    """A message of a file. Raises KeyError or TypeError."""
    message = {"role": saved["role"], "content": saved["content"]}
    if not all(isinstance(part, str) for part in message.values()):
        raise TypeError
    return message
