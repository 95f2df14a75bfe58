"""`flashmoe learn` in a process of its own, which a server starts when it is idle: python -m flashmoe.learn.child.

Reads one JSON object from stdin: `model`, its identity, and `most_bytes` of memory, 0 for any. Writes one: the verdict,
or `error`. It has the lowest priority and one thread, and ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """See above."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(19)
    asked = json.load(sys.stdin)
    if most := asked["most_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    from flashmoe.cache.remembered import Remembered
    from flashmoe.errors import FlashMoEError
    from flashmoe.learn.remembered import learn

    try:
        found = learn(Remembered(asked["model"])).as_dict()
    except FlashMoEError as error:
        found = {"error": str(error)}
    except MemoryError:
        found = {"error": "training takes more memory than there is for it"}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
