"""Tries modules of kernels in child processes, where they may crash: what ggml thinks of them, and how fast they are.

python -m flashmoe.tools.kernels.trial LIBRARY [MODULE] measures, and prints the rates as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flashmoe.common.children import module_command
from flashmoe.common.machine import cores
from flashmoe.engines.llamacpp.library import open_library
from flashmoe.engines.llamacpp.speed import expert_rates
from flashmoe.engines.llamacpp.tested import Proof, ended_by, self_test
from flashmoe.errors import FlashMoEError

_SCORE = (
    "import ctypes, sys; module = ctypes.CDLL(sys.argv[1]); "
    "print(module.ggml_backend_score() if hasattr(module, 'ggml_backend_score') else 1)"
)
_TIMEOUT = 120
_TURNS = (
    2  # measurements of each, one after the other: a virtual machine's speed changes from second to second
)
_TYPES = ("Q4_0", "Q4_K")


@dataclass(frozen=True)
class Trial:
    """A module that was tried: whether it works, and its speeds in proportion to the library's own kernels."""

    name: str
    module: Path
    proof: Proof
    decode_ratio: float = 0.0
    prompt_ratio: float = 0.0

    @property
    def ratio(self) -> float:
        """Of both together, to choose by."""
        return (self.decode_ratio * self.prompt_ratio) ** 0.5


def score(module: Path) -> int:
    """What ggml thinks of a module on this processor: more is better; 0 for one that does not run here."""
    command = [sys.executable, "-I", "-c", _SCORE, str(module)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
        return int(_last_line(child.stdout)) if child.returncode == 0 else 0
    except (subprocess.TimeoutExpired, ValueError):  # it hangs, or ends the process by itself
        return 0


def _last_line(text: str) -> str:
    """What a child has to say, after what a module says when it is loaded."""
    return (text.splitlines() or [""])[-1]


def timed(library: Path, trials: Sequence[Trial]) -> list[Trial]:
    """The trials with their speeds; one that crashes meanwhile does not work.

    Raises FlashMoEError where the library's own kernels cannot be timed.
    """
    if not any(trial.proof.plain for trial in trials):
        return list(trials)
    own_repacked = self_test(library).repacked
    rates: dict[Path | None, list[dict[str, float]]] = {}
    failures: dict[Path, str] = {}
    for _ in range(_TURNS):
        for module, repack in [
            (None, own_repacked),
            *((x.module, x.proof.repacked) for x in trials if x.proof.plain),
        ]:
            measured = _measure(library, module, repack)
            if isinstance(measured, str):
                if module is None:
                    raise FlashMoEError(f"the library's own kernels cannot be timed ({measured}); try again")
                failures[module] = measured
            else:
                rates.setdefault(module, []).append(measured)
    own = _best(rates[None])
    made = []
    for trial in trials:
        if trial.module in failures:
            trial = replace(trial, proof=Proof(False, False, failures[trial.module]))
        elif trial.module in rates:
            best = _best(rates[trial.module])
            of = {
                phase: statistics.geometric_mean(
                    best[f"{kind} {phase}"] / own[f"{kind} {phase}"] for kind in _TYPES
                )
                for phase in ("decode", "prompt")
            }
            trial = replace(trial, decode_ratio=of["decode"], prompt_ratio=of["prompt"])
        made.append(trial)
    return made


def _best(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: max(turn[name] for turn in turns) for name in turns[0]}


def _measure(library: Path, module: Path | None, repack: bool) -> dict[str, float] | str:
    """Rates in a child, or why there are none."""
    given = [str(library), *([str(module)] if module else []), *([] if repack else ["plain"])]
    command = module_command("flashmoe.tools.kernels.trial", *given)
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return "no answer"
    if child.returncode:
        return ended_by(child.returncode, child.stderr)
    try:
        found: dict[str, float] = json.loads(_last_line(child.stdout))
    except ValueError:
        return "ended before its time"
    return found


def main(arguments: list[str]) -> None:
    """Measure in this process: for each type and phase the faster of the layouts, as `--layout auto` would choose."""
    plain_only = arguments[-1] == "plain"
    library, *module = arguments[:-1] if plain_only else arguments
    lib = open_library(Path(library), Path(module[0]) if module else None)
    rates: dict[str, float] = {}
    for kind in _TYPES:
        for repack in (False,) if plain_only else (False, True):
            found = expert_rates(lib, kind, cores(), repack=repack)
            for phase, rate in found._asdict().items():
                rates[f"{kind} {phase}"] = max(rate, rates.get(f"{kind} {phase}", 0.0))
    print(json.dumps(rates))


if __name__ == "__main__":
    main(sys.argv[1:])
