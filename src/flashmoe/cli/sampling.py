"""Options of sampling and of chat templates, by llama.cpp's names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe.cli.options import MOST_TOKENS
from flashmoe.common.text import argument, read_text_file
from flashmoe.errors import UsageError


def _option(flags: str, text: str, **more: Any) -> Any:
    return typer.Option(*flags.split(), help=text, rich_help_panel="Sampling", **more)


def _chat(flags: str, text: str, **more: Any) -> Any:
    return typer.Option(*flags.split(), help=text, rich_help_panel="Chat template and reasoning", **more)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. Left out, llama.cpp's defaults hold, or what the model's file recommends."""

    temp: Annotated[
        float | None, _option("--temp", "Sampling temperature; 0 for greedy sampling (default: 0.8).")
    ] = None
    top_k: Annotated[
        int | None,
        _option("--top-k", "Sample only from the k most likely tokens; 0 to disable (default: 40)."),
    ] = None
    top_p: Annotated[
        float | None,
        _option(
            "--top-p",
            "Sample only from the most likely tokens whose probabilities add up to p (default: 0.95).",
        ),
    ] = None
    min_p: Annotated[
        float | None,
        _option("--min-p", "Minimum probability relative to the most likely token (default: 0.05)."),
    ] = None
    seed: Annotated[int | None, _option("-s --seed", "Random seed (default: random).")] = None
    top_n_sigma: Annotated[
        float | None,
        _option(
            "--top-n-sigma", "Sample only from tokens within n standard deviations of the highest logit."
        ),
    ] = None
    typical: Annotated[float | None, _option("--typical", "Locally typical sampling, parameter p.")] = None
    xtc_probability: Annotated[
        float | None,
        _option("--xtc-probability", "Probability of XTC sampling (excluding the most likely tokens)."),
    ] = None
    xtc_threshold: Annotated[
        float | None,
        _option("--xtc-threshold", "Minimum probability of tokens that XTC sampling may exclude."),
    ] = None
    dynatemp_range: Annotated[
        float | None, _option("--dynatemp-range", "Range of the dynamic temperature.")
    ] = None
    dynatemp_exp: Annotated[
        float | None, _option("--dynatemp-exp", "Exponent of the dynamic temperature.")
    ] = None
    repeat_last_n: Annotated[
        int | None, _option("--repeat-last-n", "Number of last tokens to consider for penalties.")
    ] = None
    repeat_penalty: Annotated[
        float | None, _option("--repeat-penalty", "Penalty for repeated token sequences; 1 to disable.")
    ] = None
    presence_penalty: Annotated[
        float | None, _option("--presence-penalty", "Penalty for tokens that have appeared; 0 to disable.")
    ] = None
    frequency_penalty: Annotated[
        float | None,
        _option("--frequency-penalty", "Penalty for tokens by how often they have appeared; 0 to disable."),
    ] = None
    dry_multiplier: Annotated[
        float | None,
        _option(
            "--dry-multiplier", "Multiplier of DRY sampling (penalty for repeated sequences); 0 to disable."
        ),
    ] = None
    dry_base: Annotated[float | None, _option("--dry-base", "Base of the DRY penalty.")] = None
    dry_allowed_length: Annotated[
        int | None,
        _option("--dry-allowed-length", "Length of repeated sequences that DRY sampling does not penalize."),
    ] = None
    dry_penalty_last_n: Annotated[
        int | None,
        _option("--dry-penalty-last-n", "Number of last tokens that DRY sampling scans for repetitions."),
    ] = None
    dry_sequence_breaker: Annotated[
        list[str] | None,
        _option("--dry-sequence-breaker", "Sequence breaker of DRY sampling; can be given multiple times."),
    ] = None
    mirostat: Annotated[
        int | None, _option("--mirostat", "Mirostat sampling: 0 to disable, 1 or 2 for its version.")
    ] = None
    mirostat_ent: Annotated[
        float | None, _option("--mirostat-ent", "Target entropy of Mirostat sampling.")
    ] = None
    mirostat_lr: Annotated[float | None, _option("--mirostat-lr", "Learning rate of Mirostat sampling.")] = (
        None
    )
    adaptive_target: Annotated[
        float | None, _option("--adaptive-target", "Target probability of adaptive-p sampling.")
    ] = None
    adaptive_decay: Annotated[
        float | None, _option("--adaptive-decay", "Decay rate of adaptive-p sampling.")
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        _option(
            "-l --logit-bias",
            "Modify the likelihood of a token: TOKEN_ID+BIAS or TOKEN_ID-BIAS; can be given multiple times.",
        ),
    ] = None
    samplers: Annotated[
        str | None, _option("--samplers", "Samplers to use, in order, separated by semicolons.")
    ] = None
    ignore_eos: Annotated[
        bool, _option("--ignore-eos", "Ignore the end-of-text token and continue generating.")
    ] = False
    grammar: Annotated[
        str | None, _option("--grammar", "BNF-like grammar (GBNF) to constrain generation.")
    ] = None
    json_schema: Annotated[
        str | None, _option("-j --json-schema", "JSON schema to constrain generation.")
    ] = None

    def sampling(self) -> Any:
        """As the Python API has it."""
        from flashmoe.engines.base import SamplingParams

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given |= {
            name: argument(value, f"--{name}") for name, value in given.items() if isinstance(value, str)
        }
        renamed = {_NAMES.get(name, name): value for name, value in given.items()}
        lists = {
            "dry_sequence_breakers": tuple(self.dry_sequence_breaker or ()) or None,
            "logit_bias": tuple(_bias(text) for text in self.logit_bias or ()) or None,
            "ignore_eos": self.ignore_eos or None,
        }
        return SamplingParams(**renamed | lists)

    def defaults(self) -> dict[str, Any]:
        """For requests that say nothing else: attributes of llama.cpp's common_params_sampling. Raises UsageError."""
        given = {name: value for name, value in self.sampling().request().items() if name != "samplers"}
        if self.samplers is not None:
            given["samplers"] = self.samplers
        for name in ("top_n_sigma", "grammar", "json_schema"):
            if name in given:
                raise UsageError(
                    f"--{name.replace('_', '-')} cannot be a default of the server: clients send {name!r}"
                )
        return {_ATTRIBUTES.get(name, name): value for name, value in given.items()}


