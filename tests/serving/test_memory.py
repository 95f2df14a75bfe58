"""The budget holds with the server: contexts, waiting conversations and batches of long prompts count in it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.test_memory import ControlGroup, control_group

__all__ = ["control_group"]  # a fixture

# four clients, prompts that fill most of the context, again and again
CLIENTS = """
import sys, threading
import flashmoe
from flashmoe.common import memory

with flashmoe.load("demo", ram=sys.argv[1], parallel=4, threads=1, prefetch="none", cache_type_v=sys.argv[2]) as model:
    server, n_ctx, made = model.server(), model.engine.n_ctx, []

    def client(number):
        for turn in range(3):
            prompt = [300 + (7 * number + 11 * turn + 13 * i) % 900 for i in range(n_ctx - 40 - 90 * (number % 2))]
            events = server.complete({"prompt": prompt, "n_predict": 24, "seed": number})
            made.append(sum(bool(event.get("choices")) for event in events))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("answers", len(made), "slots", model.engine.sequences, "misses", model.cache.stats["prefill"].misses)
    print("peak", memory.status_bytes("VmHWM"), "of", model.budget_bytes)
"""


def run(ram: str, types: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CLIENTS, ram, types]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("types", ["f16", "q8_0"])
def test_four_clients_with_long_prompts(types: str, control_group: ControlGroup) -> None:
    """In a control group of exactly the budget: the least that works for four slots, and a little more for them."""
    refused = run("1MiB", types)
    found = re.search(r"the smallest that works is (\d+)MiB", refused.stderr)
    assert found, refused.stderr
    limit = (int(found[1]) + 8) << 20
    control_group.limit(limit)
    done = run(f"{limit >> 20}MiB", types, preexec_fn=control_group.enter)
    assert done.returncode == 0, done.stderr
    assert control_group.oom_kills == 0
    answers = re.search(r"answers (\d+) slots (\d+) misses (\d+)", done.stdout)
    assert answers, done.stdout
    assert (answers[1], answers[2]) == ("12", "4")
    assert int(answers[3]) > 0
    peak = re.search(r"peak (\d+) of (\d+)", done.stdout)
    assert peak
    assert int(peak[1]) <= int(peak[2]) == limit
