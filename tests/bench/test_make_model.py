"""Models of random weights in real shapes: they load, weigh what they should, and decode as stock llama.cpp does."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from flashmoe.bench.blocks import FORMATS
from flashmoe.bench.make_model import make_model
from flashmoe.bench.shapes import SHAPES, find_shape
from flashmoe.engines.llamacpp.library import find_library, open_library
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.errors import UsageError
from flashmoe.runtime.load import load

TOKENS = [1, 2, 3, 4]


@pytest.mark.parametrize("quant", FORMATS)
def test_blocks_have_zero_mean_and_the_wished_spread(quant: str) -> None:
    blocks = FORMATS[quant].fill(np.random.default_rng(0), 4000, 0.02)
    assert blocks.shape == (4000, FORMATS[quant].nbytes)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[quant])
    assert values.size == 4000 * FORMATS[quant].weights
    assert abs(values.mean()) < 0.0005
    assert values.std() == pytest.approx(0.02, rel=0.12)


@pytest.mark.parametrize(
    ("name", "quant"), [*((n, "Q4_0") for n in SHAPES), ("Qwen3-30B-A3B", "Q4_K"), ("gpt-oss-20b", "MXFP4")]
)
def test_every_shape_decodes(name: str, quant: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    steps: list[tuple[int, int]] = []
    nbytes = make_model(
        name, SHAPES[name].scaled(0.05), path, quant=quant, progress=lambda *step: steps.append(step)
    )
    assert nbytes == path.stat().st_size
    assert nbytes % 4096 == 0
    assert steps[-1][0] == steps[-1][1]
    lib = open_library(find_library())
    with load(path, cache="50%", n_ctx=64, threads=1, library=lib) as model:
        step = model.engine.n_ubatch
        batches = [TOKENS[i : i + step] for i in range(0, len(TOKENS), step)] + [[5]]
        for batch in batches:
            model.engine.decode(batch)
        ours = model.engine.logits()
    stock = StockModel(lib, path)
    context = stock.context(n_ctx=64, n_ubatch=64, threads=1)
    for batch in batches:
        assert context.decode(batch) == 0
    theirs = context.logits()
    context.close()
    stock.close()
    assert np.array_equal(ours, theirs)
    assert np.isfinite(ours).all()
    assert ours.std() > 0.1


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    name, shape = find_shape("olmoe-1b-7b")
    paths = [tmp_path / n for n in "abc"]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        make_model(name, shape.scaled(0.05), path, seed=seed)
    first, same, other = (path.read_bytes() for path in paths)
    assert first == same != other


def test_full_shapes_have_the_sizes_of_the_real_models() -> None:
    weights = {
        name: sum(int(np.prod(t.dims)) for t in shape.tensors()) / 1e9 for name, shape in SHAPES.items()
    }
    expected = {"OLMoE-1B-7B": 6.9, "DeepSeek-V2-Lite": 15.7, "Qwen3-30B-A3B": 30.5}
    expected |= {"gpt-oss-20b": 20.9, "gpt-oss-120b": 116.8}
    assert weights == pytest.approx(expected, rel=0.01)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose from OLMoE-1B-7B"):
        find_shape("llama")
    name, shape = find_shape("OLMoE-1B-7B")
    with pytest.raises(UsageError, match="--scale"):
        shape.scaled(2.0)
    with pytest.raises(UsageError, match="--quant"):
        make_model(name, shape.scaled(0.05), tmp_path / "m.gguf", quant="Q3")
    assert not list(tmp_path.iterdir())
