"""The script for machines with a GPU, on the host as a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashmoe.engines.transformers import device as devices

SCRIPTS = Path(__file__).parents[3] / "scripts"


def test_gpu_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(devices, "open_device", devices.open_device)  # put back afterwards
    import gpu_tiers

    report, figure = tmp_path / "r.json", tmp_path / "t.png"
    rows = gpu_tiers.main(
        [str(tmp_path), "--device", "cpu", "--tiny", "--tokens", "16", "--ram", "3GiB", "--json", str(report),
         "--plot", str(figure)]
    )  # fmt: skip
    assert [(row["shape"], row["vram"]) for row in rows] == [
        (shape, vram) for shape in ("tiny-olmoe", "tiny-qwen3") for vram in ("25%", "50%")
    ]
    for row in json.loads(report.read_text()):
        assert row["vram_hits_share"] + row["ram_hits_share"] + row["ssd_misses_share"] == pytest.approx(1)
        assert row["tokens_per_second"] > 0 < row["accelerate"]["tokens_per_second"]
        assert row["tokens"][:2] == row["accelerate"]["tokens"]
        assert all(0 <= span["start_ms"] <= span["end_ms"] for span in row["timeline"])
        assert row["overlap"] == 0  # the host's copies are done before anything else
        assert row["pcie_ceiling_gb_per_s"] > 0
    kinds = {span["kind"] for row in rows for span in row["timeline"]}
    assert kinds >= {gpu_tiers.COPY, gpu_tiers.GPU}
    assert figure.stat().st_size > 1000
