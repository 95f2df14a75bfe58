"""An architecture that comes with a new build of the library shows: as one that no test knows."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

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
    found = re.finditer(rb"(?<=\0)(\d+)(llama_model_([a-z0-9_]+))(?=\0)", library.read_bytes())
    return {plain(match[3].decode()) for match in found if int(match[1]) == len(match[2])}


def plain(name: str) -> str:
    return re.sub("[-_]", "", OTHER_NAMES.get(name, name))


def test_architectures_of_the_library(lib: Library) -> None:
    found = architectures(lib.path)
    tested = {plain(spec.arch) for spec in (*ARCHITECTURES.values(), *FAMILIES.values())}
    assert tested <= found, "tested architectures that this library does not have"
    if untested := found - tested - set(map(plain, WITHOUT_EXPERTS.split())):
        warnings.warn(f"architectures that no test knows: {', '.join(sorted(untested))}", stacklevel=1)
