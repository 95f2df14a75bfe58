"""A file of requests on many machines, with Ray Data: `flashmoe batch`, one actor a machine, each over a local file.

    pip install 'flashmoe-ssd[ray]'
    python examples/ray_batch.py /models/model.gguf in.jsonl out.jsonl --workers 4 --ram 24GiB --cpus 8

The model must be at the same path on every machine; requests and answers are as `flashmoe batch` has them, and only
they go over the network. `--cpus` is what Ray is told that a worker takes: all of a machine's, so that there is one on
each. A worker or a machine that dies is replaced by Ray, which asks its last requests again. A driver that dies begins
anew: `flashmoe batch` has a journal, this has none.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

import flashmoe
from flashmoe.common.files import write_atomically
from flashmoe.runtime.batch import answer
from flashmoe.runtime.batch_file import Line, Requests

PER_SLOT = 4  # requests of a task for each slot: at a task's end slots run empty


class Worker:
    """An actor: the model stays loaded from one task to the next."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self._model = flashmoe.load(model, **options)
        self._server = self._model.server()

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Columns of lines in, their numbers and results out."""
        columns = [column.tolist() for column in task.values()]
        lines = [Line(**dict(zip(task, row, strict=True))) for row in zip(*columns, strict=True)]
        with ThreadPoolExecutor(self._server.parallel + 4) as pool:
            results = pool.map(lambda line: json.dumps(answer(self._server, line)), lines)
            return {"number": task["number"], "result": list(results)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Answer a file of requests on the machines of a Ray cluster."
    )
    parser.add_argument("model")
    parser.add_argument("requests", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="machines")
    parser.add_argument("--cpus", type=float, default=1, help="of each worker, for Ray's scheduler")
    parser.add_argument("--parallel", type=int, default=8, help="sequences at once, on each worker")
    for name in ("ram", "cache"):
        parser.add_argument(f"--{name}", help="as of flashmoe batch, for each worker")
    for name in ("n_ctx", "threads"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="as of flashmoe.load")
    given = parser.parse_args()
    options = {name: getattr(given, name) for name in ("ram", "cache", "parallel", "n_ctx", "threads")}
    lines = [asdict(line) for line in Requests(given.requests)]
    answers = ray.data.from_items(lines).map_batches(
        Worker,
        fn_constructor_args=(given.model, options),
        batch_size=PER_SLOT * given.parallel,
        compute=ray.data.ActorPoolStrategy(size=given.workers),
        num_cpus=given.cpus,
    )
    results = {row["number"]: row["result"] for row in answers.iter_rows()}
    text = "".join(f"{results[line['number']]}\n" for line in lines)
    write_atomically(given.answers, text.encode())
    print(f"{len(results)} lines answered by {given.workers} workers")


if __name__ == "__main__":
    main()
