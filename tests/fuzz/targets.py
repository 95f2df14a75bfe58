"""What is read: one target per kind of file, with the files that the changes start from."""

from __future__ import annotations

import ctypes
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.cache.policies import create as create_policy
from flashmoe.cache.pool import slot_bytes
from flashmoe.cache.residency import equal_quota, make_residency
from flashmoe.errors import FlashMoEError, FlashMoEWarning
from flashmoe.prefetch import create as create_predictor
from flashmoe.prefetch.files import PredictorFile
from flashmoe.prefetch.table import Table
from flashmoe.routing.files import read as read_trace
from flashmoe.runtime.session import Session
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.checksums import find_checksums, no_checksums, write_checksums
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.gguf import parse_part, read_gguf
from flashmoe.storage.pack import find_pack, write_pack
from tests.fuzz import mutate
from tests.learn.test_learned import untrained as untrained_policy
from tests.models import make, split
from tests.prefetch.test_predictors import untrained as untrained_predictor
from tests.simulate.traces import made_up

LAYERS, EXPERTS, TOP_K = 2, 8, 2


@dataclass
class Target:
    """`read` is given the path of a changed file named `name`, beside the untouched `others`."""

    name: str
    seed: bytes
    read: Callable[[Path], Any]
    structured: Callable[[bytes, random.Random], bytes] | None = None
    places: list[int] = field(default_factory=list)
    others: dict[str, bytes] = field(default_factory=dict)

    def change(self, rng: random.Random) -> bytes:
        """The seed with one to three random changes."""
        data = self.seed
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if self.structured is not None and rng.random() < 0.6:
                try:
                    data = self.structured(data, rng)
                    continue
                except Exception:  # the change before left nothing that can be parsed
                    pass
            data = mutate.blind(data, rng, self.places)
        return data


def _model(path: Path) -> None:
    """Everything that `load` derives from a header before it hands the file to the engine."""
    catalog = ExpertCatalog.from_gguf(read_gguf(path))
    assert catalog.dense_bytes >= 0
    assert catalog.identity
    slot_bytes(catalog, 512)
    catalog.gguf.arch_int("context_length", 4096)
    quota = equal_quota(catalog.total_experts, len(catalog.layers), catalog.n_experts)
    make_residency(len(catalog.layers), catalog.n_experts, quota, catalog.groups)


def _policy(kind: str, path: Path) -> None:
    """Load it, and let its kernels run on what the file says."""
    policy = create_policy(f"{kind}:{path}")
    policy.bind(make_residency(LAYERS, EXPERTS, [3] * LAYERS))
    policy.replay(made_up(12, LAYERS, EXPERTS, TOP_K).expert_ids)


def _predictor(kind: str, path: Path) -> None:
    predictor = create_predictor(f"{kind}:{path}")
    assert predictor is not None
    predictor.bind(LAYERS, EXPERTS, TOP_K)
    out, trace = np.zeros(EXPERTS, np.float32), made_up(6, LAYERS, EXPERTS, TOP_K)
    predictor.begin_sequence()
    for t, ids in enumerate(trace.expert_ids.astype(np.int32)):
        predictor.begin_step(t)
        for layer in range(LAYERS):
            predictor.predict(layer - 1, layer, out)
            assert np.isfinite(out).all()
            predictor.observe(layer, ids[layer])


def _session(path: Path) -> None:
    """Go on from a session's file as the next one does, with kernels that use what it says."""
    catalog = _catalog_beside(path)
    layers, experts = len(catalog.layers), catalog.n_experts
    policy, table = create_policy("arc"), Table(memory=1 << 12)
    policy.bind(make_residency(layers, experts, [2] * layers))
    table.bind(layers, experts, catalog.top_k)
    try:
        Session(path, catalog, policy, [table]).restore()
    except FlashMoEWarning as warning:  # a cold start
        raise FlashMoEError(str(warning)) from None
    _use(policy, table, layers, experts)


def _use(policy: Any, table: Table, layers: int, experts: int) -> None:
    ids = made_up(6, layers, experts, TOP_K).expert_ids
    policy.replay(ids)
    out = np.zeros(experts, np.float32)
    for t, row in enumerate(ids.astype(np.int32)):
        table.begin_step(t)
        for layer in range(layers):
            table.predict(layer - 1, layer, out)
            table.observe(layer, row[layer])


def _catalog_beside(path: Path) -> ExpertCatalog:
    return ExpertCatalog.from_gguf(read_gguf(path.with_suffix(".gguf")))


def _placed(catalog: ExpertCatalog) -> ExpertCatalog:
    """As if the engine repacked the first weights: their bytes stay as they are."""

    def place(nbytes: int, source: int, slot: int) -> None:
        ctypes.memmove(slot, source, nbytes)

    first = [layer.weights[0] for layer in catalog.layers]
    return catalog.placed({p.tensor.name: partial(place, p.nbytes) for p in first})


def _pack(path: Path) -> None:
    catalog = _placed(_catalog_beside(path))
    pack = find_pack(catalog)
    assert pack
    files = [DirectFile(catalog.gguf.files[0]), DirectFile(path)]
    try:
        pack.apply(catalog, files)
        pack.checksums(catalog)
    finally:
        for file in files:
            file.close()


