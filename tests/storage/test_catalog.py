"""The catalog of experts: weights, tables, size groups, and models that cannot be served."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from flashmoe.errors import ModelError
from flashmoe.storage.catalog import ExpertCatalog, same_model
from flashmoe.storage.gguf import GGUF, read_gguf
from tests.conftest import Tiny
from tests.models import ARCHITECTURES, dense, split


def catalog_of(path: Path) -> ExpertCatalog:
    return ExpertCatalog.from_gguf(read_gguf(path))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_slices_are_those_of_the_gguf_package(name: str, tiny: Tiny) -> None:
    """Every expert tensor is found, and expert e's slice is where the tensor's e-th matrix is."""
    catalog, data = catalog_of(tiny(name)), tiny(name).read_bytes()
    theirs = {t.name: t for t in gguf.GGUFReader(tiny(name)).tensors}
    assert {n for n in theirs if re.match(r"blk\.3\.", n) and name == "glm4moe"} == catalog.skipped
    theirs = {n: t for n, t in theirs.items() if n not in catalog.skipped}
    found = {p.tensor.name for layer in catalog.layers for p in (*layer.weights, *layer.tables)}
    assert found == {n for n in theirs if "_exps." in n and "norm" not in n}
    for layer in catalog.layers:
        for weight in (*layer.weights, *layer.tables):
            rows = theirs[weight.tensor.name].data
            assert len(rows) == layer.n_experts
            for expert in (0, layer.n_experts - 1):
                start = weight.offset + expert * weight.nbytes
                assert data[start : start + weight.nbytes] == np.ascontiguousarray(rows[expert]).tobytes()
    expert_bytes = sum(theirs[p.tensor.name].n_bytes for layer in catalog.layers for p in layer.weights)
    assert catalog.expert_bytes == expert_bytes
    assert catalog.dense_bytes == sum(t.n_bytes for t in theirs.values()) - expert_bytes


def names(catalog: ExpertCatalog, layer: int) -> list[str]:
    return [p.tensor.name.split(".", 2)[2] for p in catalog.layers[layer].weights]


def test_weights_and_tables(tiny: Tiny) -> None:
    separate = catalog_of(tiny("llama"))
    assert names(separate, 0) == ["ffn_up_exps.weight", "ffn_gate_exps.weight", "ffn_down_exps.weight"]
    assert separate.layers[0].tables == ()
    fused = catalog_of(tiny("cohere2moe"))
    assert names(fused, 0) == ["ffn_gate_up_exps.weight", "ffn_down_exps.weight"]
    assert [layer.block for layer in fused.layers] == [1, 2, 3]  # the first block is dense
    biased = catalog_of(tiny("gpt-oss"))
    assert {t.tensor.name.split(".", 2)[2] for t in biased.layers[0].tables} == {
        "ffn_up_exps.bias",
        "ffn_gate_exps.bias",
        "ffn_down_exps.bias",
    }
    scaled = catalog_of(tiny("nvfp4"))
    assert {t.nbytes for t in scaled.layers[0].tables} == {4}
    gateless = catalog_of(tiny("nemotron_h_moe"))
    assert names(gateless, 0) == ["ffn_up_exps.weight", "ffn_down_exps.weight"]


def test_shape_of_the_model(tiny: Tiny) -> None:
    for name, expected in {
        "olmoe": (4, 16, 4),
        "llama4": (2, 16, 1),
        "jamba": (2, 8, 2),
        "nemotron_h_moe": (2, 12, 4),  # top-k differs by layer: the largest
    }.items():
        catalog = catalog_of(tiny(name))
        assert (len(catalog.layers), catalog.n_experts, catalog.top_k) == expected
        assert catalog.total_experts == expected[0] * expected[1]
    assert [layer.top_k for layer in catalog_of(tiny("nemotron_h_moe")).layers] == [2, 4]


def test_layers_of_equal_slices_share_a_group(tiny: Tiny) -> None:
    assert catalog_of(tiny("olmoe")).groups == (0, 1, 2, 3)  # four formats
    assert catalog_of(tiny("gpt-oss")).groups == (0, 0, 1, 0)


def test_only_drops_layers_that_are_not_loaded(tiny: Tiny) -> None:
    catalog = catalog_of(tiny("glm4moe"))
    assert [layer.block for layer in catalog.layers] == [1, 2]  # block 3 predicts further tokens
    loaded = {p.tensor.name for layer in catalog.layers[:1] for p in layer.weights}
    assert [layer.block for layer in catalog.only(loaded).layers] == [1]


def test_prediction_that_is_said_and_not_there(tiny: Tiny) -> None:
    """Converters leave the number in files without such blocks: then the last block is one of the model's own."""
    model = read_gguf(tiny("glm4moe"))
    tensors = {name: tensor for name, tensor in model.tensors.items() if ".nextn." not in name}
    catalog = ExpertCatalog.from_gguf(GGUF(model.files, model.metadata, tensors, model.parts))
    assert [layer.block for layer in catalog.layers] == [1, 2, 3]
    assert not catalog.skipped


