"""Keeps for later sessions what a model's policy has learnt, and the routing that was seen."""

from __future__ import annotations

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.history import History
from flashmoe.cache.remembered import Remembered
from flashmoe.runtime.governor import Governor


class Learning:
    """Notes the routing of a session from here on, for what is remembered of the model."""

    def __init__(self, remembered: Remembered, cache: ExpertCache, governor: Governor | None) -> None:
        """governor: keeps the budget, where there is one."""
        self.remembered, self.governor = remembered, governor
        self._cache = cache
        self._begun = cache.recent.tokens
        cache.history = History(cache.recent)

    @property
    def tokens(self) -> int:
        """Decoded in this session."""
        return self._cache.recent.tokens - self._begun

    def keep_routing(self) -> int:
        """Put the routing since the last time to what is remembered, unless a step is under way; how many tokens there
        are then. From any thread."""
        new = self._cache.take_history()
        if new is not None:
            self.remembered.add_history(*new, self._cache.policy.residency.n_experts)
        known = self.remembered.history()
        return known.n_tokens if known else 0

    def keep(self) -> None:
        """At the end: all that the next session goes on from."""
        if self.tokens:
            self.remembered.keep(self._cache.policy)
            self.keep_routing()
