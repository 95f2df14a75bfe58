"""Loads the dense weights: everything but the experts, which are never given any memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashmoe.engines.transformers.catalog import TORCH_DTYPES, Layout
from flashmoe.engines.transformers.library import quiet
from flashmoe.engines.transformers.skeleton import Skeleton, hollow
from flashmoe.errors import ModelError
from flashmoe.storage.checkpoint import Checkpoint
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.gguf import TensorInfo

_STEP = 8 << 20  # bytes read at once
_CACHE_LINE = 64
_OTHERS = {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_dense(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    layout: Layout,
    files: Sequence[DirectFile],
    progress: Callable[[int], None],
) -> Any:
    """The library's own model with its dense weights, the experts' weights missing; in evaluation mode.

    files: those of the checkpoint, in order. progress: called with the bytes read. Raises ModelError where a tensor is
    missing or does not fit, and ReadError.
    """
    from transformers import GenerationConfig

    by_path = dict(zip(checkpoint.files, files, strict=True))
    state: dict[str, torch.Tensor] = {}
    done = 0
    for name in layout.dense:
        info = checkpoint.tensors[name]
        state[name] = _read(info, by_path[info.file])
        done += info.nbytes
        progress(done)
    model_class = type(skeleton.model)
    with quiet():
        model, report = hollow(model_class).from_pretrained(  # type: ignore[attr-defined]
            None,
            config=skeleton.config,
            state_dict=state,
            dtype=layout.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    wrong = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if wrong or report.get("error_msgs"):
        what = f"{len(wrong)} tensors are missing or have another shape, {sorted(wrong)[0]!r} among them"
        raise ModelError(
            f"{checkpoint.folder}: {what if wrong else report['error_msgs'][0]}; download the model again"
        )
    model.__class__ = model_class
    model.config.name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    return model


def _read(info: TensorInfo, file: DirectFile) -> torch.Tensor:
    """A tensor, as far from a cache line's beginning as in the file: the library maps files, and some kernels round
    differently for data that is aligned differently."""
    dtype = TORCH_DTYPES.get(info.type) or _OTHERS.get(info.type)
    if dtype is None:
        raise ModelError(f"{info.file}: tensor {info.name!r} is of type {info.type}, which is not supported")
    memory = torch.empty(info.nbytes + 2 * _CACHE_LINE, dtype=torch.uint8)
    shift = (info.offset - memory.data_ptr()) % _CACHE_LINE
    if info.offset % dtype.itemsize:
        shift = -memory.data_ptr() % _CACHE_LINE
    data = memory[shift : shift + info.nbytes]
    for start in range(0, info.nbytes, _STEP):
        size = min(_STEP, info.nbytes - start)
        file.read_exact(data.data_ptr() + start, info.offset + start, size)
    return data.view(dtype).view(info.shape)
