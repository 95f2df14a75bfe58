"""Checks, node by node, that a graph uses expert tensors only with ids that were renamed, and those with nothing else.

An architecture that used them in another way would give wrong results: a product with true ids reads beyond a tensor of
few slots. A graph of each number of tokens is inspected once. A node that is refused is made to do nothing, since the
library still computes it before it asks whether to go on.
"""

from __future__ import annotations

from flashmoe.engines.llamacpp.abi import CONSTANTS, Tensor
from flashmoe.engines.llamacpp.loader import LoadedModel
from flashmoe.engines.llamacpp.overlap import Forms
from flashmoe.errors import ModelError

INDICES = CONSTANTS["GGML_TYPE_I32"]
_NOTHING = CONSTANTS["GGML_OP_NONE"]
#: Operations that take rows or matrices of a tensor by ids: which source is the tensor, and which the ids.
_BY_ID = {b"MUL_MAT_ID": (0, 2), b"ADD_ID": (1, 2), b"GET_ROWS": (0, 1)}
_COPY = b"REPEAT"  # of a table per expert, to be gathered from

_UNKNOWN = "routes its experts in a way that FlashMoE does not know"


class Inspection:
    """What is known of a model's graphs. `begin`, then `rename` and `look` for its nodes, then `end`."""

    def __init__(self, model: LoadedModel) -> None:
        self._model, self._lib, self._absent = model, model.lib, model.absent
        self._tensors: dict[int, int] = {}  # address of what has the axis of slots -> its layer
        self._last: dict[int, int] = {}  # of those, of what each layer multiplies last
        self._renamed: dict[int, int] = {}  # address of what holds ids that were renamed -> their layer
        self._refused: list[tuple[Tensor, int]] = []  # and their operations
        self._late_inputs: set[bytes] = set()
        self._forms = Forms(model.catalog)  # of the graph under way
        self._shown: Forms | None = None  # of the last one of one token that was inspected
        self._seen: set[tuple[int, bool]] = set()  # (tokens, for embeddings) of graphs that were inspected
        self._kind = 0, False
        self._complete = True  # all of the last graph that was to be inspected
        self._begun: set[tuple[int, bool]] = set()  # as `_seen`, perhaps without the last layer
        self._moving: bool | None = None  # see `whole`; None before the first graph

    @property
    def whole(self) -> bool:
        """Whether expert tensors have to show the whole pool in the graph that has begun.

        So they do in a graph that is the first of its kind, and always where one has views of them, which stay where
        they are.
        """
        return not self._moving or self._kind not in self._begun

    def knows(self, tokens: int) -> bool:
        """Whether a graph of so many tokens that computes logits was inspected."""
        return (tokens, False) in self._seen

    def begin(self, tokens: int, embed: bool) -> bool:
        """A graph of `tokens` tokens begins; whether it is to be inspected."""
        self._kind = tokens, embed
        if self._kind in self._seen:
            return False
        self._tensors = self._model.layer_of_tensor()
        self._last = {self._model.last_weight(layer): layer for layer in set(self._tensors.values())}
        self._complete = True
        self._renamed = {}
        self._late_inputs.clear()
        if tokens == 1:
            self._forms = Forms(self._model.catalog)
        return True

    def end(self) -> None:
        """The graph was evaluated to its end."""
        if self._complete:
            if self._kind not in self._seen and self._kind[0] == 1:
                self._shown = self._forms
            self._seen.add(self._kind)
        self._begun.add(self._kind)
        self._moving = self._moving is not False

    def take_forms(self) -> Forms | None:
        """How the layers of a graph of one token multiply; None where that was taken before, or is not known."""
        taken, self._shown = self._shown, None
        return taken

    def take_late_inputs(self) -> list[bytes]:
        """The prefixes of the names that inputs of a layer's last product have, as the last graph has shown them.

        None where one has no such name, or they were taken before.
        """
        taken, self._late_inputs = sorted(self._late_inputs), set()
        return taken if all(taken) else []

    def rename(self, ids: int, layer: int) -> None:
        """The ids in a tensor, at an address, are about to become slots of a layer. Raises ModelError."""
        root = _root(ids)
        if root in self._renamed:
            raise self._refusal(Tensor.from_address(ids), "uses one layer's choice of experts in another")
        buffer = Tensor.from_address(root).buffer
        if not buffer or not self._lib.ggml_backend_buffer_is_host(buffer):
            raise self._refusal(Tensor.from_address(ids), "computes the choice of experts on another device")
        if layer in self._renamed.values():  # the products of one choice might follow the other
            self._keep_whole(Tensor.from_address(ids))
        self._renamed[root] = layer
        self._forms.rename(ids, layer)

    def look(self, address: int) -> None:
        """Raise ModelError where a node uses tensors of ours in a way that is not provided for."""
        node = Tensor.from_address(address)
        try:
            self._look(node, address)
        except ModelError:
            self._refused.append((node, node.op))
            node.op = _NOTHING
            raise

    def restore(self) -> None:
        """The evaluation is over, and the library may use its graph again."""
        while self._refused:
            node, operation = self._refused.pop()
            node.op = operation

    def _look(self, node: Tensor, address: int) -> None:
        sources = [source for source in node.src if source]
        self._look_at_tables(node, sources)
        if self._absent and not self._absent.isdisjoint(map(_root, sources)):
            raise self._refusal(node, "uses a block that predicts further tokens for the present one")
        if self._kind[0] == 1:
            product = self._tensors.get(node.src[0]) if node.src[0] else None
            self._forms.look(address, self._lib.ggml_op_desc(address), product)
        if node.view_src in sources:  # computes nothing
            return
        if 0 in node.ne[:]:  # the last layer of a micro-batch without outputs
            self._complete = self._complete and not any(_root(s) in self._tensors for s in sources)
            return
        tensors = {i for i, source in enumerate(node.src) if source and _root(source) in self._tensors}
        ids = {i for i, source in enumerate(node.src) if source and _root(source) in self._renamed}
        if not tensors and not ids:
            return
        operation = self._lib.ggml_op_desc(address)
        if any(node.src[i] not in self._tensors for i in tensors):
            self._keep_whole(node)
        if operation == _COPY and tensors == {0} and not ids:
            self._keep_whole(node)
            self._tensors[address] = self._tensors[_root(node.src[0])]
            return
        table, indices = _BY_ID.get(operation, (-1, -1))
        if tensors != {table} or ids != {indices}:
            raise self._refusal(node, _UNKNOWN)
        layer = self._tensors[_root(node.src[table])]
        if self._renamed[_root(node.src[indices])] != layer:
            raise self._refusal(node, _UNKNOWN)
        if self._model.catalog.layers[layer].values:  # afterwards its ids are those of experts again
            del self._renamed[_root(node.src[indices])]
        elif node.src[table] in self._last:
            name, _, number = Tensor.from_address(node.src[1]).name.rpartition(b"-")
            self._late_inputs.add(name + b"-" if number.isdigit() else b"")

    def _keep_whole(self, node: Tensor) -> None:
        """From here on expert tensors show the whole pool. Raises ModelError where they have done otherwise."""
        if self._moving:
            raise self._refusal(node, _UNKNOWN)
        self._moving = False

    def _look_at_tables(self, node: Tensor, sources: list[int]) -> None:
        """Rows of a table are there for ids that are known before the graph is computed."""
        tables = self._model.tables.keys() & set(sources)
        if not tables:
            return
        ids = Tensor.from_address(node.src[1]) if node.src[0] in tables and node.src[1] else None
        known = ids and ids.type == INDICES and ids.op == _NOTHING and ids.ne[1:] == [1, 1, 1]
        if not known or tables != {node.src[0]}:
            table = self._model.tables[tables.pop()].name
            raise self._refusal(node, f"does more with {table} than to gather the rows of its tokens")

    def not_rewritten(self, address: int) -> ModelError:
        """Why the routes at a node cannot be rewritten."""
        return self._refusal(
            Tensor.from_address(address),
            "routes its experts in a way that --approx does not know: run it without",
        )

    def _refusal(self, node: Tensor, what: str) -> ModelError:
        return ModelError(
            f"the architecture {self._model.catalog.gguf.architecture!r} {what} "
            f"(node {node.name.decode(errors='replace')!r}); please report it"
        )


def _root(address: int) -> int:
    """The tensor whose memory a tensor is a view of, or the tensor itself."""
    while view := Tensor.from_address(address).view_src:
        address = view
    return address
