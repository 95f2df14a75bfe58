"""What needs downloads and minutes: exactness on other builds of llama.cpp, and on kernels compiled here.

python -m tests.builds. The builds are wheels, fetched with pip into folders that are thrown away; one that cannot be
fetched is skipped. The installed build is not among them: the suite is about that, and its kernels, compiled for this
processor, are what tests/builder/real.py is about.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

#: The oldest that is known, which has no llama_version() and maps files by a flag; and one between it and the latest.
BUILDS = ("2026.7.9873", "2026.9.11063")
ARCHITECTURES = (
    "llama", "olmoe", "qwen2moe", "deepseek2", "gpt-oss", "qwen3moe", "glm4moe", "granitemoe", "phimoe", "nvfp4",
)  # fmt: skip
LAYOUTS = ("plain", "repacked")
#: For pytest: on all cores.
SPREAD = ("-n", "logical", "--maxprocesses", "4")
ROOT = Path(__file__).parents[1]


def exact_cases(layouts: Sequence[str] = LAYOUTS) -> list[str]:
    """The exactness tests of the ten architectures, each of them with three pools."""
    exact = "tests/engines/test_exact.py::test_logits_equal_stock"
    return [f"{exact}[{name}-{layout}]" for name in ARCHITECTURES for layout in layouts]


def fetch(version: str, folder: str) -> str:
    """Unpack a wheel of xllamacpp into a folder; why that is not possible, or nothing."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--target",
        folder,
    ]
    done = subprocess.run([*pip, f"xllamacpp=={version}"], capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["pip failed"])[-1] if done.returncode else ""


def test(folder: str) -> int:
    """Run the self-test, which has the library's server answer too, and the exactness tests; the exit status."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([folder, str(ROOT / "src")]),
        "GGML_NO_BACKTRACE": "1",
    }
    library = Path(folder) / "xllamacpp/xllamacpp.abi3.so"
    if status := subprocess.run(
        [sys.executable, "-m", "flashmoe.tools.self_test", library], env=env
    ).returncode:
        return status
    return subprocess.run(
        [sys.executable, "-m", "pytest", *SPREAD, *exact_cases()], cwd=ROOT, env=env
    ).returncode


def main() -> int:
    failed = False
    for version in BUILDS:
        with tempfile.TemporaryDirectory() as folder:
            if reason := fetch(version, folder):
                print(f"xllamacpp {version}: skipped, it cannot be fetched ({reason})", flush=True)
                continue
            print(f"xllamacpp {version}", flush=True)
            failed |= test(folder) != 0
    print("kernels that are compiled here", flush=True)
    real = [sys.executable, "-m", "pytest", "-rs", "-o", "timeout=900", "tests/builder/real.py"]
    failed |= subprocess.run(real, cwd=ROOT).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
