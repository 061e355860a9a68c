"""Every diagnostic of a step against its formula, token by token in plain python."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo import diagnostics
from shared.algo.loss_report import BY_MINIBATCH, by_minibatch
from shared.algo.losses import clip_causes


@dataclass
class Token:
    log_r: float
    seq: int
    version: int
    adv: float


NOW = 9
TOKENS = st.lists(
    st.builds(
        Token,
        log_r=st.floats(-3, 3),
        seq=st.integers(0, 3),
        version=st.integers(3, NOW),
        adv=st.sampled_from([-2.0, -0.5, 0.0, 0.7]),
    ),
    min_size=1,
    max_size=12,
)


def column(tokens: Sequence[Token], name: str) -> torch.Tensor:
    kind = torch.float64 if name in ("log_r", "adv") else torch.int64
    return torch.tensor([getattr(token, name) for token in tokens], dtype=kind)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the order statistics."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def sequences(tokens: Sequence[Token]) -> list[list[Token]]:
    return [[x for x in tokens if x.seq == s] for s in sorted({x.seq for x in tokens})]


@given(TOKENS)
def test_a_pair_is_its_formulas(tokens: list[Token]):
    r = [math.exp(x.log_r) for x in tokens]
    logs = [x.log_r for x in tokens]
    want = {
        "mean": mean(r),
        "std": math.sqrt(mean([(x - mean(r)) ** 2 for x in r])),
        "min": min(r),
        "max": max(r),
        "p1": quantile(r, 0.01),
        "p50": quantile(r, 0.5),
        "p99": quantile(r, 0.99),
        "abs_log_mean": mean([abs(x) for x in logs]),
        "abs_log_max": max(abs(x) for x in logs),
        "k1": mean([-x for x in logs]),
        "k2": mean([0.5 * x**2 for x in logs]),
        "k3": mean([math.exp(x) - 1 - x for x in logs]),
        "chi2": mean([x**2 for x in r]) - 1,
        "ess": sum(r) ** 2 / sum(x**2 for x in r),
        "ess_ratio": sum(r) ** 2 / sum(x**2 for x in r) / len(r),
    }
    found = diagnostics.pair_summary(column(tokens, "log_r"))
    assert found == pytest.approx(want, rel=1e-9, abs=1e-9)


@given(TOKENS)
def test_sequences_are_their_formulas(tokens: list[Token]):
    logs = [[x.log_r for x in own] for own in sequences(tokens)]
    product = [math.exp(min(20.0, max(-20.0, sum(own)))) for own in logs]
    gap = [-mean(own) for own in logs]  # mean log p - mean log q
    want = {
        "seq_chi2": mean([x**2 for x in product]) - 1,
        "seq_ess": sum(product) ** 2 / sum(x**2 for x in product),
        "seq_ess_ratio": sum(product) ** 2 / sum(x**2 for x in product) / len(product),
        "ppl_gap": mean(gap),
        "ppl_ratio": mean([math.exp(x) for x in gap]),
    }
    found = diagnostics.sequence_summary(column(tokens, "log_r"), column(tokens, "seq"))
    assert found == pytest.approx(want, rel=1e-9, abs=1e-9)


@given(TOKENS)
def test_ages_and_their_k3_are_sums_over_the_tokens_of_that_age(tokens: list[Token]):
    found = diagnostics.per_age(
        NOW - column(tokens, "version"), {"k3_d": diagnostics.k3(column(tokens, "log_r"))}
    )
    for age in range(len(found["age_count"])):
        own = [x for x in tokens if NOW - x.version == age]
        assert found["age_count"][age] == len(own)
        want = sum(math.exp(x.log_r) - 1 - x.log_r for x in own)
        assert found["age_k3_d_sum"][age] == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert found["age_count"].sum() == len(tokens)


@given(TOKENS)
def test_staleness_is_its_formulas(tokens: list[Token]):
    ages = [NOW - x.version for x in tokens]
    stamps = [[x.version for x in own] for own in sequences(tokens)]
    spans = [max(own) - min(own) for own in stamps]
    want = {
        "staleness_mean": mean(ages),
        "staleness_max": max(ages),
        "versions_per_trajectory": mean([len(set(own)) for own in stamps]),
        "version_span_max": max(spans),
        "version_span_mean": mean(spans),
        "mixed_version_ratio": mean([len(set(own)) > 1 for own in stamps]),
    }
    found = diagnostics.staleness(column(tokens, "version"), column(tokens, "seq"), version_now=NOW)
    assert found == pytest.approx(want)


@given(TOKENS, st.lists(st.sampled_from(["", "token_low", "seq", "both"]), min_size=12))
def test_fractions_by_cause_have_the_denominators_they_say(
    tokens: list[Token], verdicts: list[str]
):
    verdicts = verdicts[: len(tokens)]
    rejected = {
        cause: torch.tensor([v in (cause, "both") for v in verdicts])
        for cause in ("token_low", "seq")
    }
    cut = clip_causes(
        column(tokens, "log_r"), column(tokens, "adv"), clip_low=0.2, clip_high=0.28, dual=3.0
    )
    alive = [x for x, v in zip(tokens, verdicts, strict=True) if not v]
    ratio_of = {id(x): math.exp(x.log_r) for x in tokens}
    high = [x for x in alive if x.adv > 0 and ratio_of[id(x)] > 1.28]
    low = [x for x in alive if x.adv < 0 and ratio_of[id(x)] < 0.8]
    dual = [x for x in alive if x.adv < 0 and ratio_of[id(x)] > 3.0]
    none = [x for x in alive if x.adv == 0]
    left = max(1, len(alive))
    want = {
        "rej_token_low": sum(v in ("token_low", "both") for v in verdicts) / len(tokens),
        "rej_seq": sum(v in ("seq", "both") for v in verdicts) / len(tokens),
        "rej_any": 1 - len(alive) / len(tokens),
        "clip_high": len(high) / left,
        "clip_low": len(low) / left,
        "dual": len(dual) / left,
        "zero_advantage": len(none) / left,
        "contributing": (len(alive) - len(high) - len(low) - len(dual) - len(none)) / left,
    }
    found = diagnostics.fractions_by_cause(rejected, cut, column(tokens, "adv"))
    assert found == pytest.approx(want)


def test_every_minibatch_of_a_step_keeps_its_own_figures():
    first = by_minibatch({}, dict.fromkeys(BY_MINIBATCH, 1.0) | {"loss": 9.0})
    both = by_minibatch(first, {"s_k3": 2.0})
    assert both["minibatch_s_k3"].tolist() == [1.0, 2.0]
    assert both["minibatch_clip_high"].tolist()[0] == 1.0
    assert math.isnan(both["minibatch_clip_high"][1])
    assert set(both) == {f"minibatch_{name}" for name in BY_MINIBATCH}
