import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.kl import KlSpec, kl_terms

X = [0.3, -0.5, 0.0]  # ℓ^ref - ℓ
LP = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
REF = LP + torch.tensor(X, dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "want"),
    [
        ("k1", [-0.3, 0.5, 0.0]),
        ("k2", [0.045, 0.125, 0.0]),
        ("k3", [0.04985880757600311, 0.10653065971263342, 0.0]),
        ("k3+", [0.04985880757600311, 0.10653065971263342, 0.0]),
    ],
)
def test_the_estimators_by_hand(estimator, want: list[float]):
    assert kl_terms(LP, REF, estimator=estimator).loss_T.tolist() == pytest.approx(want)


def value(estimator: str, lp: float, ref: float) -> float:
    x = ref - lp
    return {"k1": -x, "k2": 0.5 * x * x, "k3": math.exp(x) - 1 - x}[estimator]


def gradient(estimator, lp: float, ref: float, log_weight: float | None = None, **clamps) -> float:
    leaf = torch.tensor([lp], dtype=torch.float64, requires_grad=True)
    weight = None if log_weight is None else leaf - leaf.detach() + log_weight
    terms = kl_terms(
        leaf, torch.tensor([ref]).double(), estimator=estimator, log_weight_T=weight, **clamps
    )
    terms.loss_T.sum().backward()
    assert leaf.grad is not None
    return float(leaf.grad)


@given(st.floats(-3, -0.1), st.floats(-3, -0.1), st.sampled_from(["k1", "k2", "k3", "k3+"]))
def test_gradients_are_finite_differences_and_k3_plus_has_that_of_k2(
    lp: float, ref: float, estimator
):
    by = "k2" if estimator == "k3+" else estimator
    h = 1e-6
    want = (value(by, lp + h, ref) - value(by, lp - h, ref)) / (2 * h)
    assert gradient(estimator, lp, ref) == pytest.approx(want, rel=1e-5, abs=1e-7)


POLICY, REFERENCE = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    exact = sum(p * math.log(p / r) for p, r in zip(POLICY, REFERENCE, strict=True))
    lp, ref = (torch.tensor(x, dtype=torch.float64).log() for x in (POLICY, REFERENCE))
    found = kl_terms(lp, ref, estimator=estimator).loss_T
    assert float((lp.exp() * found).sum()) == pytest.approx(exact)


def expected_gradient(estimator, sampler: list[float], weighted: bool) -> torch.Tensor:
    """Of the estimate in logits, its expectation over the sampler taken exactly."""
    logits = torch.tensor(POLICY, dtype=torch.float64).log().requires_grad_()
    lp = torch.log_softmax(logits, 0)
    ref, mu = (torch.tensor(x, dtype=torch.float64).log() for x in (REFERENCE, sampler))
    terms = kl_terms(lp, ref, estimator=estimator, log_weight_T=lp - mu if weighted else None)
    (mu.exp() * terms.loss_T).sum().backward()
    assert logits.grad is not None
    return logits.grad


def exact_gradient() -> torch.Tensor:
    logits = torch.tensor(POLICY, dtype=torch.float64).log().requires_grad_()
    lp = torch.log_softmax(logits, 0)
    (lp.exp() * (lp - torch.tensor(REFERENCE, dtype=torch.float64).log())).sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize(("estimator", "right"), [("k1", 0), ("k2", 1), ("k3", 0), ("k3+", 1)])
def test_on_policy_only_k2_and_k3_plus_have_the_gradient_of_the_divergence(estimator, right: int):
    gap = (expected_gradient(estimator, POLICY, False) - exact_gradient()).abs().max()
    assert (float(gap) < 1e-12) == bool(right)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
def test_off_policy_the_weight_makes_every_gradient_that_of_the_divergence(estimator):
    sampler = [0.1, 0.1, 0.8]
    torch.testing.assert_close(expected_gradient(estimator, sampler, True), exact_gradient())
    unweighted = expected_gradient(estimator, sampler, False)
    assert float((unweighted - exact_gradient()).abs().max()) > 1e-2


def test_the_weight_multiplies_the_value():
    log_s = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    plain = kl_terms(LP, REF).loss_T
    torch.testing.assert_close(kl_terms(LP, REF, log_weight_T=log_s).loss_T, log_s.exp() * plain)


def test_clamps_bound_the_value_and_are_named():
    ref = LP + torch.tensor([5.0, 30.0, 1.0], dtype=torch.float64)
    terms = kl_terms(LP, ref)
    assert terms.loss_T.tolist() == pytest.approx([10.0, 10.0, math.e - 2])
    assert terms.cut["kl_clamped"].tolist() == [True, True, False]
    raised = kl_terms(LP, ref, value_clamp=None)
    assert raised.loss_T[0].item() == pytest.approx(math.exp(5) - 6)
    assert raised.loss_T[1].item() == pytest.approx(math.exp(20) - 21)
    assert raised.cut["kl_clamped"].tolist() == [False, True, False]
    free = kl_terms(LP, ref, value_clamp=None, input_clamp=None)
    assert free.loss_T[1].item() == pytest.approx(math.exp(30) - 31)
    assert gradient("k3", -1.0, 4.0) == 0.0
    assert gradient("k3+", -1.0, 4.0) == pytest.approx(-5.0)


def test_equal_policies_have_no_divergence_and_no_gradient():
    for estimator in ("k2", "k3", "k3+"):
        assert kl_terms(LP, LP, estimator=estimator).loss_T.tolist() == [0.0] * 3
        assert gradient(estimator, -1.0, -1.0) == 0.0


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"coefficient": -1e-3}, "coefficient"),
        ({"estimator": "k4"}, "estimator"),
        ({"importance": "s"}, "importance"),
        ({"value_clamp": 0.0}, "value_clamp"),
        ({"input_clamp": -1.0}, "input_clamp"),
    ],
)
def test_degenerate_settings_are_refused(entry, key: str):
    with pytest.raises(ValueError, match=rf"kl\.{key}"):
        KlSpec(**entry)
