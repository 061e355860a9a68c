import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.algo.corrections import token_mask
from shared.algo.proximal import (
    Interval,
    alpha_by_age,
    linear_proxy,
    loglinear_proxy,
    reparameterised,
)

BOUNDS = {"clip_low": 0.2, "clip_high": 0.2, "mask_low": 0.5, "mask_high": 2.0}


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_alpha_by_hand():
    ages = torch.tensor([-1, 0, 1, 2, 5, 3])
    versions = torch.tensor([9, 8, 7, 6, 3, -1])
    assert alpha_by_age(ages, versions).tolist() == pytest.approx([0, 0, 0, 0.5, 0.8, 0])
    assert alpha_by_age(ages).tolist()[-1] == pytest.approx(2 / 3)


def test_proxies_by_hand():
    now, inf, alpha = tensor(0.4).log(), tensor(0.1).log(), tensor(0.25)
    assert loglinear_proxy(now, inf, alpha).exp().item() == pytest.approx(0.1 * 4**0.25)
    assert linear_proxy(now, inf, alpha).exp().item() == pytest.approx(0.75 * 0.1 + 0.25 * 0.4)
    # AReaL's form
    shifted = linear_proxy(now, inf, alpha, epsilon=1e-10).item()
    assert shifted == math.log(0.75 * math.exp(inf.item()) + 0.25 * math.exp(now.item()) + 1e-10)


@given(st.floats(-6, -0.1), st.floats(-6, -0.1), st.integers(1, 12))
def test_what_the_two_ratios_become(now: float, inf: float, age: int):
    alpha, rho = (age - 1) / age, math.exp(now - inf)
    at = (tensor(now), tensor(inf), alpha_by_age(torch.tensor([age])))
    log_linear, linear = loglinear_proxy(*at).item(), linear_proxy(*at).item()
    assert math.exp(log_linear - inf) == pytest.approx(rho**alpha)
    assert math.exp(now - log_linear) == pytest.approx(rho ** (1 - alpha))
    assert math.exp(linear - inf) == pytest.approx(1 - alpha + alpha * rho)
    assert math.exp(now - linear) == pytest.approx(rho / (1 - alpha + alpha * rho))


def test_a_proxy_carries_no_gradient_and_does_not_underflow():
    now = torch.tensor([-200.0], requires_grad=True)
    for proxy in (loglinear_proxy, linear_proxy):
        value = proxy(now, torch.tensor([-210.0]), torch.tensor([0.5]))
        assert not value.requires_grad
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()


def test_at_age_one_the_loglinear_proxy_is_the_sampler_itself():
    alpha = alpha_by_age(torch.tensor([1]))
    inf = tensor(-1.3)
    assert torch.equal(loglinear_proxy(tensor(-0.2), inf, alpha), inf)
    found = reparameterised("loglinear", 0.0, **BOUNDS)
    assert (found.clip.low, found.clip.high) == pytest.approx((0.8, 1.2))
    assert found.mask == Interval(0.0, math.inf)


def test_equal_policies_have_themselves_as_proxy():
    same = tensor(-0.7)
    for proxy in (loglinear_proxy, linear_proxy):
        assert proxy(same, same, tensor(0.8)).item() == pytest.approx(-0.7, abs=1e-15)


@given(
    st.sampled_from(["loglinear", "linear"]),
    st.integers(1, 12),
    st.floats(-4, 4),
    st.floats(0.05, 0.5),
    st.floats(0.05, 1.0),
    st.floats(0.1, 0.9),
    st.floats(1.1, 5.0),
)
def test_interpolation_only_moves_the_bounds_on_rho(
    kind, age: int, log_rho: float, clip_low: float, clip_high: float, low: float, high: float
):
    # whatever π_old was: a token survives clip and mask on the proxy iff ρ lies in two intervals
    inf = tensor(-2.0)
    now, alpha = inf + log_rho, alpha_by_age(torch.tensor([age]))
    proxy = (loglinear_proxy if kind == "loglinear" else linear_proxy)(now, inf, alpha)
    s, rho = float((now - proxy).exp()), math.exp(log_rho)
    in_clip = 1 - clip_low <= s <= 1 + clip_high
    in_mask = bool(token_mask(proxy - inf, low=low, high=high))
    found = reparameterised(
        kind,
        float(alpha),
        clip_low=clip_low,
        clip_high=clip_high,
        mask_low=low,
        mask_high=high,
    )
    for edge in (found.clip.low, found.clip.high, found.mask.low, found.mask.high):
        assume(not math.isclose(rho, edge, rel_tol=1e-9))
    assert in_clip == (found.clip.low <= rho <= found.clip.high)
    assert in_mask == (found.mask.low <= rho <= found.mask.high)
    both = found.clip.meet(found.mask)
    assert (in_clip and in_mask) == (both.low <= rho <= both.high)


def test_by_age_first_the_mask_is_dead_and_then_the_clip():
    dead = {
        age: reparameterised("loglinear", (age - 1) / age, **BOUNDS).dead for age in range(1, 9)
    }
    assert all("mask_high" in dead[age] for age in range(1, 5))
    assert all("clip_high" in dead[age] for age in range(5, 9))
    fifth = reparameterised("loglinear", 0.8, **BOUNDS)
    assert fifth.clip.high == pytest.approx(2.48832)
    assert fifth.mask.high == pytest.approx(2 ** (5 / 4))
    assert reparameterised("loglinear", 0.75, **BOUNDS).mask.high == pytest.approx(2 ** (4 / 3))


def test_the_linear_upper_clip_never_fires_from_age_six_on():
    highs = [reparameterised("linear", (a - 1) / a, **BOUNDS).clip.high for a in range(1, 9)]
    assert highs[:5] == pytest.approx([1.2, 1.2 * 0.5 / 0.4, 2.0, 3.0, 6.0])
    assert highs[5:] == [math.inf] * 3


def test_an_alpha_of_one_is_refused():
    with pytest.raises(ValueError, match="at 1 the proxy is the current policy"):
        reparameterised("linear", 1.0, **BOUNDS)
