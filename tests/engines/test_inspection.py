"""Graphs that use expert tensors in a way that is not provided for: refused, and not computed."""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator

import pytest

import flashmoe
from flashmoe.engines.llamacpp.abi import Tensor
from flashmoe.engines.llamacpp.hook import RouterHook
from flashmoe.engines.llamacpp.inspection import Inspection
from flashmoe.engines.llamacpp.loader import LoadedModel
from flashmoe.errors import ModelError
from tests.conftest import Tiny


@pytest.mark.parametrize("name", ["olmoe", "gpt-oss"])
def test_a_refused_product_is_not_computed(tiny: Tiny, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With true ids over fewer slots than experts it would read memory that is not there."""
    with flashmoe.load(
        tiny(name), cache="40%", threads=1, n_ctx=256, prefetch="none", layout="plain"
    ) as model:
        assert model.cache.policy.residency.n_slots < model.catalog.n_experts * len(model.catalog.layers)
        with monkeypatch.context() as patch:
            patch.setattr(RouterHook, "_rename", lambda *_: None)  # as if other ids were renamed
            for _ in range(20):
                with pytest.raises(
                    ModelError, match=f"{name.replace('-', '.')}.* routes its experts in a way"
                ):
                    model.engine.decode([5])
        model.engine.decode([5])


class Nodes:
    """Nodes of a graph, over the tensors of a loaded model."""

    def __init__(self, model: LoadedModel) -> None:
        self.model, self._kept = model, []
        lib, probe = model.lib, Tensor()
        self._operations = {}
        for number in range(90):
            probe.op = number
            self._operations.setdefault(lib.ggml_op_desc(C.addressof(probe)).decode(), number)
        size = 64
        self._memory = C.create_string_buffer(size)
        self._buffer = lib.ggml_backend_buft_alloc_buffer(lib.ggml_backend_cpu_buffer_type(), size)
        tensors = model.layer_of_tensor()
        #: Addresses of each layer's expert tensors.
        self.experts = [[a for a, at in tensors.items() if at == layer] for layer in range(2)]

    def make(self, operation: str, *sources: int, view: int = 0) -> int:
        """The address of a node."""
        node = Tensor(op=self._operations[operation], view_src=view or None, buffer=self._buffer)
        node.ne[:] = 4, 1, 1, 1
        for i, source in enumerate(sources):
            node.src[i] = source
        node.name = f"node-{len(self._kept)}".encode()
        self._kept.append(node)
        return C.addressof(node)

    def operation(self, address: int) -> int:
        return int(Tensor.from_address(address).op)


@pytest.fixture(scope="module")
def nodes(tiny: Tiny) -> Iterator[Nodes]:
    with flashmoe.load(
        tiny("gpt-oss"), cache="40%", threads=1, n_ctx=256, prefetch="none", layout="plain"
    ) as model:
        yield Nodes(model.engine._model)  # type: ignore[attr-defined]


@pytest.fixture
def inspection(nodes: Nodes) -> Inspection:
    inspection = Inspection(nodes.model)
    assert inspection.begin(1, False)
    return inspection


def refused(inspection: Inspection, nodes: Nodes, node: int) -> None:
    with pytest.raises(ModelError, match="routes its experts in a way"):
        inspection.look(node)
    assert nodes.operation(node) == 0


def test_what_llama_cpp_does(nodes: Nodes, inspection: Inspection) -> None:
    """Products, biases and scales, the latter through views and copies; and all that has nothing to do with experts."""
    sorted_ids = nodes.make("ARGSORT", nodes.make("NONE"))
    ids = nodes.make("VIEW", sorted_ids, view=sorted_ids)
    other = nodes.make("NONE")
    for node in (sorted_ids, ids, nodes.make("GET_ROWS", other, ids)):
        inspection.look(node)
    inspection.rename(ids, 0)
    up, scale = nodes.experts[0][:2]
    product = nodes.make("MUL_MAT_ID", up, other, ids)
    reshaped = nodes.make("RESHAPE", scale, view=scale)
    repeated = nodes.make("REPEAT", reshaped)
    for node in (
        product,
        nodes.make("ADD_ID", product, scale, ids),
        reshaped,
        nodes.make("GET_ROWS", reshaped, ids),
        repeated,
        nodes.make("GET_ROWS", repeated, nodes.make("RESHAPE", ids, view=sorted_ids)),
        nodes.make("ADD", product, other),
    ):
        before = nodes.operation(node)
        inspection.look(node)
        assert nodes.operation(node) == before
    inspection.end()
    assert inspection.knows(1)
    assert not inspection.knows(2)
    assert not inspection.begin(1, False)
    assert inspection.begin(1, True)


def test_what_is_refused(nodes: Nodes, inspection: Inspection) -> None:
    other, ids, more = (nodes.make("NONE") for _ in range(3))
    up, down = nodes.experts[0][:2]
    refused(inspection, nodes, nodes.make("MUL_MAT_ID", up, other, ids))  # not renamed yet
    inspection.rename(ids, 0)
    inspection.rename(more, 1)
    for node in (
        nodes.make("MUL_MAT_ID", up, other, nodes.make("NONE")),  # other ids
        nodes.make("MUL_MAT_ID", up, other, more),  # another layer's
        nodes.make("MUL_MAT_ID", other, up, ids),  # another tensor
        nodes.make("GET_ROWS", other, ids),  # a table that is not in the pool
        nodes.make("GET_ROWS", nodes.make("RESHAPE", up, view=up), nodes.make("NONE")),
        nodes.make("ADD_ID", other, nodes.make("NONE"), nodes.make("VIEW", ids, view=ids)),
        nodes.make("MUL_MAT", up, other),  # all experts
        nodes.make("CPY", ids),
        nodes.make("REPEAT", ids),
        nodes.make("ADD", up, down),
    ):
        refused(inspection, nodes, node)


def test_ids_of_two_layers(nodes: Nodes, inspection: Inspection) -> None:
    ids = nodes.make("ARGSORT", nodes.make("NONE"))
    inspection.rename(nodes.make("VIEW", ids, view=ids), 0)
    with pytest.raises(ModelError, match="one layer's choice of experts in another"):
        inspection.rename(nodes.make("VIEW", ids, view=ids), 1)


def test_ids_on_another_device(nodes: Nodes, inspection: Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = nodes.make("NONE")
    with monkeypatch.context() as patch:
        patch.setattr(nodes.model.lib, "ggml_backend_buffer_is_host", lambda _: False)
        with pytest.raises(ModelError, match="on another device"):
            inspection.rename(ids, 0)
    inspection.rename(ids, 0)


def test_a_micro_batch_without_outputs_is_not_all_of_a_graph(nodes: Nodes, inspection: Inspection) -> None:
    node = nodes.make("MUL_MAT_ID", nodes.experts[0][0], nodes.make("NONE"), nodes.make("NONE"))
    Tensor.from_address(node).ne[1] = 0
    inspection.look(node)
    inspection.end()
    assert not inspection.knows(1)
