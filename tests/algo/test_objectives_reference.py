"""Every objective against its formula, token by token in plain python, with its gradient.

`plain` evaluates what stands under a stop-gradient at `frozen` and the rest at `now`, so that
central differences in `now` are the gradient that the formula has.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.algo.layout import Layout
from shared.algo.loss_terms import Terms, Tokens
from shared.algo.objective_specs import OBJECTIVE_SPECS, ObjectiveSpec, objective_from
from shared.algo.objective_terms import objective_terms

ENTRIES = [{"kind": kind} for kind in OBJECTIVE_SPECS]
ENTRIES += [
    {"kind": "ppo", "low": 0.1, "high": 0.5, "dual": None},
    {"kind": "gspo", "low": 0.1, "high": 0.1},
    {"kind": "gspo_token", "low": 0.1, "high": 0.1},
    {"kind": "cispo", "low": 0.2, "high": 0.3, "anchor": "rollout"},
    {"kind": "reinforce", "cap": 1.1, "anchor": "old"},
    {"kind": "topr", "level": "sequence", "anchor": "rollout"},
    {"kind": "dppo_tv", "low": 0.02, "high": 0.03, "cap": 1.2, "anchor": "old"},
    {"kind": "dppo_kl", "low": 0.002, "high": 0.003},
    {"kind": "prime_rl_default", "low": 0.03, "high": 0.02, "kappa": 0.5},
    {"kind": "vespo", "anchor": "old"},
    {"kind": "opsm", "delta": 0.1, "reference": "rollout"},
    {"kind": "m2po", "threshold": 0.2, "anchor": "old"},
    {"kind": "rollout_double_sided", "low": 0.5, "high": 0.9},
    {"kind": "four_policy", "low": 0.1, "high": 0.1, "dual": 1.2, "anchor_cap": 1.3},
    {"kind": "four_policy", "max_ratio": 1.5},
]
SPECS = [objective_from(entry) for entry in ENTRIES]


@dataclass
class Token:
    old: float
    inf: float
    adv: float
    weight: float
    mask: bool
    seq: int
    score: float
    shift: float = 0.0
    """log π_prox/π_old."""

    @property
    def prox(self) -> float:
        return self.old + self.shift


def clip(x: float, low: float, high: float) -> float:
    return min(high, max(low, x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def m2po_keeps(squares: dict[int, float], threshold: float) -> set[int]:
    """Drop the largest while the mean is not below; at least one stays."""
    left = sorted(squares, key=lambda t: squares[t])
    while len(left) > 1 and sum(squares[t] for t in left) / len(left) >= threshold:
        left.pop()
    return set(left)


def plain(
    spec: ObjectiveSpec, tokens: list[Token], now: list[float], frozen: list[float]
) -> list[float]:
    """Section 4: the loss of every token, W included where the ratio is S; 0 outside the mask."""
    anchors = [x.old if spec.ratio_anchor == "old" else x.inf for x in tokens]
    loss_tokens = [t for t, x in enumerate(tokens) if x.mask]
    out = [0.0] * len(tokens)
    for t in loss_tokens:
        x, lp, f, a = tokens[t], now[t], frozen[t], tokens[t].adv
        own = [u for u in loss_tokens if tokens[u].seq == x.seq]
        r, r_f = math.exp(lp - anchors[t]), math.exp(f - anchors[t])
        product = math.exp(sum(frozen[u] - anchors[u] for u in own))
        p, q = math.exp(anchors[t]), math.exp(f)
        match spec.kind:
            case "ppo" | "opsm":
                s = math.exp(lp - x.old)
                loss = -min(s * a, clip(s, 1 - spec.low, 1 + spec.high) * a)
                if a < 0 and spec.dual is not None:
                    loss = min(loss, -spec.dual * a)
                if spec.kind == "opsm":
                    reference = {"old": "old", "rollout": "inf"}[spec.reference]
                    kl = sum(getattr(tokens[u], reference) - frozen[u] for u in own) / len(own)
                    loss = 0.0 if a < 0 and kl > spec.delta else loss
            case "gspo" | "gspo_token":
                if spec.kind == "gspo":
                    s = math.exp(sum(now[u] - tokens[u].old for u in own) / len(own))
                    a = sum(tokens[u].adv for u in own) / len(own)
                else:
                    s = math.exp(sum(frozen[u] - tokens[u].old for u in own) / len(own) + lp - f)
                loss = max(-a * s, -a * clip(s, 1 - spec.low, 1 + spec.high))
            case "cispo":
                loss = -clip(r_f, 1 - spec.low, 1 + spec.high) * a * lp
            case "reinforce":
                loss = -min(r_f, spec.cap) * a * lp
            case "topr":
                used = product if spec.level == "sequence" else r_f
                loss = -a * lp if x.score > 0 else -clip(used, 0, 1) * a * lp
            case "sapo":
                tau = spec.tau_positive if a > 0 else spec.tau_negative
                loss = -a * (4 / tau) * sigmoid(tau * (r - 1))
            case "dppo_tv":
                drop = q - p > spec.high if a > 0 else q - p < -spec.low
                loss = 0.0 if drop else -min(r_f, spec.cap) * a * lp
            case "dppo_kl":
                kl = bernoulli_kl(p, q)
                drop = (q > p and kl > spec.high) if a > 0 else (q < p and kl > spec.low)
                loss = 0.0 if drop else -min(r_f, spec.cap) * a * lp
            case "prime_rl_default" | "ipo":
                up, down = q - p > spec.high, q - p < -spec.low
                drop = (up or down) if spec.kind == "ipo" else (up if a > 0 else down)
                loss = (0.0 if drop else -a * r) + spec.kappa * (lp - x.inf) ** 2
            case "vespo":
                k, lam = (
                    (spec.k_positive, spec.lambda_positive)
                    if a >= 0
                    else (spec.k_negative, spec.lambda_negative)
                )
                loss = -(math.exp(lam) * product**k * math.exp(-lam * product)) * a * lp
            case "m2po":
                squares = {u: (frozen[u] - anchors[u]) ** 2 for u in loss_tokens}
                loss = -r * a if t in m2po_keeps(squares, spec.threshold) else 0.0
            case "four_policy":
                s1, s2 = math.exp(x.prox - x.old), math.exp(lp - x.prox)
                loss = -min(s2 * a, clip(s2, 1 - spec.low, 1 + spec.high) * a)
                if a < 0 and spec.dual is not None:
                    loss = min(loss, -spec.dual * a)
                loss *= min(s1, spec.anchor_cap or math.inf)
                if spec.max_ratio is not None:
                    loss *= min(1.0, spec.max_ratio / math.exp(f - x.inf))
            case "rollout_double_sided":
                inside = 1 - spec.low < r_f < 1 + spec.high
                loss = -(r_f if inside else 0.0) * a * lp
        out[t] = loss * (x.weight if spec.ratio_anchor == "old" else 1.0)
    return out


def computed(
    spec: ObjectiveSpec, tokens: list[Token], now: list[float]
) -> tuple[Terms, list[float]]:
    """Terms, and the gradient of the sum over loss tokens."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(x, name) for x in tokens], dtype=torch.float64)

    layout = Layout(
        torch.tensor([x.mask for x in tokens]), torch.tensor([x.seq for x in tokens]), 3
    )
    l_T = torch.tensor(now, dtype=torch.float64, requires_grad=True)
    given = Tokens.of(
        l_T,
        column("old"),
        column("inf"),
        column("adv"),
        column("weight"),
        layout,
        column("score"),
        column("prox"),
    )
    terms = objective_terms(given, spec)
    torch.where(layout.m_T, terms.loss_T, 0.0).sum().backward()
    assert l_T.grad is not None
    return terms, l_T.grad.tolist()


