"""A numba that has changed what FlashMoE relies on: an error that says what to do, or compiling at every start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe.common import numba_internals

SOURCE = Path(numba_internals.__file__).parents[2]

ARRAYS = """
from numba.core.datamodel import models
class ArrayModel(models.StructModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, [("data", models.types.CPointer(kind.dtype)), ("nitems", models.types.intp)])
from numba.core.datamodel import default_manager
default_manager.register(models.types.Array, ArrayModel)
"""
OPTIONS = """
from numba.core import cpu
class CPUTargetOptions:
    fastmath = nogil = forceinline = None
cpu.CPUTargetOptions = CPUTargetOptions
"""
ADDRESSES = """
from numba.core.codegen import JITCodeLibrary
del JITCodeLibrary.get_pointer_to_function
"""
MODULES = """
import numba.core.caching
del numba.core.caching.FunctionCache
"""
RUN = """
import sys
from flashmoe.cli import main
sys.argv = ["flashmoe", "run", "demo", "-p", "a"]
main()
"""


def python(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"  # numba keeps code of files only
    program.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "NUMBA_CACHE_DIR": str(folder / "kept")}
    return subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (ARRAYS, "arrays in compiled code"),
        (OPTIONS, "options of the compiler"),
        (ADDRESSES, "addresses of compiled functions"),
        (MODULES, "its modules"),
    ],
)
def test_what_kernels_cannot_do_without(change: str, what: str, tmp_path: Path) -> None:
    done = python("import numba\n" + change + RUN, tmp_path)
    assert done.returncode == 1
    message = " ".join(done.stderr.split())
    assert "has changed " + what in message
    assert "pip install 'numba" in message
    assert "Traceback" not in message


STAMP = """
from numba.core.caching import IndexDataCacheFile
IndexDataCacheFile.__init__ = lambda self, cache_path, filename_base, source_stamp: None
"""
KEY = """
from numba.core.caching import FunctionCache
FunctionCache._index_key = lambda self, signature: None
"""
CALLBACKS = """
from numba.core.ccallback import CFunc
made = CFunc.__init__
CFunc.__init__ = lambda self, function, signature, **options: made(self, function, signature, **options)
"""
COMPILE = """
import logging
logging.basicConfig(format="%(message)s")
from flashmoe.common.kept import kept, kept_callback
@kept()
def twice(x):
    return 2 * x
@kept_callback("int64(int64)")
def more(x):
    return twice(x) + 1
print(twice(3), more.ctypes(4))
"""


@pytest.mark.parametrize("change", ["", STAMP, KEY, CALLBACKS])
def test_a_cache_on_disk_that_is_not_known(change: str, tmp_path: Path) -> None:
    done = python(change + COMPILE, tmp_path)
    assert done.stdout.split() == ["6", "9"], done.stderr
    assert ("every start compiles afresh" in done.stderr) == bool(change)
    assert bool(list(tmp_path.rglob("*.nbi"))) != bool(change)


def test_this_numba_is_known() -> None:
    assert numba_internals.KEEPS
