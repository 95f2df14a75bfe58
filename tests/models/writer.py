"""Writes the tiny models of :mod:`.architectures` as GGUF files, whole or split in parts.

Every tensor draws from its own generator, seeded by the model's seed and the tensor's name, so a file depends
on nothing else and is the same on every machine.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QType
from gguf import GGUFValueType as VType
from numpy.typing import NDArray

from .architectures import ARCHITECTURES, DENSE
from .families import Family
from .spec import BYTE_VOCAB, SPECIAL_TOKENS, U64, Spec, vocabulary

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Formats that the gguf package cannot quantise to are filled with random bits. These are their float16 fields
# (offset in the block, relative size), set by hand so that the values are finite and centred.
HALF_FIELDS: dict[QType, tuple[tuple[int, float], ...]] = {
    QType.Q2_K: ((80, 1.0), (82, 1.5)),
    QType.Q3_K: ((108, 1.0),),
    QType.Q4_K: ((0, 1.0), (2, 7.5)),
    QType.Q5_K: ((0, 1.0), (2, 15.5)),
    QType.Q6_K: ((208, 1.0),),
    QType.IQ4_NL: ((0, 1.0),),
    QType.IQ4_XS: ((0, 1.0),),
}

NORMS = re.compile(r"norm.*\.weight$")
ROUTERS = re.compile(r"(ffn_gate_inp|attn_v_gate)\.weight$")
PLAIN = re.compile(r"ffn_gate_inp|conv|_ape|ssm_(a|d)$|\.(bias|scale)$")  # always F32


def make(name: str, path: Path, *, seed: int = 0, router: str = "F32") -> Path:
    """Write the model called `name` in :data:`ARCHITECTURES` to `path` and return `path`; router: the routers' type."""
    return write(ARCHITECTURES[name], name, Path(path), seed, router)


def dense(path: Path, *, seed: int = 0) -> Path:
    """Write a model without experts (llama) to `path` and return `path`."""
    return write(DENSE, "dense", Path(path), seed)


def split(path: Path, parts: int, *, metadata_only_first: bool = False) -> list[Path]:
    """Split a GGUF file as llama.cpp's gguf-split does and return the parts, the first one first.

    The parts lie beside `path` (name-00001-of-0000N.gguf); `path` itself stays. The first part carries the
    model's metadata, and with `metadata_only_first` no tensor (gguf-split's `--no-tensor-first-split`).
    """
    path = Path(path)
    reader = gguf.GGUFReader(path)
    tensors = list(reader.tensors)
    full = parts - 1 if metadata_only_first else parts
    if not 1 <= full <= len(tensors):
        raise ValueError(f"cannot split {len(tensors)} tensors into {parts} parts")
    groups = [list(g) for g in np.array_split(np.arange(len(tensors)), full)]
    if metadata_only_first:
        groups.insert(0, [])
    written = []
    for number, group in enumerate(groups):
        part = path.with_name(f"{path.stem}-{number + 1:05d}-of-{parts:05d}.gguf")
        writer = gguf.GGUFWriter(part, "")
        writer.kv_data[0].clear()
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF."):
                    sub = field.types[-1] if field.types[0] == VType.ARRAY else None
                    writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
            writer.data_alignment = reader.alignment
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(tensors))
        for index in group:
            writer.add_tensor(tensors[index].name, tensors[index].data, raw_dtype=tensors[index].tensor_type)
        _finish(writer)
        written.append(part)
    return written


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(spec: Spec | Family, name: str, path: Path, seed: int = 0, router: str = "F32") -> Path:
    """Write a model to `path` and return `path`."""
    writer = gguf.GGUFWriter(path, spec.arch)
    writer.add_name(f"tiny-{name}")
    if spec.alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
        writer.add_custom_alignment(spec.alignment)
    write_metadata(writer, spec.arch, spec.metadata(), spec.chat, getattr(spec, "tokenizer", {}))
    for tensor, shape, kind in spec.tensors():
        qtype = qtype_of(tensor, shape, kind, router)
        writer.add_tensor(tensor, tensor_data(tensor, shape, qtype, spec, seed), raw_dtype=qtype)
    _finish(writer)
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata value with the GGUF type that llama.cpp's converter gives to its Python type."""
    types = {bool: VType.BOOL, int: VType.UINT32, float: VType.FLOAT32, str: VType.STRING, U64: VType.UINT64}
    if isinstance(value, list):
        sub = VType.INT32 if type(value[0]) is int else types[type(value[0])]
        writer.add_key_value(key, value, VType.ARRAY, sub_type=sub)
    else:
        writer.add_key_value(key, value, types[type(value)])


