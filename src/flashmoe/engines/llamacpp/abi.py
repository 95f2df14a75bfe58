"""The layouts of libllama's structs, for the builds that FlashMoE knows.

Public structs (llama.h, ggml.h) and one private interface (ggml-backend-impl.h: buffer types) are declared here as
ctypes structures. They change between builds, and a wrong one crashes: so builds are looked up by version, checked
against what the library's own functions return (`self_check`), and tested once (`tested.py`).
"""

from __future__ import annotations

import ctypes as C
from dataclasses import dataclass
from typing import Any

from flashmoe.errors import LibraryError

ptr, i32, u32, f32, flag = C.c_void_p, C.c_int32, C.c_uint32, C.c_float, C.c_bool

LOAD_MODE_NONE, LOAD_MODE_MMAP = 0, 1
LAZY_MODE_OFF = 0


class ModelParams(C.Structure):
    """llama_model_params"""

    _fields_ = [
        ("devices", ptr),
        ("tensor_buft_overrides", ptr),
        ("n_gpu_layers", i32),
        ("split_mode", i32),
        ("load_mode", i32),
        ("lazy_mode", i32),
        ("main_gpu", i32),
        ("tensor_split", ptr),
        ("progress_callback", ptr),
        ("progress_callback_user_data", ptr),
        ("kv_overrides", ptr),
        ("vocab_only", flag),
        ("check_tensors", flag),
        ("use_extra_bufts", flag),
        ("no_host", flag),
        ("no_alloc", flag),
        ("load_mtp", flag),
    ]


# llama_context_params: the part up to type_v, and the part from abort_callback on
_CONTEXT_HEAD: list[tuple[str, Any]] = [
    ("n_ctx", u32),
    ("n_batch", u32),
    ("n_ubatch", u32),
    ("n_seq_max", u32),
    ("n_rs_seq", u32),
    ("n_outputs_max", u32),
    ("n_outputs_max_per_seq", u32),
    ("n_threads", i32),
    ("n_threads_batch", i32),
    ("ctx_type", i32),
    ("rope_scaling_type", i32),
    ("pooling_type", i32),
    ("attention_type", i32),
    ("flash_attn_type", i32),
    ("rope_freq_base", f32),
    ("rope_freq_scale", f32),
    ("yarn_ext_factor", f32),
    ("yarn_attn_factor", f32),
    ("yarn_beta_fast", f32),
    ("yarn_beta_slow", f32),
    ("yarn_orig_ctx", u32),
    ("defrag_thold", f32),
    ("cb_eval", ptr),
    ("cb_eval_user_data", ptr),
    ("type_k", i32),
    ("type_v", i32),
]
_CONTEXT_TAIL: list[tuple[str, Any]] = [
    ("abort_callback", ptr),
    ("abort_callback_data", ptr),
    ("embeddings", flag),
    ("offload_kqv", flag),
    ("no_perf", flag),
    ("op_offload", flag),
    ("swa_full", flag),
    ("kv_unified", flag),
    ("samplers", ptr),
    ("n_samplers", C.c_size_t),
    ("ctx_other", ptr),
]


