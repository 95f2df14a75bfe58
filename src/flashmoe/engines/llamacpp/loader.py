"""Loads a model with its dense weights in anonymous memory and its experts nowhere, then points them at the pool."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from flashmoe.cache.pool import SlotPool, Window
from flashmoe.engines.llamacpp.buffer import ExpertBuffer
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.repack import Repacker
from flashmoe.engines.llamacpp.token_table import TokenTable
from flashmoe.engines.llamacpp.vfile import VirtualFile, segments
from flashmoe.errors import ModelError
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.direct import DirectFile


class LoadedModel:
    """A llama_model whose expert tensors are ours. `catalog` lists the MoE layers that the engine really uses."""

    def __init__(
        self,
        lib: Library,
        catalog: ExpertCatalog,
        files: Sequence[DirectFile],
        progress: Callable[[int], None] = lambda _: None,
        *,
        repack: bool = False,
    ) -> None:
        """Load; `progress` gets the dense bytes read so far.

        repack: let the engine choose the layouts of all weights, as it does by default; else they are the file's.
        Raises ModelError, with the engine's own reason.
        """
        self.lib = lib
        self._repacker: Repacker | None = None
        self._buffer = ExpertBuffer(lib)
        self.pointer: int | None = None
        self.token_table: TokenTable | None = None
        with ExitStack() as undo:
            undo.callback(self.close)
            self._load(catalog, files, progress, repack)
            #: Whether some of its memory is a state, not a cache of tokens.
            self.recurrent = bool(
                lib.llama_model_is_recurrent(self.pointer) or lib.llama_model_is_hybrid(self.pointer)
            )
            self.catalog = catalog.only(self._buffer.tensors)
            for layer in self.catalog.layers:
                for weight in (*layer.weights, *layer.tables):
                    self._set_shape(weight.tensor.name, weight.tensor.shape)
            table = catalog.token_table
            if table and table.name in self._buffer.tensors:
                self.token_table = TokenTable(table, files[catalog.gguf.files.index(table.file)])
                self._set_shape(table.name, table.shape)
                self._buffer.tensors[table.name].data = self.token_table.address
            if repack:
                self._repacker = Repacker(lib)
                self._repack(self._repacker)
            undo.pop_all()

    def _load(
        self,
        catalog: ExpertCatalog,
        files: Sequence[DirectFile],
        progress: Callable[[int], None],
        repack: bool,
    ) -> None:
        """Let the library load the model, but for the experts and a token embedding that is read on demand."""
        experts = {p.tensor.name for layer in catalog.layers for p in (*layer.weights, *layer.tables)}
        table = catalog.token_table
        holes = experts | {table.name} if table else experts
        file = VirtualFile(segments(catalog.gguf, files, holes), progress)
        params = self.lib.llama_model_default_params()
        self.lib.build.layout.map_file(params, False)
        params.use_extra_bufts = repack
        params.n_gpu_layers = 0
        self._devices = (C.c_void_p * 1)()  # none: the list ends at once
        params.devices = C.addressof(self._devices)
        params.tensor_buft_overrides = self._buffer.overrides(catalog.override_pattern)
        self.lib.messages.clear()
        try:
            self.pointer = self.lib.llama_model_load_from_file_ptr(file.stream, params)
        finally:
            file.close()
        if file.error:
            raise file.error
        if not self.pointer:
            raise load_error(self.lib, catalog)
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

    def _point(self, window: Window, slots: int) -> None:
        """The expert axis, the last one of the tensor, becomes the slot axis."""
        name, shape = window.weight.tensor.name, window.weight.tensor.shape
        tensor, axis = self._buffer.tensors[name], len(shape) - 1
        if tensor.extra:
            slots = max(slots, 2)  # the kernels for repacked experts insist on a third dimension
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

    @property
    def table_address(self) -> int:
        """Address of the token embedding's tensor where its rows are read on demand, else 0."""
        return C.addressof(self._buffer.tensors[self.token_table.name]) if self.token_table else 0

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


def load_error(lib: Library, catalog: ExpertCatalog) -> ModelError:
    """Why the engine refused a model, in its own last words."""
    reason = next(
        (m for m in lib.messages if "error loading model" in m), (lib.messages or ["no reason given"])[-1]
    )
    name = catalog.gguf.files[0]
    if "unknown model architecture" in reason:
        return ModelError(
            f"{name}: this llama.cpp does not know the architecture {catalog.gguf.architecture!r}; "
            "a newer xllamacpp may, see the list of supported models in the README"
        )
    return ModelError(
        f"{name}: llama.cpp cannot load this model ({reason.split('error loading model: ')[-1]})"
    )
