"""From a prompt's text to text: tokenizers of both kinds, the command line, a trace, reports, a saved cache."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from typer.testing import CliRunner

import flashmoe
from flashmoe.cli import make_app
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.transformers.tokens import open_tokenizer, token_bytes
from flashmoe.routing.trace import RoutingTrace
from tests.engines.transformers.conftest import Checkpoints

TEXT = "A cät sat — on 1 mat."
GREEDY = SamplingParams(temperature=0)


def byte_level() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def metaspace() -> tokenizers.Tokenizer:
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Actsaonm1."]
    model = models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def save(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        folder
    )


@pytest.mark.parametrize("kind", [byte_level, metaspace])
def test_bytes_of_tokens(kind: type, tmp_path: Path) -> None:
    save(kind(), tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, i, False) for i in ids).decode() == TEXT
    end = tokenizer.eos_token_id
    assert token_bytes(tokenizer, end, False) == b""
    assert token_bytes(tokenizer, end, True) == b"<end>"
    assert token_bytes(tokenizer, 100_000, False) == b""


@pytest.fixture(scope="module")
def spoken(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    import torch

    from tests.engines.transformers.models import make_checkpoint

    folder = tmp_path_factory.mktemp("spoken")
    make_checkpoint("olmoe", folder, torch.bfloat16, shape={"vocab_size": 300})
    save(byte_level(), folder)
    return folder


def test_run(spoken: Path, tmp_path: Path) -> None:
    command = [
        "run", str(spoken), "--engine", "transformers", "-p", TEXT, "-n", "8", "--temp", "0.7", "-s", "3",
        "--cache", "50%", "-t", "1", "--json", str(tmp_path / "r.json"), "--trace", str(tmp_path / "t.safetensors"),
    ]  # fmt: skip
    texts = []
    for _ in range(2):
        result = CliRunner().invoke(make_app(), command)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["model"] == spoken.name
        texts.append(report["text"])
    assert texts[0] == texts[1]  # the same seed
    assert len(RoutingTrace.load(tmp_path / "t.safetensors").token_id) >= len(TEXT.encode())


def test_a_chat_begins_once(spoken: Path, tmp_path: Path) -> None:
    """The tokenizer writes the token that a text begins with, and so does the template, as Llama's and Mixtral's."""
    folder = Path(shutil.copytree(spoken, tmp_path / "begins"))
    made = byte_level()
    begin = 299
    made.add_special_tokens([f"<{i}>" for i in range(made.get_vocab_size(), begin)] + ["<s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    with flashmoe.load(folder, engine="transformers", cache="50%", threads=1, trace=True) as model:
        list(model.chat([{"role": "user", "content": "AAA"}], max_tokens=1))
        assert model.recorder
        seen = model.recorder.trace().token_id.tolist()
    assert seen[0] == begin
    assert seen.count(begin) == 1
    assert len(seen) == 4


def test_interrupt_stops_cleanly(spoken: Path) -> None:
    """Ctrl-C in the middle of a generation: the text so far, the report, and no traceback."""
    command = [
        sys.executable, "-m", "flashmoe.cli", "run", str(spoken), "--engine", "transformers", "-p", TEXT,
        "--cache", "1", "-t", "1", "--prefetch", "none", "--seed", "1",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    assert b"Exception" not in err
    if b"(stopped)" in err:  # else it had come to its end
        assert out.endswith(b"\n")
        assert b"tokens/s" in err
    assert process.returncode in (0, 130)


def test_budget(spoken: Path) -> None:
    with flashmoe.load(spoken, engine="transformers", ram="3GiB", threads=1) as model:
        assert "".join(model.generate(TEXT, max_tokens=4, sampling=GREEDY))
        assert model.budget_bytes == 3 << 30


def test_saved_cache(spoken: Path, tmp_path: Path) -> None:
    file = tmp_path / "saved.safetensors"
    for warm in (False, True):
        with flashmoe.load(spoken, engine="transformers", cache="50%", threads=1, save_cache=file) as model:
            assert (model.cache.warm is not None) is warm
            assert "".join(model.generate(TEXT, max_tokens=4, sampling=GREEDY))


def test_without_a_tokenizer(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("olmoe")
    result = CliRunner().invoke(
        make_app(), ["run", str(folder), "--engine", "transformers", "-p", "x", "--cache", "50%", "-t", "1"]
    )
    assert "has no tokenizer" in str(result.exception)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(flashmoe.errors.ModelError, match="the tokenizer cannot be read"):
        flashmoe.load(copy, engine="transformers", cache="50%", threads=1)
