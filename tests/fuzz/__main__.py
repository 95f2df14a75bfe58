"""`python -m tests.fuzz [--files 20000] [--seed 0] [--only NAME]`: a report per target; files that break are kept."""

from __future__ import annotations

import argparse
import os
import random
import resource
import tempfile
import traceback
from pathlib import Path

# before anything is compiled: an index out of range raises, and such kernels are nobody else's
os.environ["NUMBA_BOUNDSCHECK"] = "1"
os.environ["NUMBA_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"flashmoe-fuzz-{os.getuid()}")

from tests.fuzz.check import Hang, attempt  # noqa: E402
from tests.fuzz.targets import targets  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="changed files altogether")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name contains this")
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-failures"), help="folder for files that break"
    )
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = {n: t for n, t in targets(folder).items() if options.only in n}
        if not chosen:
            parser.error(f"no target's name contains {options.only!r}")
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        each = -(-options.files // len(chosen))
        for title, target in chosen.items():
            (folder / target.name).write_bytes(target.seed)
            target.read(folder / target.name)  # compiles what there is to compile
            rng = random.Random(f"{options.seed} {title}")
            refused, slowest, peak, broken = 0, 0.0, 0, 0
            for i in range(each):
                data = target.change(rng)
                try:
                    outcome = attempt(target, data, folder)
                except (Exception, Hang):
                    broken += 1
                    options.keep.mkdir(parents=True, exist_ok=True)
                    place = options.keep / f"{title.replace(' ', '-').replace(',', '')}-{i}-{target.name}"
                    place.write_bytes(data)
                    if broken <= 3:
                        print(f"{place}:\n{traceback.format_exc(limit=-4)}")
                else:
                    refused += outcome.refused
                    slowest, peak = max(slowest, outcome.seconds), max(peak, outcome.peak)
            bad += broken
            print(
                f"{title}: {each} files, {refused} refused, {each - refused - broken} read, {broken} broke; "
                f"at most {slowest:.2f} s and {peak / 2**20:.1f} MiB",
                flush=True,
            )
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - used
        print(f"{each * len(chosen)} files, {bad} broke; the process grew by at most {grown / 2**20:.0f} MiB")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
