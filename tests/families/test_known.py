"""An architecture that comes with a new build of the library shows: as one that no test knows."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from flashmoe.engines.llamacpp.library import Library
from tests.models import ARCHITECTURES
from tests.models.families import FAMILIES

# No experts, or no language models
WITHOUT_EXPERTS = """
apertus arcee arwkv7 baichuan base bert bitnet bloom chameleon chatglm clef clip codeshell cogvlm cohere2 command_r
deci dflash dream eagle3 ernie4_5 eurobert exaone exaone4 falcon falcon_h1 gemma gemma2 gemma3 gemma3n
gemma4_assistant gemma_embedding gemma_embedding2 glm4 gpt2 gptneox granite_switch hrm_text hunyuan_dense hunyuan_vl
internlm2 jais jais2 jina_bert_v2 jina_bert_v3 lfm2 llada maincoder mamba mamba2 minicpm3 modern_bert mpt
muse_glimmer nanbeige nemotron nemotron_h neo_bert nomic_bert olmo olmo2 openelm orion paddleocr pangu_embed phi2 phi3
plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2vl qwen3 qwen35 qwen3tts qwen3vl refact rwkv6 rwkv6qwen2 rwkv7
seed_oss smollm3 spark2_5 stablelm starcoder starcoder2 t5 t5encoder talkie wavtokenizer_dec xverse
"""
OTHER_NAMES = {"gpt-oss": "openai_moe"}


def architectures(library: Path) -> set[str]:
    """Those that a library has a class of models for, without "-" and "_": names of types stay in the file."""
    content = library.read_bytes()
    found = re.finditer(rb"llama_model_([a-z0-9_]+)\0", content)
    sized = (
        (match, b"\0%d" % (len(match[0]) - 1)) for match in found
    )  # a type's name comes after its length
    return {plain(match[1].decode()) for match, size in sized if content.endswith(size, 0, match.start())}


def plain(name: str) -> str:
    return re.sub("[-_]", "", OTHER_NAMES.get(name, name))


def report_untested(found: set[str]) -> None:
    """Warnings are in the summary of every test run."""
    tested = {plain(spec.arch) for spec in (*ARCHITECTURES.values(), *FAMILIES.values())}
    assert tested <= found, "tested architectures that this library does not have"
    if untested := found - tested - set(map(plain, WITHOUT_EXPERTS.split())):
        warnings.warn(f"untested architectures: {', '.join(sorted(untested))}", stacklevel=1)


def test_architectures_of_the_library(lib: Library) -> None:
    report_untested(architectures(lib.path))


def test_a_new_architecture_shows(lib: Library, tmp_path: Path) -> None:
    newer = tmp_path / "libllama.so"
    newer.write_bytes(
        lib.path.read_bytes() + b"\0" + b"23llama_model_brand_new_9\0" + b"\0llama_model_load\0"
    )
    with pytest.warns(UserWarning, match="untested architectures: .*brandnew9"):
        report_untested(architectures(newer))
    assert "load" not in architectures(newer)
