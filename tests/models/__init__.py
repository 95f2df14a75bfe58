"""Tiny random MoE models in the GGUF format, one per trait that an expert cache must get right.

    make("olmoe", tmp_path / "m.gguf")         # any name in ARCHITECTURES
    split(tmp_path / "m.gguf", 3)              # the same model in three parts
    dense(tmp_path / "d.gguf")                 # a model without experts

`ARCHITECTURES[name].about` says in a line what it is there for; `python -m tests.models DIR` writes all.
"""

from .architectures import ARCHITECTURES
from .spec import Spec
from .writer import dense, make, split

__all__ = ["ARCHITECTURES", "Spec", "dense", "make", "split"]
