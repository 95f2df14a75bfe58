"""A ggml buffer type written in Python: expert tensors get addresses while the model loads, but no memory.

The addresses are reserved without commitment, so a model larger than RAM is not refused. As soon as a tensor has its
address it is made one row small, so that the loader reads next to nothing of it: start-up follows the dense size, not
the size of the file. Later the tensors get their shape back and are pointed at the pool.
"""

from __future__ import annotations

import ctypes as C
import mmap
from collections.abc import Callable
from typing import Any

from flashmoe.engines.llamacpp.abi import CONSTANTS, BufferInterface, BufferOverride, Tensor, ptr
from flashmoe.engines.llamacpp.library import Library
from flashmoe.storage.addresses import reserve_uncounted

_FAILED = CONSTANTS["GGML_STATUS_FAILED"]


class ExpertBuffer:
    """Collects the tensors that the engine allocates in it: `tensors` maps names to live ggml tensors.

    Must live as long as the model.
    """

    def __init__(self, lib: Library) -> None:
        self._lib = lib
        self._keep: list[Any] = []
        self._reserved: list[mmap.mmap] = []
        self._buffers: list[int] = []
        self.tensors: dict[str, Tensor] = {}
        #: The shapes that they had before they were made small.
        self.shapes: dict[str, tuple[int, ...]] = {}
        #: What was raised while the library loaded, if anything: it knows that something failed, and not why.
        self.error: BaseException | None = None
        self._type = lib.structs["ggml_backend_buffer_type"]()
        # The library's own answers where it asks while it builds a graph: its server may hold Python's lock then
        self._cpu = (
            lib.structs["ggml_backend_buffer_type"].from_address(lib.ggml_backend_cpu_buffer_type()).iface
        )
        for question in ("get_alignment", "get_max_size", "get_alloc_size", "is_host"):
            setattr(self._type.iface, question, getattr(self._cpu, question))
        self._type.iface.alloc_buffer = self._function(self._alloc, ptr, ptr, C.c_size_t)
        name = C.create_string_buffer(b"FlashMoE")  # the loader tells buffer types apart by their names
        self._keep.append(name)
        self._type.iface.get_name = self._function(
            lambda _: C.addressof(name), ptr, ptr, failed=C.addressof(name)
        )

    def overrides(self, pattern: str) -> int:
        """Address of a llama_model_params.tensor_buft_overrides list: tensors matching `pattern` come here."""
        entries = (BufferOverride * 2)(BufferOverride(pattern.encode(), C.addressof(self._type)))
        self._keep.append(entries)
        return C.addressof(entries)

    def _function(
        self, body: Callable[..., Any], result: Any, *arguments: Any, failed: int | None = None
    ) -> int:
        """The address of a function in Python; failed: what it returns to the library if it raises."""

        def call(*given: Any) -> Any:
            try:
                return body(*given)
            except BaseException as error:
                # ctypes would report it as ignored, and return what it happens to find
                self.error = self.error or error
                return failed

        function = C.CFUNCTYPE(result, *arguments)(call)
        self._keep.append(function)
        return C.cast(function, ptr).value or 0

    def _alloc(self, _type: int, size: int) -> int:
        memory, base = reserve_uncounted(size)
        self._reserved.append(memory)
        nothing = self._function(lambda *_: None, None, ptr)
        interface = BufferInterface(
            free_buffer=nothing,
            get_base=self._function(lambda _: base, ptr, ptr, failed=base),
            init_tensor=self._function(self._init_tensor, C.c_int, ptr, ptr, failed=_FAILED),
            set_tensor=self._function(lambda *_: None, None, ptr, ptr, ptr, C.c_size_t, C.c_size_t),
            get_tensor=self._function(lambda *_: None, None, ptr, ptr, ptr, C.c_size_t, C.c_size_t),
            memset_tensor=self._function(lambda *_: None, None, ptr, ptr, C.c_uint8, C.c_size_t, C.c_size_t),
            clear=self._function(lambda *_: None, None, ptr, C.c_uint8),
        )
        address: int = self._lib.ggml_backend_buffer_init(C.addressof(self._type), interface, None, size)
        self._buffers.append(address)
        return address

    def seal(self) -> None:
        """The model is loaded: graphs, which make views of its tensors, need not call Python from here on."""
        self._type.iface.get_name = self._cpu.get_name
        for address in self._buffers:
            BufferInterface.from_address(address).init_tensor = None  # a buffer begins with its interface

    def _init_tensor(self, _buffer: int, address: int) -> int:
        tensor = Tensor.from_address(address)
        name = tensor.name.decode()
        self.tensors[name], self.shapes[name] = tensor, tuple(tensor.ne)
        tensor.ne[1] = tensor.ne[2] = tensor.ne[3] = 1
        return 0
