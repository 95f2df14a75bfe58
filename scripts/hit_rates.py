"""Make `hit_rates.json`, from which `flashmoe plan` takes the hit rates it expects.

python scripts/hit_rates.py MODEL=TRACE... -o src/flashmoe/data/hit_rates.json
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from flashmoe.common.files import write_atomically
from flashmoe.routing.files import read
from flashmoe.simulate.curve import dump, hit_curve
from flashmoe.storage.hub import default_policy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", metavar="MODEL=TRACE")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    curves = []
    for item in options.traces:
        model, _, path = item.partition("=")
        curves.append(replace(hit_curve(read(path), Path(path).stem, default_policy("")), model=model))
        print(curves[-1])
    write_atomically(options.output, dump(curves).encode())


if __name__ == "__main__":
    main()