class Batch(C.Structure):
    """llama_batch"""

    _fields_ = [
        ("n_tokens", i32),
        ("token", C.POINTER(i32)),
        ("embd", ptr),
        ("pos", C.POINTER(i32)),
        ("n_seq_id", C.POINTER(i32)),
        ("seq_id", C.POINTER(C.POINTER(i32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


class SamplerChainParams(C.Structure):
    """llama_sampler_chain_params"""

    _fields_ = [("no_perf", flag)]


class Tensor(C.Structure):
    """ggml_tensor"""

    _fields_ = [
        ("type", i32),
        ("buffer", ptr),
        ("ne", C.c_int64 * 4),
        ("nb", C.c_size_t * 4),
        ("op", i32),
        ("op_params", i32 * 16),
        ("flags", i32),
        ("src", ptr * 10),
        ("view_src", ptr),
        ("view_offs", C.c_size_t),
        ("data", ptr),
        ("name", C.c_char * 64),
        ("extra", ptr),
        ("padding", C.c_char * 8),
    ]


class BufferOverride(C.Structure):
    """llama_model_tensor_buft_override"""

    _fields_ = [("pattern", C.c_char_p), ("buffer_type", ptr)]


class BufferInterface(C.Structure):
    """ggml_backend_buffer_i"""

    _fields_ = [
        ("free_buffer", ptr),
        ("get_base", ptr),
        ("init_tensor", ptr),
        ("memset_tensor", ptr),
        ("set_tensor", ptr),
        ("get_tensor", ptr),
        ("set_tensor_2d", ptr),
        ("get_tensor_2d", ptr),
        ("cpy_tensor", ptr),
        ("clear", ptr),
        ("reset", ptr),
    ]


class InitParams(C.Structure):
    """ggml_init_params"""

    _fields_ = [("mem_size", C.c_size_t), ("mem_buffer", ptr), ("no_alloc", flag)]


class ThreadpoolParams(C.Structure):
    """ggml_threadpool_params"""

    _fields_ = [
        ("cpumask", flag * 512),
        ("n_threads", i32),
        ("prio", i32),
        ("poll", u32),
        ("strict_cpu", flag),
        ("paused", flag),
    ]


EVAL_CALLBACK = C.CFUNCTYPE(flag, ptr, flag, ptr)
LOG_CALLBACK = C.CFUNCTYPE(None, C.c_int, C.c_char_p, ptr)
ABORT_CALLBACK = C.CFUNCTYPE(flag, ptr)


def _buffer_type(fields: str) -> type[C.Structure]:
    interface = type(
        "BufferTypeInterface", (C.Structure,), {"_fields_": [(name, ptr) for name in fields.split()]}
    )
    return type(
        "BufferType", (C.Structure,), {"_fields_": [("iface", interface), ("device", ptr), ("context", ptr)]}
    )


@dataclass(frozen=True)
class Build:
    """A known build of llama.cpp: its name and the structures that differ between builds."""

    name: str
    context_params: Any
    buffer_type: Any


def _context_params(between: list[tuple[str, Any]]) -> type[C.Structure]:
    return type("ContextParams", (C.Structure,), {"_fields_": [*_CONTEXT_HEAD, *between, *_CONTEXT_TAIL]})


_SIX = _buffer_type("get_name alloc_buffer get_alignment get_max_size get_alloc_size is_host")
_EIGHT = _buffer_type(
    "get_name alloc_buffer alloc_buffer_n get_alignment get_max_size get_alloc_size get_alloc_size_n is_host"
)

# (llama_version(), ggml_version()) -> build. A build joins this table when its headers were compared with the
# structures above and `python -m flashmoe.tools.self_test LIBRARY` succeeds.
KNOWN_BUILDS = {
    ("0.6.0-dev", "0.26.0"): Build("xllamacpp 2026.10.11549", _context_params([("new", ptr)]), _EIGHT),
    ("0.5.0-dev", "0.25.3"): Build("llama-cpp-python 0.3.36", _context_params([]), _SIX),
    ("0.5.0", "0.25.3"): Build("llama-cpp-python 0.3.36", _context_params([]), _SIX),
}


def self_check(lib: Any, build: Build) -> None:
    """Compare the declared layouts with what the library's own functions say. Raises LibraryError on a difference."""
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    object_header = 32  # ggml_object, which ggml_tensor_overhead() includes
    cpu = lib.ggml_backend_cpu_buffer_type()
    interface = build.buffer_type.from_address(cpu).iface
    facts = {
        "ggml_tensor": lib.ggml_tensor_overhead() == C.sizeof(Tensor) + object_header,
        "llama_model_params": (model.n_gpu_layers, model.split_mode, model.use_extra_bufts, model.vocab_only)
        == (-1, 1, True, False),
        "llama_context_params": (context.n_batch, context.n_ubatch, context.yarn_ext_factor, context.type_v)
        == (2048, 512, -1.0, 1)
        and (context.offload_kqv, context.op_offload, context.kv_unified, context.samplers)
        == (True, True, False, None),
        "ggml_backend_buffer_type": all((interface.get_name, interface.alloc_buffer, interface.is_host)),
    }
    wrong = [name for name, right in facts.items() if not right]
    if wrong:
        raise LibraryError(f"the llama.cpp library differs from build {build.name!r} in {', '.join(wrong)}")