def qtype_of(name: str, shape: tuple[int, ...], kind: str, router: str = "F32") -> QType:
    """The format that a tensor gets whose format is to be `kind`, or `router` if it is a router."""
    if name.endswith("ffn_gate_inp.weight"):
        return QType[router]
    if name.endswith("tid2eid.weight"):
        return QType.I32
    if len(shape) == 1 or PLAIN.search(name) or NORMS.search(name):
        return QType.F32
    short = shape[0] % gguf.GGML_QUANT_SIZES[QType[kind]][0]  # rows too short for this format's blocks
    return QType.F16 if short else QType[kind]


def write_metadata(
    writer: gguf.GGUFWriter,
    arch: str,
    keys: dict[str, Any],
    chat: bool = False,
    tokenizer: dict[str, Any] | None = None,
) -> None:
    """Write an architecture's metadata, and the tokenizer with what else of it a model has."""
    for key, value in keys.items():
        _add(writer, f"{arch}.{key}", value)
    _add_tokenizer(writer, chat)
    for key, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.ggml.{key}", value)


def _add_tokenizer(writer: gguf.GGUFWriter, chat: bool) -> None:
    tokens, merges = vocabulary()
    eos = tokens.index(SPECIAL_TOKENS[0])
    control = int(gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in SPECIAL_TOKENS else int(gguf.TokenType.NORMAL) for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(eos)
    writer.add_eos_token_id(eos)
    writer.add_eot_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    if chat:
        writer.add_chat_template(CHAT_TEMPLATE)


def tensor_data(
    name: str, shape: tuple[int, ...], qtype: QType, spec: Spec | Family, seed: int
) -> NDArray[Any]:
    """Random contents of one tensor, `shape` in ggml's order, scaled so that activations stay near one."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    dims = shape[::-1]
    if qtype == QType.I32:  # a table of expert ids per token, distinct within a row
        return rng.random((dims[0], spec.dims()["E"])).argsort(axis=1)[:, : dims[1]].astype(np.int32)
    if qtype in HALF_FIELDS or qtype == QType.NVFP4:
        return _random_blocks(rng, dims, qtype, 1 / np.sqrt(shape[0]))
    values: NDArray[Any] = rng.standard_normal(dims, dtype=np.float32)
    if name.endswith("scale") or name.endswith("_scale.weight"):
        values = 0.5 + rng.random(dims, dtype=np.float32)
    elif NORMS.search(name):
        values = 1 + 0.1 * values
    elif name.endswith("ssm_a"):
        values = -np.abs(values) - 0.1
    elif "rope_f" in name:  # frequencies, factors
        values = np.ones(dims, np.float32)
    elif len(shape) == 1:
        values *= 0.1
    elif ROUTERS.search(name):
        values *= spec.router_scale / np.sqrt(shape[0])
    elif not name.endswith("token_embd.weight"):
        values *= 1 / np.sqrt(shape[0])
    if name == "output.weight":  # greedy decoding never meets a control token
        values[BYTE_VOCAB : BYTE_VOCAB + len(SPECIAL_TOKENS)] = 0
    if qtype == QType.F32:
        return values
    if qtype == QType.F16:
        return values.astype(np.float16)
    return gguf.quants.quantize(values, qtype)


def _random_blocks(
    rng: np.random.Generator, dims: tuple[int, ...], qtype: QType, sigma: float
) -> NDArray[np.uint8]:
    """Random blocks of a format, their scales chosen for values of the standard deviation `sigma`."""
    per_block, size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = rng.integers(0, 256, (int(np.prod(dims)) // per_block, size), dtype=np.uint8)
    shape = (*dims[:-1], dims[-1] // per_block * size)
    if qtype == QType.NVFP4:  # its scales are bytes: keep clear of the encodings of NaN
        blocks[:, :4] = rng.integers(0x20, 0x30, (len(blocks), 4), dtype=np.uint8)
        return blocks.reshape(shape)
    spread = rng.uniform(0.7, 1.3, len(blocks))

    def scale(unit: float) -> None:
        for offset, relative in HALF_FIELDS[qtype]:
            halves = (unit * relative * spread).astype(np.float16)
            blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)

    scale(1.0)
    scale(sigma / float(gguf.quants.dequantize(blocks, qtype).std()))
    return blocks.reshape(shape)
