"""Options of sampling and of chat templates, by llama.cpp's names."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe.cli.options import MOST_TOKENS
from flashmoe.common.text import argument, read_text_file
from flashmoe.errors import UsageError

#: Options of sampling: flags, type and help. Left out, llama.cpp's defaults hold, or what the model's file recommends.
_SAMPLING = (
    ("--temp", float, "Sampling temperature; 0 for greedy sampling (default: 0.8)."),
    ("--top-k", int, "Sample only from the k most likely tokens; 0 to disable (default: 40)."),
    (
        "--top-p",
        float,
        "Sample only from the most likely tokens whose probabilities add up to p (default: 0.95).",
    ),
    ("--min-p", float, "Minimum probability relative to the most likely token (default: 0.05)."),
    ("-s --seed", int, "Random seed (default: random)."),
    ("--top-n-sigma", float, "Sample only from tokens within n standard deviations of the highest logit."),
    ("--typical", float, "Locally typical sampling, parameter p."),
    ("--xtc-probability", float, "Probability of XTC sampling (excluding the most likely tokens)."),
    ("--xtc-threshold", float, "Minimum probability of tokens that XTC sampling may exclude."),
    ("--dynatemp-range", float, "Range of the dynamic temperature."),
    ("--dynatemp-exp", float, "Exponent of the dynamic temperature."),
    ("--repeat-last-n", int, "Number of last tokens to consider for penalties."),
    ("--repeat-penalty", float, "Penalty for repeated token sequences; 1 to disable."),
    ("--presence-penalty", float, "Penalty for tokens that have appeared; 0 to disable."),
    ("--frequency-penalty", float, "Penalty for tokens by how often they have appeared; 0 to disable."),
    ("--dry-multiplier", float, "Multiplier of DRY sampling (penalty for repeated sequences); 0 to disable."),
    ("--dry-base", float, "Base of the DRY penalty."),
    ("--dry-allowed-length", int, "Length of repeated sequences that DRY sampling does not penalize."),
    ("--dry-penalty-last-n", int, "Number of last tokens that DRY sampling scans for repetitions."),
    ("--dry-sequence-breaker", list[str], "Sequence breaker of DRY sampling; can be given multiple times."),
    ("--mirostat", int, "Mirostat sampling: 0 to disable, 1 or 2 for its version."),
    ("--mirostat-ent", float, "Target entropy of Mirostat sampling."),
    ("--mirostat-lr", float, "Learning rate of Mirostat sampling."),
    ("--adaptive-target", float, "Target probability of adaptive-p sampling."),
    ("--adaptive-decay", float, "Decay rate of adaptive-p sampling."),
    (
        "-l --logit-bias",
        list[str],
        "Modify the likelihood of a token: TOKEN_ID+BIAS or TOKEN_ID-BIAS; can be given multiple times.",
    ),
    ("--samplers", str, "Samplers to use, in order, separated by semicolons."),
    ("--ignore-eos", bool, "Ignore the end-of-text token and continue generating."),
    ("--grammar", str, "BNF-like grammar (GBNF) to constrain generation."),
    ("-j --json-schema", str, "JSON schema to constrain generation."),
)


def _field(flags: str, kind: Any, text: str) -> tuple[str, Any, Any]:
    """An option as the field of a dataclass, named as its last flag."""
    option = typer.Option(*flags.split(), help=text, rich_help_panel="Sampling")
    name = flags.rpartition("--")[2].replace("-", "_")
    return (
        (name, Annotated[bool, option], False)
        if kind is bool
        else (name, Annotated[kind | None, option], None)
    )


def _chat(flags: str, text: str, **more: Any) -> Any:
    return typer.Option(flags, help=text, rich_help_panel="Chat template and reasoning", **more)


_Sampling: Any = make_dataclass("_Sampling", [_field(*row) for row in _SAMPLING], frozen=True)


class SamplingOptions(_Sampling):
    """How tokens are chosen."""

    def sampling(self) -> Any:
        """As the Python API has it."""
        from flashmoe.engines.base import SamplingParams

        given = asdict(self)
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
