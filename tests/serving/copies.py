"""Copies of a model file with other metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType as VType


def copy(
    source: Path,
    target: Path,
    *,
    add: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
    **metadata: Any,
) -> Path:
    """`source` with some of its metadata replaced ("__" for "."; "ARCH" for the architecture's name), as `target`.

    add: keys that it does not have; drop: keys to leave out.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    others = {name.replace("__", ".").replace("ARCH", architecture): v for name, v in metadata.items()}
    writer = gguf.GGUFWriter(target, "")
    writer.kv_data[0].clear()
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in drop:
            sub = field.types[-1] if field.types[0] == VType.ARRAY else None
            value = others.pop(field.name, field.contents())
            writer.add_key_value(field.name, value, field.types[0], sub_type=sub)
    assert not others, f"not in {source.name}: {', '.join(others)}"
    types = {bool: VType.BOOL, int: VType.UINT32, float: VType.FLOAT32, str: VType.STRING}
    for key, value in (add or {}).items():
        writer.add_key_value(key.replace("ARCH", architecture), value, types[type(value)])
    writer.data_alignment = reader.alignment
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
