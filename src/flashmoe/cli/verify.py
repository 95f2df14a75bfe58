"""`flashmoe verify`: are a model's experts still what they were?"""

from __future__ import annotations

from pathlib import Path

from flashmoe.cli import options
from flashmoe.cli.progress import LoadProgress, stderr_console
from flashmoe.common.units import format_bytes
from flashmoe.errors import ModelError


def verify(
    model: options.Model,
    json_file: options.Json = None,
    quiet: options.Silent = False,
) -> None:
    """Verify the checksums of a model's experts; the first run computes them.

    They are stored in MODEL.flashsums next to the model, and `--verify` of other commands uses them, too. A pack
    (`flashmoe pack`) is compared with its own checksums. Exits with status 1 if anything differs.
    """
    from flashmoe.tools.integrity import verify as verify_model

    console = stderr_console(quiet)
    with LoadProgress(console) as progress:
        verdict = verify_model(model, progress.update)
    if json_file:
        json_file.write(verdict.as_dict())
    rate = f"{format_bytes(verdict.read_bytes)} in {verdict.seconds:.1f} s"
    if verdict.damaged:
        raise ModelError(_damage(verdict.model, verdict.damaged, "get the model again"))
    if verdict.pack and verdict.pack_damaged:
        raise ModelError(
            _damage(verdict.pack, verdict.pack_damaged, "make it again with `flashmoe pack MODEL`")
        )
    if verdict.written:
        console.print(
            f"{verdict.checksums}: checksums of {verdict.total_experts} experts written ({rate}); "
            "run with --verify to compare each when it is first read", highlight=False,
        )  # fmt: skip
    else:
        also = " and its pack" if verdict.pack else ""
        console.print(
            f"{verdict.model}{also}: all {verdict.total_experts} experts are as they were ({rate})",
            highlight=False,
        )


def _damage(path: Path, damaged: tuple[tuple[int, int, str], ...], then: str) -> str:
    layer, expert, name = damaged[0]
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return f"{path}: expert {expert} of layer {layer} ({name}){more} is not what it was; check the drive, and {then}"
