"""One server, and one model behind the front, for all tests of what is answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

import flashmoe
from flashmoe.runtime.model import Model
from tests.server.front import Backend, Running, fronted
from tests.server.process import ServerProcess, serving


@pytest.fixture(scope="session")
def pool(demo: Path) -> Iterator[Model]:
    """A model with an expert pool, for the front's figures."""
    with flashmoe.load(demo, cache="50%", threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def front(pool: Model, backend: Backend) -> Iterator[Running]:
    """Over the module's own `backend`."""
    with fronted(pool, backend) as running:
        yield running


@pytest.fixture(scope="session")
def server(demo: Path) -> Iterator[ServerProcess]:
    with serving(demo, "--cache", "50%", "--parallel", 3, "--prefetch", "gate") as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client
