"""Rewriting of routes: what may be replaced or left out, by what, and that nothing is where nothing is asked for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashmoe.errors import UsageError
from flashmoe.routing.approximation import LEVELS, Approximation, parse
from flashmoe.routing.rewrite import Rewriter, leave_out, substitute


class Token(NamedTuple):
    """A router's output for a token, in a layer of which some experts are resident."""

    logits: NDArray[np.float32]  # [E]
    ids: NDArray[np.int32]  # [k], the first first
    slot_of: NDArray[np.int32]  # [1, E]

    @property
    def probabilities(self) -> NDArray[np.float32]:
        made = np.exp(self.logits - self.logits.max())
        return (made / made.sum()).astype(np.float32)

    @property
    def resident(self) -> NDArray[np.bool_]:
        return self.slot_of[0] >= 0


@st.composite
def tokens(draw: st.DrawFn) -> Token:
    n = draw(st.integers(2, 24))
    k = draw(st.integers(1, min(n, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    logits = rng.normal(0, draw(st.sampled_from((0.1, 1.0, 4.0))), n).astype(np.float32)
    share = draw(st.sampled_from((0.0, 0.3, 0.6, 1.0)))
    slot_of = np.where(rng.random(n) < share, np.arange(n), -1).astype(np.int32)[np.newaxis]
    return Token(logits, np.argsort(-logits, kind="stable")[:k].astype(np.int32), slot_of)


def rewriter(token: Token, boost: float = 0.0, drop: float = 0.0) -> Rewriter:
    return Rewriter(Approximation("", "", boost, drop), 1, len(token.logits), len(token.ids))


def replace(made: Rewriter, token: Token, *, as_logits: bool) -> NDArray[np.int32]:
    """The token's ids after `substitute`."""
    ids, scores = token.ids.copy(), token.logits if as_logits else token.probabilities
    substitute(made.state, token.slot_of, 0, scores, as_logits, scores, as_logits, ids)
    return ids


def skip(made: Rewriter, token: Token, *, as_logits: bool) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The token's ids and gathered weights after `leave_out`."""
    ids, weights = token.ids.copy(), token.logits if as_logits else token.probabilities
    gathered = weights[ids]
    leave_out(made.state, token.slot_of, 0, weights, as_logits, ids, gathered)
    return ids, gathered


def spread(token: Token) -> float:
    """The range of the scores, of which the mean over one token is taken."""
    return float(token.logits.max() - token.logits.min())


def bounds(token: Token, boost: float) -> tuple[float, float]:
    """Below which a missing expert may go, and from which on a resident one may come."""
    others = np.delete(token.logits, token.ids)
    if not len(others):
        return -np.inf, np.inf
    best = float(others.max())
    return best + np.log1p(boost), best + np.log(1 - boost) if boost < 1 else -np.inf


@given(tokens(), st.sampled_from((0.05, 0.3, 5.0)), st.booleans())
def test_substitutes_are_resident_and_worth_it(token: Token, boost: float, as_logits: bool) -> None:
    made = rewriter(token, boost=boost)
    ids = replace(made, token, as_logits=as_logits)
    assert len(set(ids.tolist())) == len(ids)
    changed = np.flatnonzero(ids != token.ids)
    assert 0 not in changed  # the first
    assert token.resident[ids[changed]].all()
    assert not token.resident[token.ids[changed]].any()
    most, least = bounds(token, boost)
    slack = 1e-3 * (1 + boost) * (1 + spread(token))  # of float32 probabilities
    assert (token.logits[token.ids[changed]] < most + slack).all()
    assert (token.logits[ids[changed]] > least - slack).all()
    counted = made.rewritten
    assert (counted.routed, counted.replaced, counted.dropped) == (len(ids), len(changed), 0)
    assert 0 <= counted.mass <= 1
    # and what was not replaced had to stay
    advantage = boost * spread(token)
    for i in range(1, len(ids)):
        score = token.logits[ids[i]]
        if token.resident[ids[i]] or score >= most - slack:
            continue
        for e in set(np.flatnonzero(token.resident)) - set(ids.tolist()):
            assert token.logits[e] < least + slack or token.logits[e] + advantage <= score + slack


@given(tokens(), st.booleans())
def test_top_k_of_raised_scores(token: Token, as_logits: bool) -> None:
    """Within its bound it is what the paper has: residents and the first get LAMBDA ranges; the best k are taken."""
    boost = 0.25
    raised = token.logits.astype(np.float64)
    favoured = token.resident.copy()
    favoured[token.ids[0]] = True
    raised[favoured] += boost * spread(token)
    most, least = bounds(token, boost)
    fixed = np.zeros(len(raised), np.bool_)
    fixed[token.ids] = True
    raised[fixed & (token.logits >= most)] = np.inf
    raised[~fixed & (token.logits < least)] = -np.inf
    k = len(token.ids)
    order = np.argsort(-raised, kind="stable")
    near = [abs(token.logits - most).min(), abs(token.logits - least).min()]
    if k < len(order) and raised[order[k - 1]] < np.inf:
        near.append(raised[order[k - 1]] - raised[order[k]])
    if min(near) < 1e-4:
        return  # rounding decides
    ids = replace(rewriter(token, boost=boost), token, as_logits=as_logits)
    assert set(ids.tolist()) == set(order[:k].tolist())


@given(tokens(), st.sampled_from((0.3, 0.8, 1.0)), st.booleans())
def test_left_out(token: Token, drop: float, as_logits: bool) -> None:
    made = rewriter(token, drop=drop)
    ids, gathered = skip(made, token, as_logits=as_logits)
    k, weights = len(ids), token.probabilities[token.ids]
    changed = np.flatnonzero(ids != token.ids)
    nothing = -np.inf if as_logits else 0.0
    assert (gathered[changed] == nothing).all()
    kept = np.setdiff1d(np.arange(k), changed)
    before = (token.logits if as_logits else token.probabilities)[token.ids]
    assert np.array_equal(gathered[kept], before[kept])
    assert 0 not in changed  # the first
    assert len(set(ids.tolist())) == k
    assert token.resident[ids[changed]].all()
    assert not token.resident[token.ids[changed]].any()
    assert (weights[changed] / weights.sum() < drop / k + 1e-5).all()
    counted = made.rewritten
    assert (counted.replaced, counted.dropped) == (0, len(changed))
    assert counted.mass == pytest.approx(weights[changed].sum() / weights.sum(), abs=1e-5)


@given(tokens(), st.booleans())
def test_nothing_is_asked_for(token: Token, as_logits: bool) -> None:
    made = rewriter(token)
    assert np.array_equal(replace(made, token, as_logits=as_logits), token.ids)
    assert np.array_equal(skip(made, token, as_logits=as_logits)[0], token.ids)
    assert made.rewritten.mass == made.rewritten.replaced == made.rewritten.dropped == 0


@given(tokens())
def test_all_resident(token: Token) -> None:
    there = token._replace(slot_of=np.arange(len(token.logits), dtype=np.int32)[np.newaxis])
    made = rewriter(there, boost=10.0, drop=1.0)
    assert np.array_equal(replace(made, there, as_logits=True), there.ids)
    assert np.array_equal(skip(made, there, as_logits=True)[0], there.ids)


def test_experts_that_may_not_be_chosen() -> None:
    """A router that chooses among some groups gives the others' experts -inf."""
    logits = np.array([3, 2, 1, 0.9, 5, 5], np.float32)
    scores = np.where(np.arange(6) < 4, logits, -np.inf).astype(np.float32)
    slot_of = np.array([[0, 1, -1, 2, 3, 4]], np.int32)
    made = Rewriter(Approximation("", "", 1.0), 1, 6, 3)
    ids = np.array([0, 1, 2], np.int32)
    substitute(made.state, slot_of, 0, scores, True, logits, True, ids)
    assert ids.tolist() == [0, 1, 3]


def test_mean_range() -> None:
    made = Rewriter(Approximation("", "", 0.1), 2, 3, 1)
    for scores in ((0, 1, 4), (0, 1, 2)):
        row = np.array(scores, np.float32)
        substitute(
            made.state, np.full((2, 3), -1, np.int32), 1, row, True, row, True, np.array([2], np.int32)
        )
    assert made.state.mean_range.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("text", "boost", "drop"),
    [("cache:0.2", 0.2, 0), ("drop:.5", 0, 0.5), (" drop:0.5+cache:1 ", 1, 0.5), ("cache:0", 0, 0)],
)
def test_parsed(text: str, boost: float, drop: float) -> None:
    made = parse(text)
    assert made is not None
    assert (made.boost, made.drop) == (boost, drop)


def test_levels_are_known() -> None:
    assert [parse(level) is None for level in ("", "0", "none", *LEVELS)] == [True] * 3 + [False] * len(
        LEVELS
    )


def test_level_of_a_model() -> None:
    levels = {"1": "0", "2": "cache:0.3"}
    assert parse("1", levels) is None
    made = parse("2", levels)
    assert made is not None
    assert (made.text, made.rule, made.boost) == ("2", "cache:0.3", 0.3)


@pytest.mark.parametrize(
    "text", ["cache", "cache:", "cache:x", "4", "drop:2", "cache:11", "cache:1+cache:2", "cache:1,drop:1"]
)
def test_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--approx"):
        parse(text)
