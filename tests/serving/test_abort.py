"""Requests that end llama.cpp's server: its grammars abort the process where a text that they begin with has an end
token. Each is asked of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.test_equal import GREEDY, QWEN, TOOLS, USER

ASK = """
import json, sys
import flashmoe
from flashmoe.engines.llamacpp.library import find_library, open_library
from flashmoe.engines.llamacpp.serving.options import ServerOptions
from tests.serving.reference import Client
path, template, body = sys.argv[1:]
options = ServerOptions(chat_template=template)
with flashmoe.load(path, cache="50%", threads=1, server=options, library=open_library(find_library())) as model:
    inner = model.server()
    print(Client(inner.socket, inner.key).post("/v1/chat/completions", json.loads(body)).status)
"""
BEGUN = {
    "messages": [USER, {"role": "assistant", "content": "I<|endoftext|>"}],
    "tools": TOOLS,
    "max_tokens": 4,
}
THOUGHT = {
    "messages": [USER, {"role": "assistant", "content": "", "reasoning_content": "I<|endoftext|>"}],
    "tools": TOOLS,
    "max_tokens": 4,
    "add_generation_prompt": False,
    "continue_final_message": True,
}


@pytest.mark.parametrize("request_", [BEGUN, THOUGHT], ids=["begun answer", "begun thoughts"])
def test_end_token_before_a_grammar(demo: Path, request_: dict[str, Any]) -> None:
    body = {**request_, "tool_choice": "required", **GREEDY}
    command = [sys.executable, "-c", ASK, str(demo), QWEN, json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout.split()[-1]) in (200, 400)