log_probs = st.floats(-4, -0.2)
tokens_strategy = st.lists(
    st.builds(
        Token,
        old=log_probs,
        inf=log_probs,
        adv=st.sampled_from([-2.0, -0.5, 0.0, 0.7, 1.5]),
        weight=st.floats(0.1, 2.0),
        mask=st.sampled_from([True, True, True, False]),
        seq=st.integers(0, 2),
        score=st.sampled_from([-1.0, 0.0, 1.0]),
        shift=st.floats(-0.5, 0.5),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, vars(s).values())))
@settings(max_examples=25)
@given(tokens=tokens_strategy, steps=st.lists(st.floats(-0.6, 0.6), min_size=6, max_size=6))
def test_value_and_gradient_are_those_of_the_formula(
    spec: ObjectiveSpec, tokens: list[Token], steps: list[float]
):
    now = [min(-1e-3, x.old + step) for x, step in zip(tokens, steps, strict=False)]
    terms, gradient = computed(spec, tokens, now)
    loss_tokens = [t for t, x in enumerate(tokens) if x.mask]
    want = plain(spec, tokens, now, now)
    assert [terms.loss_T[t].item() for t in loss_tokens] == pytest.approx(
        [want[t] for t in loss_tokens], rel=1e-9, abs=1e-12
    )
    h = 1e-6
    for t in range(len(tokens)):
        up, down = list(now), list(now)
        up[t], down[t] = now[t] + h, now[t] - h
        rise = sum(plain(spec, tokens, up, now)) - sum(plain(spec, tokens, now, now))
        fall = sum(plain(spec, tokens, now, now)) - sum(plain(spec, tokens, down, now))
        assume(math.isclose(rise, fall, rel_tol=1e-3, abs_tol=1e-9))  # not at a kink
        assert gradient[t] == pytest.approx((rise + fall) / (2 * h), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, vars(s).values())))
