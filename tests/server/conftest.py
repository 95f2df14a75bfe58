"""One server for all tests of what is answered: the demo model with a template that takes tools."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.server.process import ServerProcess, serving

HERMES = """\
{%- if tools %}<|system|>
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|endoftext|>
{% endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|endoftext|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""


@pytest.fixture(scope="session")
def tool_model(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a template in the style of Hermes and Qwen."""
    path = tmp_path_factory.mktemp("models") / "demo-tools.gguf"
    command = ["-m", "gguf.scripts.gguf_new_metadata", "--chat-template", HERMES, str(demo), str(path)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=120)
    return path


@pytest.fixture(scope="session")
def server(tool_model: Path) -> Iterator[ServerProcess]:
    options = ("--cache", "50%", "--parallel", 3, "--prefetch", "gate", "--pooling", "mean")
    with serving(tool_model, *options) as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client
