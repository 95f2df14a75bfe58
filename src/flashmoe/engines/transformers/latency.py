"""Decides whether an expert in RAM is copied to the device or computed by the CPU: what costs less time.

After Fiddler (arXiv:2402.07033), with the times measured at the start. One addition: there is a cache on the device, so
a copy is worth more than the step that it is made for. What the CPU has spent on an expert is therefore remembered, and
when it has paid for the copy the expert is copied (ski rental: at most twice the time of who knows the future).
"""

from __future__ import annotations

import bisect
import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOKENS = (1, 2, 4, 8, 16)
_TURNS = 3


class Where(enum.Enum):
    """How an expert that is in RAM only gets computed."""

    COPY = "copy"
    COMPUTE = "compute"


@dataclass(frozen=True)
class Latency:
    """Seconds for one expert: of a copy to the device, and of computing it there and on the CPU."""

    copy: float
    device: float
    #: (tokens, seconds) by ascending tokens, at least one.
    host: tuple[tuple[int, float], ...]

    def host_seconds(self, n_tokens: int) -> float:
        """Of computing an expert for `n_tokens` tokens on the CPU; straight between what was measured, and beyond."""
        points = self.host
        if len(points) == 1 or n_tokens <= points[0][0]:
            return points[0][1]
        i = min(bisect.bisect_left([n for n, _ in points], n_tokens), len(points) - 1)
        (n0, s0), (n1, s1) = points[i - 1], points[i]
        return s0 + max(0.0, s1 - s0) * (n_tokens - n0) / (n1 - n0)

    def choose(self, n_tokens: int, paid: float = 0.0) -> Where:
        """For `n_tokens` tokens of an expert on which the CPU has spent `paid` seconds since it was last copied."""
        computed = self.host_seconds(n_tokens) + paid
        return Where.COMPUTE if computed < self.copy + self.device else Where.COPY


def measure(
    copy: Callable[[], None], device: Callable[[], None], host: Callable[[int], None], tokens: Sequence[int]
) -> Latency:
    """Time the three: each returns when its work is done; `host` gets a number of tokens. The best of some turns."""

    def best(work: Callable[[], None]) -> float:
        work()  # first touches and compilations are not what is asked for
        times = []
        for _ in range(_TURNS):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    return Latency(best(copy), best(device), tuple((n, best(lambda n=n: host(n))) for n in tokens))  # type: ignore[misc]
