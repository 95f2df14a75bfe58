"""Checks, node by node, that a graph uses expert tensors only with ids that were renamed.

An architecture that used them in another way would give wrong results. Every kind of graph is inspected once.
"""

from __future__ import annotations

from itertools import product

from flashmoe.engines.llamacpp.abi import Tensor
from flashmoe.engines.llamacpp.loader import LoadedModel
from flashmoe.errors import ModelError

INDICES = 26  # GGML_TYPE_I32


class Inspection:
    """What is known of a model's graphs. `begin`, then `renamed` and `look` for its nodes, then `end`."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._layer_of_tensor: dict[int, int] = {}
        self._renamed: dict[int, int] = {}  # address of a tensor of ids -> its layer
        self._late_inputs: set[bytes] = set()
        #: Kinds of graphs, of one token or several and for embeddings or not, that were not inspected yet.
        self._kinds = set(product((True, False), repeat=2))
        self._kind = True, False
        self._complete = True  # all of the last graph that was to be inspected

    @property
    def text_is_known(self) -> bool:
        """Whether every kind of graph that computes logits was inspected."""
        return not self._kinds & {(True, False), (False, False)}

    def begin(self, tokens: int, embed: bool) -> bool:
        """A graph of `tokens` tokens begins; whether it is to be inspected."""
        self._kind = tokens == 1, embed
        if self._kind not in self._kinds:
            return False
        self._layer_of_tensor = self._model.layer_of_tensor()
        self._complete = True
        self._renamed = {}
        self._late_inputs.clear()
        return True

    def end(self) -> None:
        """The graph was evaluated to its end."""
        if self._complete:
            self._kinds.discard(self._kind)

    def take_late_input(self) -> bytes:
        """The prefix of the name of every layer's input of its last product, as the last graph has shown it.

        Empty where it differs from layer to layer, or was taken before.
        """
        return self._late_inputs.pop() if len(self._late_inputs) == 1 else b""

    def renamed(self, ids: int, layer: int) -> None:
        """The tensor of ids at an address holds slots of a layer from here on."""
        self._renamed[ids] = layer

    def look(self, node: Tensor) -> None:
        """Raise ModelError where a node uses tensors of ours in a way that is not provided for."""
        architecture = self._model.catalog.gguf.architecture
        table = self._model.table_address
        if table and table in (node.src[0], node.src[1]):
            indices = node.src[1] if node.src[0] == table else None
            if not indices or Tensor.from_address(indices).type != INDICES:
                raise ModelError(
                    f"the architecture {architecture!r} does more with its token embedding than to gather rows "
                    f"(node {node.name.decode()!r}); please report it"
                )
        for source in (node.src[0], node.src[1]):
            layer = self._layer_of_tensor.get(source) if source else None
            if layer is None or node.view_src == source:  # a reshaped table keeps its slots
                continue
            if 0 in node.ne[:]:  # the last layer of a micro-batch without outputs: nothing is computed
                self._complete = False
                continue
            if self._renamed.get(node.src[2] or 0) != layer:
                raise ModelError(
                    f"the architecture {architecture!r} routes its experts in a way that FlashMoE does not know "
                    f"(node {node.name.decode()!r}); please report it"
                )
            if source == self._model.last_plane(layer):
                name, _, number = Tensor.from_address(node.src[1]).name.rpartition(b"-")
                self._late_inputs.add(name + b"-" if number.isdigit() else b"")
