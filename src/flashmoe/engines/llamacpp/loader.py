"""Loads a model with its dense weights in anonymous memory and none for its experts, then points them at the pool."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

from flashmoe.cache.pool import SlotPool, Window
from flashmoe.engines.llamacpp.buffer import ExpertBuffer
from flashmoe.engines.llamacpp.last_words import arrange
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.metadata import overrides, warn_of_text
from flashmoe.engines.llamacpp.repack import Repacker
from flashmoe.engines.llamacpp.row_table import TableRows
from flashmoe.engines.llamacpp.spans import Spans, fewest_slots
from flashmoe.engines.llamacpp.vfile import VirtualFile, segments
from flashmoe.errors import ModelError
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import GGUF
from flashmoe.storage.reader import ExpertReader


class LoadedModel:
    """A llama_model whose expert tensors are ours. `catalog` lists the MoE layers that the engine really uses."""

    def __init__(
        self,
        lib: Library,
        catalog: ExpertCatalog,
        reader: ExpertReader,
        progress: Callable[[int], None],
        *,
        repack: bool,
        told: Mapping[str, Any],
    ) -> None:
        """Load; `progress` gets the dense bytes read so far.

        reader: its first files are the model's.
        repack: let the engine choose the layouts of all weights, as it does by default; else they are the file's.
        told: metadata in place of the file's, see `metadata.told_otherwise`.
        Raises ModelError, with the engine's own reason.
        """
        self.lib = lib
        self._repacker: Repacker | None = None
        self._buffer = ExpertBuffer(lib)
        self.pointer: int | None = None
        self._tables: list[TableRows] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            self._load(catalog, reader, progress, repack, told)
            #: Whether some of its memory is a state, not a cache of tokens.
            self.recurrent = bool(
                lib.llama_model_is_recurrent(self.pointer) or lib.llama_model_is_hybrid(self.pointer)
            )
            self.catalog = catalog.only(self._buffer.tensors)
            for layer in self.catalog.layers:
                for weight in (*layer.weights, *layer.tables):
                    self._set_shape(weight.tensor.name, weight.tensor.shape)
            for table in catalog.row_tables:
                if table.tensor.name in self._buffer.tensors:
                    self._tables.append(TableRows(table, reader, catalog.gguf.files.index(table.tensor.file)))
                    self._set_shape(table.tensor.name, table.tensor.shape)
                    self._buffer.tensors[table.tensor.name].data = self._tables[-1].address
            if repack:
                self._repacker = Repacker(lib)
                self._repack(self._repacker)
            undo.pop_all()

    def _load(
        self,
        catalog: ExpertCatalog,
        reader: ExpertReader,
        progress: Callable[[int], None],
        repack: bool,
        told: Mapping[str, Any],
    ) -> None:
        """Let the library load what stays in memory."""
        tables = {table.tensor.name for layer in catalog.layers for table in layer.tables}
        holes = catalog.gguf.tensors.keys() - catalog.resident.keys() | tables
        files = reader.files[: len(catalog.gguf.files)]
        file = VirtualFile(segments(catalog.gguf, files, holes), progress)
        self.pointer = load_through(
            self.lib, file, self._buffer, catalog.override_pattern, catalog.gguf, repack=repack, told=told
        )
        warn_of_text(self.lib, catalog.gguf)
        self._buffer.seal()

    def _repack(self, repacker: Repacker) -> None:
        weights = [weight.tensor.name for layer in self.catalog.layers for weight in layer.weights]
        tensors = {name: self._buffer.tensors[name] for name in weights}
        self.catalog = self.catalog.placed(
            {name: repacker.place(tensor) for name, tensor in tensors.items() if repacker.adopt(tensor)}
        )

    def attach(self, pool: SlotPool, slots: Sequence[int]) -> None:
        """Make every expert tensor a window into the pool; `slots[g]` is the number of slots of size group g."""
        for layer, group in enumerate(self.catalog.groups):
            for window in (*pool.windows[layer], *pool.tables(layer)):
                self._point(window, slots[group])
        #: Where they are in it.
        self.spans = Spans(self.catalog, self._buffer.tensors, pool, slots)

    def _point(self, window: Window, slots: int) -> None:
        """The expert axis, the last one of the tensor, becomes the slot axis."""
        name, shape = window.weight.tensor.name, window.weight.tensor.shape
        tensor, axis = self._buffer.tensors[name], len(shape) - 1
        slots = max(slots, fewest_slots(tensor))
        self._set_shape(name, (*shape[:-1], slots))
        tensor.data = window.address
        tensor.nb[axis] = window.stride
        for i in range(axis + 1, 4):
            tensor.nb[i] = window.stride * slots

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._buffer.tensors[name].ne[:] = (*shape, 1, 1, 1)[:4]

    def layer_of_tensor(self) -> dict[int, int]:
        """Address of every expert tensor -> number of its layer, to recognise them in a graph."""
        return {
            C.addressof(self._buffer.tensors[weight.tensor.name]): i
            for i, layer in enumerate(self.catalog.layers)
            for weight in (*layer.weights, *layer.tables)
        }

    @cached_property
    def tables(self) -> dict[int, TableRows]:
        """Tables that are read by rows, by the address of their tensor."""
        return {C.addressof(self._buffer.tensors[table.name]): table for table in self._tables}

    @cached_property
    def absent(self) -> frozenset[int]:
        """Addresses of tensors that have no contents: of blocks that do not run."""
        of_layers = {p.tensor.name for x in self.catalog.layers for p in (*x.weights, *x.tables)}
        known = of_layers.union(table.name for table in self._tables)
        return frozenset(C.addressof(t) for name, t in self._buffer.tensors.items() if name not in known)

    def last_weight(self, layer: int) -> int:
        """Address of the tensor that a layer multiplies last (down)."""
        return C.addressof(self._buffer.tensors[self.catalog.layers[layer].weights[-1].tensor.name])

    def close(self) -> None:
        if self.pointer:
            self.lib.llama_model_free(self.pointer)
            self.pointer = None
        if self._repacker:
            self._repacker.close()
            self._repacker = None


def load_through(
    lib: Library,
    file: VirtualFile,
    buffer: ExpertBuffer,
    pattern: str,
    gguf: GGUF,
    *,
    repack: bool = False,
    told: Mapping[str, Any] | None = None,
) -> int:
    """A llama_model on the CPU from a virtual file, which is closed; tensors that match `pattern` are in `buffer`.

    Raises what the file or the buffer has met, and ModelError with the engine's own reason.
    """
    arrange(lib)
    params = lib.llama_model_default_params()
    lib.build.layout.map_file(params, False)
    params.use_extra_bufts = repack
    params.n_gpu_layers = 0
    devices = (C.c_void_p * 1)()  # none: the list ends at once
    params.devices = C.addressof(devices)
    params.tensor_buft_overrides = buffer.overrides(pattern)
    instead = overrides(told or {})
    params.kv_overrides = C.addressof(instead)
    lib.listen()
    try:
        pointer: int | None = lib.llama_model_load_from_file_ptr(file.stream, params)
    finally:
        file.close()
    error = file.error or buffer.error or (None if pointer else load_error(lib, gguf))
    if error:
        if pointer:
            lib.llama_model_free(pointer)
        raise error
    assert pointer
    return pointer


def load_error(lib: Library, gguf: GGUF) -> ModelError:
    """Why the engine refused a model, in its own last words."""
    reason = next(
        (m for m in lib.messages if "error loading model" in m), (lib.messages or ["no reason given"])[-1]
    )
    name = gguf.files[0]
    if "unknown model architecture" in reason:
        return ModelError(
            f"{name}: this llama.cpp does not know the architecture {gguf.architecture!r}; "
            "a newer xllamacpp may, see the list of supported models in the README"
        )
    return ModelError(
        f"{name}: llama.cpp cannot load this model ({reason.split('error loading model: ')[-1]})"
    )