# option -> field of flashmoe.SamplingParams
_NAMES = {
    "dry_sequence_breaker": "dry_sequence_breakers",
    "temp": "temperature",
    "typical": "typical_p",
    "dynatemp_exp": "dynatemp_exponent",
    "mirostat_ent": "mirostat_tau",
    "mirostat_lr": "mirostat_eta",
}
# field of a request -> attribute of common_params_sampling
_ATTRIBUTES = {
    "temperature": "temp",
    "typical_p": "typ_p",
    "repeat_last_n": "penalty_last_n",
    "repeat_penalty": "penalty_repeat",
    "presence_penalty": "penalty_present",
    "frequency_penalty": "penalty_freq",
}


@dataclass(frozen=True)
class ChatOptions:
    """How messages become a prompt, and what becomes of thoughts."""

    chat_template: Annotated[
        str | None,
        _chat(
            "--chat-template",
            "Jinja chat template, or the name of one of llama.cpp's (default: the model's).",
        ),
    ] = None
    chat_template_file: Annotated[
        Path | None, _chat("--chat-template-file", "File with a Jinja chat template.")
    ] = None
    chat_template_kwargs: Annotated[
        str | None,
        _chat("--chat-template-kwargs", "Additional parameters for the chat template, as a JSON object."),
    ] = None
    reasoning_format: Annotated[
        str,
        _chat(
            "--reasoning-format",
            "Handling of reasoning: none (leave it in the text), auto, or deepseek (return it separately).",
        ),
    ] = "deepseek"
    reasoning_budget: Annotated[
        int,
        _chat(
            "--reasoning-budget",
            "Maximum tokens for reasoning; -1 for no limit, 0 for none.",
            min=-1,
            max=MOST_TOKENS,
        ),
    ] = -1
    mmproj: Annotated[Path | None, _chat("--mmproj", "Multimodal projector file (for images and audio).")] = (
        None
    )

    def server(self, **more: Any) -> Any:
        """As the Python API has it. Raises UsageError."""
        from flashmoe.engines.llamacpp.serving.options import ServerOptions

        template = argument(self.chat_template or "", "--chat-template")
        if self.chat_template_file is not None:
            try:
                template = read_text_file(self.chat_template_file, str(self.chat_template_file))
            except OSError as error:
                raise UsageError(
                    f"{self.chat_template_file}: the template cannot be read ({error})"
                ) from None
        return ServerOptions(
            chat_template=template,
            chat_template_kwargs=_kwargs(
                argument(self.chat_template_kwargs or "{}", "--chat-template-kwargs")
            ),
            reasoning_format=self.reasoning_format,
            reasoning_budget=self.reasoning_budget,
            mmproj=self.mmproj,
            **more,
        )


def _bias(text: str) -> tuple[int, float]:
    """A token and what is added to its logit. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,10})([+-]\d+(?:\.\d+)?)", text.strip())
    if not match:
        raise UsageError(
            f"cannot read --logit-bias {text!r}: write TOKEN_ID+BIAS or TOKEN_ID-BIAS, as in 15043-1"
        )
    return int(match[1]), float(match[2])


def _kwargs(text: str) -> dict[str, Any]:
    try:
        kwargs = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--chat-template-kwargs is no JSON ({error})") from None
    if not isinstance(kwargs, dict):
        raise UsageError("--chat-template-kwargs must be a JSON object")
    return kwargs