@settings(max_examples=25)
@given(tokens=tokens_strategy, steps=st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_cut_tokens_have_no_policy_gradient(
    spec: ObjectiveSpec, tokens: list[Token], steps: list[float]
):
    if spec.kind in ("prime_rl_default", "ipo"):
        spec = objective_from({**vars(spec), "kappa": 0.0})
    now = [min(-1e-3, x.old + step) for x, step in zip(tokens, steps, strict=False)]
    terms, gradient = computed(spec, tokens, now)
    assert all(math.isfinite(g) for g in gradient)
    for cause, where in terms.cut.items():
        for t, x in enumerate(tokens):
            if x.mask and bool(where[t]):
                assert gradient[t] == 0.0, cause


@pytest.mark.parametrize("kind", OBJECTIVE_SPECS)
@settings(max_examples=10)
@given(tokens=tokens_strategy)
def test_on_policy_every_objective_has_the_policy_gradient(kind: str, tokens: list[Token]):
    # D = S = 1, W = 1, one advantage per sequence: -A on every loss token
    advantages = {0: 1.5, 1: -0.5, 2: 0.7}
    tokens = [Token(x.old, x.old, advantages[x.seq], 1.0, x.mask, x.seq, 1.0) for x in tokens]
    terms, gradient = computed(objective_from({"kind": kind}), tokens, [x.old for x in tokens])
    want = [-x.adv if x.mask else 0.0 for x in tokens]
    assert gradient == pytest.approx(want, rel=1e-12)
    for where in (*terms.cut.values(), *terms.truncated.values()):
        assert not any(bool(w) and x.mask for w, x in zip(where, tokens, strict=True))


@pytest.mark.parametrize("kind", OBJECTIVE_SPECS)
def test_log_probs_that_are_not_finite_leave_loss_and_gradient_finite(kind: str):
    nan, inf = float("nan"), float("inf")
    old, sampler = torch.tensor([-1.0, nan, -1.0, -1.0]), torch.tensor([-1.0, -1.0, -inf, -1.0])
    l_T = torch.tensor([-1.1, -1.2, -1.3, -inf], requires_grad=True)
    layout = Layout(torch.ones(4, dtype=torch.bool), torch.tensor([0, 0, 1, 1]), 2)
    one = torch.ones(4)
    terms = objective_terms(
        Tokens.of(l_T, old, sampler, one, one, layout, one, old), objective_from({"kind": kind})
    )
    terms.loss_T.sum().backward()
    assert torch.isfinite(terms.loss_T).all()
    assert l_T.grad is not None
    assert l_T.grad[1:].tolist() == [0.0, 0.0, 0.0]
    assert math.isfinite(float(l_T.grad[0]))
