"""Files of requests, and what is the same in two outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.serving.reference import plain


def request(name: str, **more: Any) -> dict[str, Any]:
    """A line of an input. Alone in the server it gives the same bits each time."""
    body = {"messages": [{"role": "user", "content": f"What is {name}?"}], "max_tokens": 6}
    body |= {"temperature": 0, "cache_prompt": False, **more}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, lines: list[Any]) -> Path:
    """Text as it is, everything else as JSON."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(path: Path) -> list[Any]:
    """An output without random names and times."""
    return [plain({**line, "id": "", "name": line["id"]}) for line in read(path)]
