"""A second start compiles nothing."""

from __future__ import annotations

import subprocess
import sys

SECOND_START = """
import numpy as np
from flashmoe.cache.policies import create
from flashmoe.cache.residency import make_residency
misses = 0
for name in ("lru", "lfu-aged"):
    policy = create(name)
    policy.bind(make_residency(2, 8, [4, 4]))
    policy.replay(np.arange(8, dtype=np.int16).reshape(2, 2, 2))
    policy.access(0, np.zeros(2, np.int32), *(np.zeros(2, np.int32) for _ in range(3)))
    misses += sum(sum(k.stats.cache_misses.values()) for k in (policy.kernels.access, policy.kernels.replay))
print(misses)
"""


def test_a_second_start_does_not_compile() -> None:
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", SECOND_START], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0", run.stderr
