"""Checks with llama.cpp itself (through xllamacpp): same tokens, same probabilities; and samples from the file."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import torch
from chat import render
from model import Model
from tokenizer import Tokenizer

TEXTS = [
    "Hello, world! It's 12:45 and we've 3 new   spaces.\n\n  def f(x):\n        return x**2  # caf\u00e9\n",
    "A lantern is a light in a transparent protective case.",
    "<|user|>\nWhat is a lantern?<|endoftext|>\n<|assistant|>\n",
]


class Llama:
    """llama.cpp's server inside this process."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 512
        params.verbosity = 0
        params.n_parallel = 1
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: str, **options) -> dict:
        """One completion; options as in the server's `/v1/completions`."""
        return _json(self.server.handle_completions({"prompt": prompt, **options}))["choices"][0]

    def chat(self, question: str, **options) -> str:
        """The answer to one question through the file's own chat template."""
        request = {"messages": [{"role": "user", "content": question}], **options}
        return _json(self.server.handle_chat_completions(request))["choices"][0]["message"]["content"]

    def tokenize(self, text: str) -> list[int]:
        """llama.cpp's tokens, special tokens parsed, without a leading end-of-text."""
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


def _json(answer) -> dict:
    return json.loads(answer) if isinstance(answer, (str, bytes)) else answer


def same_tokens(llama: Llama, tokenizer: Tokenizer, texts: list[str]) -> bool:
    """True when both tokenise every text equally."""
    return all(llama.tokenize(text) == tokenizer.encode(text) for text in texts)


@torch.no_grad()
def largest_gap(llama: Llama, model: Model, tokenizer: Tokenizer, texts: list[str], top: int = 20) -> float:
    """The largest difference of log-probabilities among llama.cpp's `top` candidates after each text."""
    gap, kind = 0.0, model.kind
    model.kind = torch.float32
    for text in texts:
        answer = llama.complete(text, max_tokens=1, logprobs=top, temperature=0.0, cache_prompt=False)
        ids = torch.tensor([[tokenizer.special("<|endoftext|>"), *tokenizer.encode(text)]])
        ours = model.logits(model.hidden(ids)[0][0, -1]).log_softmax(-1)
        for entry in answer["logprobs"]["content"][0]["top_logprobs"]:
            gap = max(gap, abs(ours[entry["id"]].item() - entry["logprob"]))
    model.kind = kind
    return gap


PROMPTS = [
    "The old man walked slowly to the",
    "def read_lines(path):\n",
    "Once upon a time there was a king who",
]
QUESTIONS = [
    "Hello!",
    "Who are you?",
    "What is a lantern?",
    "What is a dog?",
    'What does "generous" mean?',
    "What is the opposite of hot?",
    "What is a compiler?",
    "Write a Python function that adds two numbers.",
    "Write a Python function that checks whether a number is prime.",
    "Tell me a story about a king.",
    "What is 7 plus 5?",
    "What comes after Monday?",
]


def samples(llama: Llama) -> list[tuple[str, str]]:
    """Prompts with what the file's model writes after them: greedy for questions, mildly random for the rest."""
    pairs = [
        (prompt, llama.complete(prompt, max_tokens=110, temperature=0.7, top_p=0.9, seed=1)["text"])
        for prompt in PROMPTS
    ]
    for question in QUESTIONS:
        answer = llama.chat(question, max_tokens=160, temperature=0.0)
        pairs.append((question, answer.strip()))
    return pairs


def chat_texts() -> list[str]:
    """Texts in the chat format for the tokeniser check."""
    return [render([("What is a goat?", "A goat is an animal.")], "You are a helpful assistant.")]
