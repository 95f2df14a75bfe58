"""What lies in the current folder is not run by processes of ours."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flashmoe.common.children import module_command


@pytest.mark.parametrize(
    "name", ["random.py", "numpy/__init__.py", "queue.py", "flashmoe.py", "sitecustomize.py"]
)
def test_modules_of_the_current_folder(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("open('touched', 'w'); raise SystemExit('mine')\n")
    command = module_command("flashmoe.cli", "--version")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout[:9]) == (0, "flashmoe "), done.stderr
    assert not (tmp_path / "touched").exists()