def _sums(path: Path) -> None:
    assert find_checksums(_catalog_beside(path))


def _beside(model: Path) -> dict[str, bytes]:
    """What lies beside a model: a session's file, a pack, checksums."""
    catalog = _catalog_beside(model)
    policy, table = create_policy("arc"), Table(memory=1 << 12)
    layers, experts = len(catalog.layers), catalog.n_experts
    policy.bind(make_residency(layers, experts, [2] * layers))
    table.bind(layers, experts, catalog.top_k)
    _use(policy, table, layers, experts)
    Session(model.with_suffix(".safetensors"), catalog, policy, [table]).save()
    file = DirectFile(model)
    write_pack(_placed(catalog), [file], lambda *_: None)
    file.close()
    write_checksums(catalog, no_checksums(catalog))
    return {
        kind: model.with_suffix(kind).read_bytes() for kind in (".safetensors", ".flashpack", ".flashsums")
    }


def _saved(save: Callable[[Path], Any], folder: Path) -> bytes:
    path = folder / "saved.safetensors"
    path.unlink(missing_ok=True)  # one of another kind would not be replaced
    save(path)
    return path.read_bytes()


def _fields(path: Path) -> list[int]:
    """Where the fields of a GGUF's header begin and end."""
    part, data = parse_part(path), path.read_bytes()
    places = [8, 16]
    for start, end in part.key_spans.values():
        places += [start, end - 8, end - 4]
    for tensor in part.tensors:
        name = tensor.name.encode()
        at = data.index(len(name).to_bytes(8, "little") + name)
        after = at + 8 + len(name)
        dims = 8 * len(tensor.shape)
        places += [at, after, after + 4, after + dims - 4, after + 4 + dims, after + 8 + dims]
    return places


@cache
def targets(folder: Path) -> dict[str, Target]:
    """All targets; `folder` is used while they are made."""
    trace = made_up(30, LAYERS, EXPERTS, TOP_K)
    weights = np.full(trace.expert_ids.shape, 0.5, np.float16)
    compressed, plain = io.BytesIO(), io.BytesIO()
    np.savez_compressed(
        compressed, expert_ids=trace.expert_ids, sequence_id=trace.sequence_id, num_experts=EXPERTS
    )
    np.savez(plain, expert_ids=trace.expert_ids, router_weights=weights, first_moe_layer=1)
    rows = [{"num_experts": EXPERTS, "first_moe_layer": 1, "model": {"name": "m"}}]
    rows += [{"experts": ids.tolist(), "sequence": 0, "token": 5, "weights": [[0.5] * TOP_K] * LAYERS}
             for ids in trace.expert_ids[:6]]  # fmt: skip
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    model, parts = make("gpt-oss", folder / "m.gguf"), split(make("llama", folder / "s.gguf"), 2)
    mixed = make("olmoe", folder / "o.gguf")

    def policy(kind: str) -> bytes:
        return _saved(untrained_policy(kind, LAYERS, EXPERTS, TOP_K, r=8, h=8).save, folder)

    made = {
        "gguf": Target("m.gguf", model.read_bytes(), _model, places=_fields(model)),
        "gguf, several quantisations": Target("m.gguf", mixed.read_bytes(), _model, places=_fields(mixed)),
        "gguf, first part": Target(
            parts[0].name, parts[0].read_bytes(), _model, None, _fields(parts[0]),
            {parts[1].name: parts[1].read_bytes()},
        ),
        "trace": Target("t.safetensors", _saved(trace.save, folder), read_trace, mutate.safetensors, [0, 8]),
        "trace, npz": Target("t.npz", compressed.getvalue(), read_trace, mutate.npz),
        "trace, plain npz": Target("t.npz", plain.getvalue(), read_trace, mutate.npz),
        "trace, jsonl": Target("t.jsonl", lines, read_trace, mutate.jsonl),
    }  # fmt: skip
    for kind in ("flashmoe", "flashmoe+"):
        made[f"policy {kind}"] = Target(
            "p.safetensors", policy(kind), lambda path, kind=kind: _policy(kind, path), mutate.safetensors, [0, 8]
        )  # fmt: skip
    files, others = _beside(mixed), {"o.gguf": mixed.read_bytes()}
    made["session"] = Target(
        "o.safetensors", files[".safetensors"], _session, mutate.safetensors, [0, 8], others
    )
    made["pack"] = Target("o.flashpack", files[".flashpack"], _pack, mutate.pack, [16, 20], others)
    made["checksums"] = Target("o.flashsums", files[".flashsums"], _sums, mutate.safetensors, [0, 8], others)
    table = Table(memory=1 << 12)
    table.bind(LAYERS, EXPERTS, TOP_K)
    table.learn_text(trace.expert_ids, np.arange(30) % 7, trace.starts())
    predictors = {
        "promoe": untrained_predictor(LAYERS, EXPERTS, TOP_K),
        "table": PredictorFile("table", table.state(), LAYERS, EXPERTS, TOP_K),
    }
    for kind, file in predictors.items():
        made[f"predictor {kind}"] = Target(
            "p.safetensors", _saved(file.save, folder), lambda path, kind=kind: _predictor(kind, path),
            mutate.safetensors, [0, 8],
        )  # fmt: skip
    return made
