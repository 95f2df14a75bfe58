"""Replay of routing traces through the policies of the runtime: hit rates before anything is bought or
downloaded."""

from flashmoe.simulate.replay import Row, simulate

__all__ = ["Row", "simulate"]
