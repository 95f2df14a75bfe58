"""Checks a layout of structs against what the library's own functions return."""

from __future__ import annotations

import ctypes as C
from typing import TYPE_CHECKING, Any

from flashmoe.engines.llamacpp.abi import CONSTANTS, BufferInterface, InitParams, Layout, Tensor, flag

if TYPE_CHECKING:
    from flashmoe.engines.llamacpp.library import Library

_ROOM = 256  # bytes
_OBJECT = 32  # sizeof(ggml_object), which ggml_tensor_overhead() includes
_F32, _I32, _F16 = (CONSTANTS[f"GGML_TYPE_{name}"] for name in ("F32", "I32", "F16"))
#: Defaults that have stayed what they are; in all fields between, pointers are null and flags are flags.
_MODEL = {"n_gpu_layers": -1, "split_mode": 1, "use_extra_bufts": True, "vocab_only": False}
_CONTEXT = {
    "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "yarn_ext_factor": -1.0, "yarn_beta_slow": -1.0,
    "type_k": _F16, "type_v": _F16, "offload_kqv": True, "op_offload": True, "kv_unified": False, "n_samplers": 0,
}  # fmt: skip


def differences(lib: Library, layout: Layout) -> list[str]:
    """The structs of `layout` that the functions of `lib`, declared by it, contradict."""
    agrees = {
        "ggml_tensor": _tensor(lib),
        "llama_model_params": _defaults(lib, layout, "llama_model", _MODEL),
        "llama_context_params": _defaults(lib, layout, "llama_context", _CONTEXT),
        "ggml_threadpool_params": _threads(lib, layout),
        "ggml_backend_buffer_type": _buffer_type(lib, layout),
        "ggml_backend_buffer_i": _buffer(lib),
    }
    return [name for name, right in agrees.items() if not right]


def _returned(lib: Library, name: str, struct: Any, *arguments: Any) -> Any:
    """What a function returns, with room behind it: a struct larger than it is thought to be would overwrite what is
    there."""
    roomy = type("Roomy", (C.Structure,), {"_fields_": [("struct", struct), ("room", C.c_char * _ROOM)]})
    function = C.CFUNCTYPE(roomy, *(type(argument) for argument in arguments))(lib.address(name))
    return function(*arguments).struct


def _defaults(lib: Library, layout: Layout, what: str, expected: dict[str, Any]) -> bool:
    params = _returned(lib, f"{what}_default_params", layout.structs[f"{what}_params"])
    raw = bytes(params)
    for name, kind in params._fields_:
        if kind is flag and raw[getattr(type(params), name).offset] > 1:
            return False
        if C.sizeof(kind) == C.sizeof(C.c_void_p) and kind is not C.c_size_t and getattr(params, name):
            return False
    return all(getattr(params, name) == value for name, value in expected.items())


def _threads(lib: Library, layout: Layout) -> bool:
    params = _returned(
        lib, "ggml_threadpool_params_default", layout.structs["ggml_threadpool_params"], C.c_int(3)
    )
    return (params.n_threads, params.prio, params.poll, params.strict_cpu, params.paused) == (3, 0, 50, 0, 0)


def _tensor(lib: Library) -> bool:
    """A product of experts, as a graph has it."""
    if lib.ggml_tensor_overhead() != C.sizeof(Tensor) + _OBJECT:
        return False
    context = lib.ggml_init(InitParams(8 * lib.ggml_tensor_overhead(), None, True))
    try:
        experts = lib.ggml_new_tensor_3d(context, _F32, 32, 3, 2)
        vector, ids = (
            lib.ggml_new_tensor_3d(context, _F32, 32, 1, 5),
            lib.ggml_new_tensor_2d(context, _I32, 1, 5),
        )
        product = Tensor.from_address(lib.ggml_mul_mat_id(context, experts, vector, ids))
        tensor = Tensor.from_address(experts)
        tensor.data = 4096
        return (
            product.src[:4] == [experts, vector, ids, None]
            and (Tensor.from_address(ids).type, product.type, tensor.view_src) == (_I32, _F32, None)
            and (tensor.ne[:], tensor.nb[:]) == ([32, 3, 2, 1], [4, 128, 384, 768])
            and lib.ggml_get_data(experts) == 4096
            and lib.ggml_get_name(experts) == experts + Tensor.name.offset
        )
    finally:
        lib.ggml_free(context)


def _buffer_type(lib: Library, layout: Layout) -> bool:
    cpu = lib.ggml_backend_cpu_buffer_type()
    kind = layout.structs["ggml_backend_buffer_type"].from_address(cpu)
    functions = kind.iface.get_name, kind.iface.alloc_buffer, kind.iface.get_alignment, kind.iface.is_host
    return all(functions) and kind.device == lib.ggml_backend_buft_get_device(cpu)


def _buffer(lib: Library) -> bool:
    """A buffer is its interface, and then its type."""
    cpu = lib.ggml_backend_cpu_buffer_type()
    buffer = lib.ggml_backend_buft_alloc_buffer(cpu, 64)
    try:
        return bool(C.c_void_p.from_address(buffer + C.sizeof(BufferInterface)).value == cpu)
    finally:
        lib.ggml_backend_buffer_free(buffer)
