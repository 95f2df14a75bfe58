"""Which file of a safetensors checkpoint a tensor is read from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashmoe.errors import ModelError
from flashmoe.storage.checkpoint import CONFIG, INDEX, SINGLE, read_checkpoint


def write(folder: Path, files: dict[str, list[str]], index: dict[str, str] | None) -> Path:
    """A checkpoint of files with tensors of these names, and an index."""
    (folder / CONFIG).write_text("{}")
    for file, names in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({name: np.zeros(2, np.float32) for name in names}, folder / file)
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize(
    ("files", "index", "expected"),
    [
        # a repaired tensor, in a file before or behind the old one
        ({"m-1": ["a", "b"], "new": ["a"]}, {"a": "new", "b": "m-1"}, {"a": "new", "b": "m-1"}),
        ({"m-1": ["a", "b"], "a-new": ["a"]}, {"a": "a-new", "b": "m-1"}, {"a": "a-new", "b": "m-1"}),
        # a file that the index does not name
        ({"m-1": ["a"], "stray": ["a", "c"]}, {"a": "m-1"}, {"a": "m-1"}),
        # an index that is wrong about where a tensor is
        ({"m-1": ["a"], "m-2": ["b"]}, {"a": "m-2", "b": "m-2", "c": "m-1"}, {"a": "m-1", "b": "m-2"}),
        # a folder within
        ({"part/m-1": ["a"], "m-1": ["a"]}, {"a": "part/m-1", "b": "m-1"}, {"a": "part/m-1"}),
        # one file counts more than an index
        ({SINGLE: ["a"], "m-1": ["a", "b"]}, {"a": "m-1", "b": "m-1"}, {"a": SINGLE}),
    ],
)
def test_the_index_says_where_a_tensor_is(
    files: dict[str, list[str]], index: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    found = read_checkpoint(write(tmp_path, files, index))
    files_of = {name: tensor.file.relative_to(tmp_path) for name, tensor in found.tensors.items()}
    assert {name: str(file) for name, file in files_of.items()} == expected


def test_an_index_that_names_files_elsewhere(tmp_path: Path) -> None:
    for name in ("../m-1", "/m-1", "part/../../m-1"):
        with pytest.raises(ModelError, match="in another folder"):
            read_checkpoint(write(tmp_path, {}, {"a": name}))
