"""What one session leaves to the next: the same logits, a cache that is warm, and files that nobody trusts."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import flashmoe
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import FlashMoEWarning
from tests.cli.runner import flashmoe as command
from tests.conftest import Tiny
from tests.engines.reference import CONTEXT, Reference, closing, evaluate, prompt

CACHES = ("1", "40%", "100%")


@pytest.fixture(scope="module")
def reference(lib: Library, tiny: Tiny) -> Iterator[Reference]:
    yield from closing(Reference(lib, tiny("llama")))


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlashMoEWarning)
        yield


def opened(path: Path, lib: Library, file: Path | bool, cache: str = "40%", **options: str) -> flashmoe.Model:
    return flashmoe.load(
        path, cache=cache, threads=1, n_ctx=CONTEXT, all_logits=True, library=lib, save_cache=file, **options
    )  # type: ignore[arg-type]


def run_exact(model: flashmoe.Model, reference: Reference) -> None:
    expected = reference.run(model.engine.n_ubatch, 1)
    tokens = prompt(expected.logits.shape[1])
    got = evaluate(model.engine, tokens, model.engine.n_ubatch, expected.decoded)
    assert (got.logits.view(np.int32) == expected.logits.view(np.int32)).all()


def arrived(model: flashmoe.Model) -> None:
    for _ in range(5000):
        if not (model.cache.warm and model.cache.warm.running):
            return
        time.sleep(0.001)
    raise AssertionError("it does not end")


def step(model: flashmoe.Model) -> None:
    for token in (1, 2, 3):
        model.engine.decode([token])


def contents(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(str(file), "np") as opened_file:
        names = opened_file.keys()
        return {name: opened_file.get_tensor(name) for name in names}, opened_file.metadata()


@pytest.mark.parametrize(
    ("policy", "prefetch"),
    [*product(("lru", "lfu-aged", "arc"), ("none", "table", "moe-infinity")), ("finemoe", "finemoe")],
)
def test_logits_are_the_same(
    policy: str, prefetch: str, lib: Library, tiny: Tiny, reference: Reference, tmp_path: Path
) -> None:
    """Cold, then warm in pools of other sizes, each going on from the last."""
    file = tmp_path / "cache.safetensors"
    for cache in ("40%", *CACHES):
        with opened(tiny("llama"), lib, file, cache, policy=policy, prefetch=prefetch) as model:
            assert (model.cache.warm is not None) == file.exists()
            if cache != "1":  # else requests come while it is read
                arrived(model)
            run_exact(model, reference)
        assert file.exists()
    assert not file.stat().st_mode & 0o077  # nobody else's


def test_the_same_experts_come_back(lib: Library, tiny: Tiny, reference: Reference, tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    with opened(tiny("llama"), lib, file) as model:
        run_exact(model, reference)
        before = model.cache.policy.residency.slot_of >= 0
        state = model.cache.policy.state()
    written = file.stat().st_mtime_ns
    with opened(tiny("llama"), lib, file) as model:
        arrived(model)
        assert ((model.cache.policy.residency.slot_of >= 0) == before).all()
        assert all((model.cache.policy.state()[name] == value).all() for name, value in state.items())
        assert model.stats["start"]["warm_experts"] == before.sum()
    assert file.stat().st_mtime_ns == written  # nothing was asked for: nothing to keep


def test_the_table_goes_on_learning(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    for occurrences in (30, 60):
        with opened(tiny("gpt-oss"), lib, file, "96%", prefetch="table") as model:
            assert model.prefetcher
            for token in range(30):
                model.engine.decode([token])
        arrays, _ = contents(file)
        assert arrays["predictor.table.row"][1].sum() == occurrences


def test_each_model_and_policy_has_a_file_of_its_own(
    lib: Library, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, policy in (("llama", "lru"), ("llama", "lfu"), ("phimoe", "lru"), ("llama", "lru")):
        with opened(tiny(name), lib, True, policy=policy) as model:
            step(model)
    found = sorted((tmp_path / "flashmoe" / "sessions").iterdir())
    files = [path.name for path in found if path.is_file()]
    assert len(files) == 3
    assert [path.with_suffix(".conversations") for path in found if path.is_file()] == [
        path for path in found if path.is_dir()
    ]
    assert [name.rpartition("-")[2] for name in files].count("lru.safetensors") == 2


def other_model(file: Path, tiny: Tiny, lib: Library) -> None:
    with opened(tiny("phimoe"), lib, file, policy="lru") as model:
        step(model)


def other_policy(file: Path, tiny: Tiny, lib: Library) -> None:
    with opened(tiny("llama"), lib, file, policy="lfu") as model:
        step(model)


def truncated(file: Path, *_: object) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def noise(file: Path, *_: object) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(5000))


def empty(file: Path, *_: object) -> None:
    file.write_bytes(b"")


def changed(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[..., None]:
    def apply(file: Path, *_: object) -> None:
        arrays, metadata = contents(file)
        change(arrays)
        save_file(arrays, file, metadata)

    return apply


@pytest.mark.parametrize(
    "spoil",
    [
        other_model,
        other_policy,
        truncated,
        noise,
        empty,
        changed(lambda a: a.pop("experts")),
        changed(lambda a: a.pop("policy.last")),
        changed(lambda a: a["experts"].fill(10_000)),
        changed(lambda a: a["experts"].fill(0)),  # the same expert many times
        changed(lambda a: a["experts"].fill(-2)),
        changed(lambda a: a.update(experts=a["experts"][:, :-1].copy())),
        changed(lambda a: a.update(experts=a["experts"].astype(np.int64))),
        changed(lambda a: a["step"].fill(-1)),
        changed(lambda a: a["accesses"].fill(1 << 62)),
        changed(lambda a: a["policy.last"].fill(np.nan)),
    ],
)
def test_a_file_that_does_not_fit_means_a_cold_start(
    spoil: Callable[..., None], lib: Library, tiny: Tiny, reference: Reference, tmp_path: Path
) -> None:
    file = tmp_path / "cache.safetensors"
    with opened(tiny("llama"), lib, file, policy="lru", prefetch="none") as model:
        step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlashMoEWarning)
        spoil(file, tiny, lib)
    with pytest.warns(FlashMoEWarning, match="starting cold") as caught:
        model = opened(tiny("llama"), lib, file, policy="lru", prefetch="none")
    assert len(caught) == 1
    assert str(file) in str(caught[0].message)
    with model:
        assert model.cache.warm is None
        assert not model.cache.policy.residency.step[0]
        run_exact(model, reference)
    with opened(tiny("llama"), lib, file, policy="lru", prefetch="none") as model:  # it was replaced
        assert model.cache.warm


def test_a_damaged_predictor_starts_cold_alone(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    with opened(tiny("llama"), lib, file, prefetch="moe-infinity") as model:
        step(model)
    changed(lambda a: a["predictor.moe-infinity.nearest"].fill(1 << 40))(file)
    with pytest.warns(FlashMoEWarning, match="moe-infinity"):
        model = opened(tiny("llama"), lib, file, prefetch="moe-infinity")
    with model:
        assert model.cache.warm
        step(model)
    with opened(tiny("llama"), lib, file, prefetch="table") as model:  # nothing in it for this one
        step(model)


def test_a_full_disk_is_a_warning(
    lib: Library, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cache.safetensors"
    with opened(tiny("llama"), lib, file) as model:
        step(model)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    model = opened(tiny("llama"), lib, file)
    step(model)
    with pytest.warns(FlashMoEWarning, match="No space left"):
        model.close()
    assert file.read_bytes() == before
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_on_the_command_line(demo: Path, cache_home: Path) -> None:
    run = ("run", "demo", "--cache", "25%", "-p", "Once", "-n", "4", "--temp", "0", "--save-cache")
    folder = cache_home / "flashmoe" / "sessions"
    first, second = command(*run), command(*run)
    assert first.out == second.out
    assert not first.status
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    file.write_bytes(b"damaged")
    with pytest.warns(FlashMoEWarning, match="starting cold") as caught:
        third = command(*run)
    assert third.out == first.out
    assert not third.status
    line = warnings.formatwarning(caught[0].message, FlashMoEWarning, "src.py", 1)
    assert line.startswith(f"warning: {file}: ")
    assert line.count("\n") == 1
