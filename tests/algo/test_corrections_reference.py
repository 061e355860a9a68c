"""Every correction against its formula, token by token in plain python."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.composition import compose
from shared.algo.correction_specs import SPECS
from shared.algo.layout import Layout
from shared.algo.losses import decoupled_ppo

WEIGHT_KINDS = ("importance", "unit", "tis", "seq_tis", "segment_tis", "icepop")
ENTRIES = [{"kind": kind} for kind in SPECS if kind not in ("kpop", "self_normalise")]
ENTRIES += [{"kind": "kpop", "high": 0.05}, {"kind": "tis", "low": 0.7, "high": 1.3}]
ENTRIES += [{"kind": "veto", "below": 0.6, "above": 1.8}, {"kind": "segment_tis", "low": 0.9}]
ENTRIES += [
    {"kind": "kl_mask", "estimator": estimator, "agg": agg, "high": 0.1}
    for estimator in ("k2", "k3")
    for agg in ("token", "sum", "mean", "max")
]


@dataclass
class Token:
    old: float
    inf: float
    mask: bool
    seq: int
    version: int

    @property
    def log_d(self) -> float:
        return self.old - self.inf


def exp(x: float) -> float:
    return math.exp(min(20.0, max(-20.0, x)))


def segment_of(tokens: list[Token], t: int) -> list[Token]:
    """Walk outwards while tokens are sampled, of one sequence and one version."""

    def joined(a: int, b: int) -> bool:
        x, y = tokens[a], tokens[b]
        return x.mask and y.mask and x.seq == y.seq and x.version == y.version

    first = last = t
    while first > 0 and joined(first - 1, first):
        first -= 1
    while last + 1 < len(tokens) and joined(last, last + 1):
        last += 1
    return tokens[first : last + 1]


def divergence(estimator: str, log_d: float) -> float:
    log_d = min(20.0, max(-20.0, log_d))
    return 0.5 * log_d**2 if estimator == "k2" else math.exp(log_d) - 1 - log_d


def bernoulli_kl(p: float, q: float) -> float:
    p, q = (min(1 - 1e-6, max(1e-6, x)) for x in (p, q))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def kept(spec, tokens: list[Token], t: int) -> bool:
    """Section 3, one token."""
    d, own = exp(tokens[t].log_d), [x for x in tokens if x.seq == tokens[t].seq and x.mask]
    logs = [x.log_d for x in own]
    p, q = math.exp(tokens[t].old), math.exp(tokens[t].inf)
    match spec.kind:
        case "icepop" | "token_mask":
            return spec.low <= d <= spec.high
        case "seq_mask":
            return spec.low <= exp(sum(logs)) <= spec.high
        case "seq_geo_mask":
            return spec.low <= exp(sum(logs) / len(logs)) <= spec.high
        case "segment_mask":
            run = [x.log_d for x in segment_of(tokens, t)]
            return spec.low <= exp(sum(run) / len(run)) <= spec.high
        case "kl_mask":
            values = [divergence(spec.estimator, log_d) for log_d in logs]
            value = {
                "token": divergence(spec.estimator, tokens[t].log_d),
                "sum": sum(values),
                "mean": sum(values) / len(values),
                "max": max(values),
            }[spec.agg]
            return value <= spec.high
        case "veto":
            above = math.inf if spec.above is None else spec.above
            return not any(exp(log_d) < spec.below or exp(log_d) > above for log_d in logs)
        case "trm":
            return all(spec.low <= exp(log_d) <= spec.high for log_d in logs)
        case "prob_diff":
            return spec.low <= p - q <= spec.high
        case "kpop":
            return max(bernoulli_kl(p, q), bernoulli_kl(q, p)) <= spec.high
        case _:
            return True


def weight(spec, tokens: list[Token], t: int) -> float:
    d = exp(tokens[t].log_d)
    match spec.kind:
        case "unit":
            return 1.0
        case "tis":
            return min(max(d, spec.low), spec.high)
        case "seq_tis":
            own = [x.log_d for x in tokens if x.seq == tokens[t].seq and x.mask]
            return min(exp(sum(own)), spec.high)
        case "segment_tis":
            run = [x.log_d for x in segment_of(tokens, t)]
            return min(max(exp(sum(run) / len(run)), spec.low), spec.high)
        case "icepop":
            return d if spec.low <= d <= spec.high else 0.0
        case _:
            return d


LOGPROB = st.floats(-3, -1e-3)
TOKENS = st.lists(
    st.builds(
        Token,
        old=LOGPROB,
        inf=LOGPROB,
        mask=st.booleans(),
        seq=st.integers(0, 1),
        version=st.integers(3, 4),
    ),
    min_size=1,
    max_size=14,
).map(lambda tokens: sorted(tokens, key=lambda t: t.seq))


def tensors(tokens: list[Token]):
    old = torch.tensor([t.old for t in tokens], dtype=torch.float64)
    inf = torch.tensor([t.inf for t in tokens], dtype=torch.float64)
    layout = Layout(
        torch.tensor([t.mask for t in tokens]), torch.tensor([t.seq for t in tokens]), 2
    )
    more = {"l_old_T": old, "l_inf_T": inf, "versions_T": torch.tensor([t.version for t in tokens])}
    return old - inf, layout, more


@given(TOKENS, st.sampled_from(ENTRIES))
def test_every_correction_is_its_formula(tokens: list[Token], entry: dict[str, object]):
    log_d, layout, more = tensors(tokens)
    composition = compose([entry])
    verdict = composition.apply(log_d, layout, **more)
    (spec,) = composition.specs
    rejected = torch.zeros(len(tokens), dtype=torch.bool)
    for where in verdict.rejected.values():
        rejected |= where
    for t, token in enumerate(tokens):
        if not token.mask:
            assert not rejected[t]
            continue
        assert bool(rejected[t]) is not kept(spec, tokens, t)
        assert float(verdict.weight_T[t]) == pytest.approx(weight(spec, tokens, t), rel=1e-12)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_engines_that_agree_lose_no_token_and_no_weight(entry: dict[str, object]):
    log_d, layout, more = tensors([Token(-0.5, -0.5, t != 2, t // 4, 3) for t in range(8)])
    verdict = compose([entry]).apply(log_d, layout, **more)
    assert not any(where.any() for where in verdict.rejected.values())
    assert verdict.weight_T[layout.m_T].tolist() == [1.0] * 7
    assert not verdict.truncated_T.any()


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_weights_carry_no_gradient_and_scale_the_gradient_of_the_loss(kind: str):
    tokens = [Token(-0.5 - 0.2 * t, -0.6, True, t // 3, 3 + t // 2) for t in range(6)]
    log_d, layout, more = tensors(tokens)
    log_d.requires_grad_()
    more["l_old_T"].requires_grad_()
    verdict = compose([{"kind": kind}, {"kind": "prob_diff"}]).apply(log_d, layout, **more)
    assert not verdict.weight_T.requires_grad
    log_s = (0.05 * torch.arange(6, dtype=torch.float64) - 0.1).requires_grad_()
    adv = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)

    def loss(log_s: torch.Tensor) -> torch.Tensor:
        return decoupled_ppo(log_s, verdict.weight_T, adv).sum()

    assert torch.autograd.gradcheck(loss, (log_s,))
    (grad,) = torch.autograd.grad(loss(log_s), log_s)
    want = -verdict.weight_T * adv * log_s.detach().exp()
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=0)
