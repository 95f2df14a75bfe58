"""The transformers engine against plain transformers with eager experts: equal to the last bit, at every pool size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

import flashmoe
from flashmoe.engines.base import SamplingParams
from flashmoe.errors import BudgetError
from tests.engines.transformers.conftest import Checkpoints
from tests.engines.transformers.models import ARCHITECTURES, VOCABULARY, make_checkpoint, plain

PROMPT = [(7 * i + 3) % VOCABULARY for i in range(11)]
TOKENS = 12
OTHER_SUMS = ("inkling2_text", "nemotron_h")  # add their experts up in another type than they return
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def check(folder: Path, caches: tuple[str, ...]) -> None:
    reference = plain(folder)
    prompt = torch.tensor([PROMPT])
    with torch.inference_mode():
        logits = reference(prompt).logits[0].float().numpy()
        tokens = reference.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    for cache in caches:
        with flashmoe.load(
            folder, engine="transformers", cache=cache, threads=1, all_logits=True, n_ctx=128
        ) as model:
            model.decoder.evaluate(PROMPT, decode=False)
            for i, row in enumerate(logits):
                assert np.array_equal(model.engine.logits(i), row), (cache, i)
            # the library's own generate
            with torch.inference_mode():
                made = model.model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)
            assert made[0].tolist() == tokens, cache
            # and ours, the prompt's last token giving the first
            made_here = model.start(PROMPT, max_tokens=TOKENS, sampling=SamplingParams(temperature=0))
            while not made_here.finished:
                made_here.step()
            assert PROMPT + made_here.made == tokens, cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in OTHER_SUMS])
def test_logits_and_tokens(name: str, dtype: str, checkpoint: Checkpoints) -> None:
    check(checkpoint(name, DTYPES[dtype]), ("1", "40%", "100%"))


def test_f16(checkpoint: Checkpoints) -> None:
    check(checkpoint("olmoe", torch.float16), ("1", "100%"))


@pytest.mark.parametrize("name", OTHER_SUMS)
def test_experts_added_in_another_type(name: str, checkpoint: Checkpoints) -> None:
    """One of them, inkling2_text, keeps gate and up interleaved in its checkpoints: they are sorted on the way in."""
    folder = checkpoint(name)
    check(folder, ("60%", "100%"))
    with (
        flashmoe.load(folder, engine="transformers", cache="1", threads=1) as model,
        pytest.raises(BudgetError, match="do not fit into the pool at once"),
    ):
        model.decoder.evaluate(PROMPT, decode=False)


@pytest.mark.parametrize("check_dims", [False, True])
def test_transposed_experts(check_dims: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints that keep experts transposed: a mapping of the library's, as some of its larger models have."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    conversion_mapping.get_checkpoint_conversion_mapping("olmoe")  # fills the library's table
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    mapping = [
        WeightConverter(name, name, operations=[Transpose(1, 2, check_dims=check_dims)]) for name in names
    ]
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "olmoe", mapping)  # type: ignore[arg-type]
    # down is square: whether it is to be transposed cannot be seen, and it is not
    folder = make_checkpoint("olmoe", tmp_path, torch.float32, shape={"intermediate_size": 64})
    with safetensors.safe_open(str(folder / "model.safetensors"), "pt") as file:
        shape = file.get_slice("model.layers.0.mlp.experts.gate_up_proj").get_shape()
    assert shape == ([12, 128, 64] if check_dims else [12, 64, 128])
    check(folder, ("1", "50%"))


def test_several_files(tmp_path: Path) -> None:
    """Shards end between an expert's tensors: then its parts are joined in memory."""
    folder = make_checkpoint("olmoe", tmp_path, torch.float32, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    check(folder, ("1", "50%"))


def test_prompt_in_micro_batches(checkpoint: Checkpoints) -> None:
    """A prompt in pieces is what the library computes in the same pieces; and what was said can be taken back."""
    folder = checkpoint("qwen3_moe", torch.float32)
    reference = plain(folder)
    with torch.inference_mode():
        first = reference(torch.tensor([PROMPT[:4]]), use_cache=True)
        second = reference(
            torch.tensor([PROMPT[4:8]]), past_key_values=first.past_key_values, logits_to_keep=1
        ).logits[0, -1]
    with flashmoe.load(folder, engine="transformers", cache="30%", threads=1, n_ubatch=4) as model:
        made = model.start(PROMPT[:8], max_tokens=1, sampling=SamplingParams(temperature=0))
        while not made.finished:
            made.step()
        assert np.array_equal(model.engine.logits(), second.numpy())
        assert model.engine.rewind(4) == 4
        model.decoder.evaluate(PROMPT[4:8], decode=False)
        assert np.array_equal(model.engine.logits(), second.numpy())
        assert model.engine.rewind(0) == 0


def test_experts_get_no_memory_of_their_own(checkpoint: Checkpoints) -> None:
    folder = checkpoint("olmoe")
    with flashmoe.load(folder, engine="transformers", cache="25%", threads=1) as model:
        assert type(model.model) is type(plain(folder))
        names = [name for name, _ in model.model.named_parameters()]
        assert names
        assert not [name for name in names if "experts" in name]
        assert model.cache.policy.residency.n_slots < model.catalog.total_experts
