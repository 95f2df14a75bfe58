"""Write models into a folder: `python -m tests.models DIR [NAME ...]`; no name means all of them."""

import sys
from pathlib import Path

from . import ARCHITECTURES, make


def main() -> None:
    """Write the named models and print what each is for."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or ARCHITECTURES:
        path = make(name, folder / f"{name}.gguf")
        print(f"{path.stat().st_size:9,d}  {name:16s} {ARCHITECTURES[name].about}")


if __name__ == "__main__":
    main()
