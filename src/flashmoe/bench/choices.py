"""Questions with several answers to choose from, as MMLU has them, for `flashmoe quality --choices`."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe.common.text import read_text_file
from flashmoe.errors import UsageError
from flashmoe.runtime.generation import split
from flashmoe.runtime.model import Model

_LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """A question, its answers, and which of them is right."""

    text: str
    choices: Sequence[str]
    answer: int

    @property
    def prompt(self) -> str:
        """The question as a text that a letter completes."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, self.choices, strict=False)]
        return "\n".join([self.text.strip(), *lines, "Answer:"])


def read_choices(path: Path) -> list[Question]:
    """Questions of a file, one JSON object a line: {"question": ..., "choices": [...], "answer": 0 or "A"}.

    Raises UsageError with the line that is wrong.
    """
    try:
        lines = read_text_file(path, f"{path}: the questions").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise UsageError(f"{path}: the questions cannot be read ({error.strerror})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            choices, answer = [str(choice) for choice in row["choices"]], row["answer"]
            right = _LETTERS.index(answer.upper()) if isinstance(answer, str) else int(answer)
            question = Question(str(row["question"]), choices, right)
        except (ValueError, KeyError, TypeError, RecursionError):
            question = Question("", (), 0)
        if not 2 <= len(question.choices) <= len(_LETTERS) or not 0 <= question.answer < len(
            question.choices
        ):
            raise UsageError(
                f'{path}, line {number}: give {{"question": "...", "choices": ["...", "..."], "answer": 0}}'
            )
        found.append(question)
    if not found:
        raise UsageError(f"{path} has no questions: give one a line, as JSON")
    return found


def answer(model: Model, question: Question, n_prompt: int) -> int:
    """Which answer's letter the model finds likeliest after the question, decoded from token `n_prompt` on.

    Raises UsageError where the question does not fit into the context.
    """
    engine, decoder = model.engine, model.decoder
    whole = [engine.tokenize(f"{question.prompt} {_LETTERS[i]}") for i in range(len(question.choices))]
    tokens = whole[0][:-1]
    if len(tokens) > engine.n_ctx:
        raise UsageError(
            f"a question has {len(tokens)} tokens, the context {engine.n_ctx}: leave it out, or raise -c"
        )
    decoder.rewind()
    for chunk in split(tokens[:n_prompt], engine.n_ubatch):
        decoder.evaluate(chunk, decode=False)
    for token in tokens[n_prompt:]:
        decoder.evaluate([token], decode=True)
    return int(np.argmax(decoder.logits()[[each[-1] for each in whole]]))
