"""A model without weights: which class it is, which modules hold experts, which of their tensors are streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flashmoe.engines.transformers.library import open_transformers
from flashmoe.errors import ModelError
from flashmoe.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device: all modules and shapes, no memory."""

    model: Any  # a PreTrainedModel
    config: Any  # as read from the checkpoint
    top_k: int
    experts: tuple[str, ...]  # names of the experts modules, in the order of the layers

    def streamed(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an experts module that are streamed, by their names in the module."""
        return dict(streamed(self.model.get_submodule(name)))


def streamed(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's weights with one matrix per expert; biases and norms stay resident."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and len(parameter) == module.num_experts:
            yield name, parameter


def is_experts(module: nn.Module) -> bool:
    """Whether a module goes through the library's experts interface (`use_experts_implementation`)."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "num_experts")


def read_skeleton(checkpoint: Checkpoint) -> Skeleton:
    """The model that a checkpoint is for.

    Raises ModelError: an unknown architecture, a dense one, a quantised checkpoint.
    """
    transformers = open_transformers()
    folder = checkpoint.folder
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{folder}: transformers cannot read its config.json ({reason})") from None
    kind = config.model_type
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"{folder}: a quantised checkpoint; the transformers engine runs BF16, F16 and F32 (for quantised "
            "weights use a GGUF)"
        )
    try:
        model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ModelError(
            f"{folder}: transformers has no causal language model of the type {kind!r}"
        ) from None
    with torch.device("meta"):
        model = model_class(config)
    experts = tuple(name for name, module in model.named_modules() if is_experts(module))
    if not experts:
        raise ModelError(
            f"{folder}: a dense model ({kind}), or one whose experts do not go through transformers' experts "
            "interface: there is nothing to stream; run it with transformers"
        )
    text = config.get_text_config()
    top_k = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None)
    if not isinstance(top_k, int) or top_k < 1:
        raise ModelError(f"{folder}: config.json does not say how many experts a token takes")
    return Skeleton(model, config, top_k, experts)


def hollow(model_class: type) -> type:
    """A class like `model_class` whose experts modules are made without the weights that are streamed."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)  # type: ignore[misc]
        for module in self.modules():
            if is_experts(module):
                for name, _ in list(streamed(module)):
                    delattr(module, name)
                module._is_hf_initialized = True  # its weights come from the pool

    # the library looks mappings up by the class's name and module
    return type(
        model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__}
    )
