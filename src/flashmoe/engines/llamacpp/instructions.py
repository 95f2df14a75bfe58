"""Instruction sets: which one kernels are compiled for, and which one this processor has."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from flashmoe.common.machine import processor_flags


class Instructions(NamedTuple):
    """A set: its name for people, ggml's features and the kernel's flags (/proc/cpuinfo) that tell of it."""

    name: str
    features: frozenset[str]
    flags: frozenset[str]


#: The best first. AMX is none of them: llama.cpp multiplies no experts with it.
SETS = tuple(
    Instructions(name, frozenset(features.split()), frozenset(flags.split()))
    for name, features, flags in (
        ("AVX-512", "AVX512", "avx512f avx512cd avx512vl avx512dq avx512bw"),
        ("AVX-VNNI", "AVX_VNNI AVX2", "avx_vnni avx2"),
        ("AVX2", "AVX2", "avx2"),
        ("AVX", "AVX", "avx"),
        ("SVE and int8 products", "SVE MATMUL_INT8", "sve i8mm"),
        ("int8 products", "MATMUL_INT8 DOTPROD", "i8mm asimddp"),
        ("dot products", "DOTPROD", "asimddp"),
        ("NEON", "NEON", "asimd"),
    )
)


def compiled_for(features: Collection[str]) -> str:
    """The best set that kernels of these features of ggml's have; "" for none."""
    return next((x.name for x in SETS if x.features <= set(features)), "")


def better_here(features: Collection[str]) -> str:
    """The best set that this processor has, where kernels of these features lack it; else ""."""
    flags = processor_flags()
    best = next((x for x in SETS if x.flags <= flags), None)
    return best.name if best and not best.features <= set(features) else ""