def test_identity_tells_models_apart(tiny: Tiny, tmp_path: Path) -> None:
    identity = catalog_of(tiny("olmoe")).identity
    assert identity["architecture"] == "olmoe"
    assert (identity["layers"], identity["experts"], identity["top_k"]) == ("4", "16", "4")
    assert identity != catalog_of(tiny("aligned")).identity
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny("olmoe").read_bytes())
    assert catalog_of(split(path, 3)[0]).identity == identity  # the same model in parts
    flip_router(path)
    later = catalog_of(path).identity  # the same tensors, trained further
    assert {name for name in later if later[name] != identity[name]} == {"router_sha256"}
    assert not same_model(identity, later)


def flip_router(path: Path) -> None:
    router = read_gguf(path).tensors["blk.0.ffn_gate_inp.weight"]
    with open(path, "r+b") as file:
        file.seek(router.offset + router.nbytes - 1)
        last = file.read(1)[0]
        file.seek(router.offset + router.nbytes - 1)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {"architecture": "a", "tensors_sha256": "1", "router_sha256": "r"}, True),
        ({"architecture": "a"}, {"architecture": "b"}, False),
        ({"tensors_sha256": "1"}, {"tensors_sha256": "2"}, False),
        (
            {"tensors_sha256": "1"},
            {"tensors_sha256": "1", "router_sha256": "r"},
            True,
        ),  # before routers were known
        ({"tensors_sha256": "1", "router_sha256": "r"}, {"tensors_sha256": "1", "router_sha256": "s"}, False),
        ({"tensors_sha256": "1", "router_sha256": "r"}, {"tensors_sha256": "2", "router_sha256": "r"}, True),
    ],
)
def test_same_model(one: dict[str, str], other: dict[str, str], same: bool) -> None:
    assert same_model(one, other) is same_model(other, one) is same


def test_dense_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a dense model .*no experts to stream"):
        catalog_of(dense(tmp_path / "d.gguf"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_used_count", None),
        ("expert_used_count", 0),
        ("expert_used_count", 99),
        ("expert_used_count", [4, 4]),
        ("expert_used_count", [4, 4, 17, 4]),
        ("expert_count", "many"),
    ],
)
def test_metadata_that_makes_no_sense(key: str, value: object, tiny: Tiny) -> None:
    model = read_gguf(tiny("olmoe"))
    metadata = {**model.metadata, f"olmoe.{key}": value}
    with pytest.raises(ModelError, match="expert_(used_)?count"):
        ExpertCatalog.from_gguf(GGUF(model.files, metadata, model.tensors, model.parts))


def test_weights_that_do_not_fit_together(tiny: Tiny) -> None:
    model = read_gguf(tiny("olmoe"))
    name = "blk.2.ffn_up_exps.weight"
    for shape in ((64, 96, 15), (64, 96)):
        odd = type(model.tensors[name])(name, shape, "F32", model.files[0], 0, 0)
        tensors = {**model.tensors, name: odd}
        with pytest.raises(ModelError, match="block 2 do not fit together"):
            ExpertCatalog.from_gguf(GGUF(model.files, model.metadata, tensors, model.parts))
