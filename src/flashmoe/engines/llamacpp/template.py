"""Chat templates: the Jinja text in the model's metadata, rendered as Hugging Face's libraries render it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flashmoe.errors import ModelError


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def render_chat(
    template: str,
    messages: Sequence[dict[str, Any]],
    *,
    bos: str,
    eos: str,
    tools: Sequence[dict[str, Any]] | None = None,
    answer: bool = True,
) -> str:
    """The prompt for `messages`, with `answer` ending where the assistant's answer begins; without the leading `bos`.

    The tokenizer adds the beginning-of-sequence token itself. The template comes with the model, so it runs in a
    sandbox. Raises ModelError when it cannot be rendered.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda f: datetime.now().strftime(f)}
    try:
        text = environment.from_string(template).render(
            messages=messages, tools=tools, add_generation_prompt=answer, bos_token=bos, eos_token=eos
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ModelError(f"the model's chat template does not accept these messages ({error})") from None
    return text.removeprefix(bos) if bos else text
