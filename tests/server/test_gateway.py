"""A short run of tests/server/gateway.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.gateway import alone, through_the_gateway

CONVERSATIONS = 4


def test_a_worker_is_killed_and_started_again(demo: Path) -> None:
    """No request is lost, turns find their conversations, and texts are those of a single worker."""
    pytest.importorskip("smg", reason="smg is not installed")
    journey = through_the_gateway(demo, CONVERSATIONS, 2)
    expected = alone(demo, CONVERSATIONS)
    assert [[turn.text for turn in turns] for turns in journey.found] == [
        [t.text for t in one] for one in expected
    ]
    assert not journey.moved()
    assert len(journey.by_worker()) > 1
