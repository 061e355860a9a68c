"""What shadows would have said and decided: by hand, in the limit, and with numbers missing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from shared.algo.batching import PackedBatch, pack
from shared.algo.correction_specs import IcePop
from shared.algo.objective import Objective
from shared.algo.objective_specs import Ppo
from shared.algo.policy_loss import PolicyLoss, count
from shared.algo.shadow import (
    COMPARED,
    ShadowLosses,
    ShadowReport,
    ShadowRoute,
    given_key,
    is_sampled,
)

NOW = 2
OBJECTIVE = Objective(
    corrections=(IcePop(low=0.5, high=2.0),), objective=Ppo(low=0.2, high=0.2, dual=None)
)
SAMPLER = [0.0, -1.0, -1.0, -1.0, -1.0]
EXACT = [0.0, -1.0, -1.0, -1.5, -1.0]
CURRENT = [0.0, -1.0, -0.1, -1.5, -1.3]
VERSIONS = [-1, 2, 1, 1, 0]
"""One prompt token and four sampled ones, of ages 0, 1, 1, 2; every advantage is positive.

token   log D exact   log S exact   kept, cut by exact routes       under current_recompute: log D̃
1       0             0             kept                            0     kept
2       0             +0.9          kept, clipped (S > 1.2)         +0.9  rejected (D̃ > 2)
3       -0.5          0             kept                            -0.5  kept
4       0             -0.3          kept (A > 0: not cut)           -0.3  kept
"""


@dataclass
class Forward:
    """What the loss needs of a forward."""

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor | None = None


def batch_of(**per_token: list[float]) -> PackedBatch:
    arrays = {
        "loss_mask": np.array([v >= 0 for v in VERSIONS]),
        "old_logprobs": np.array(EXACT),
        "sampler_logprobs": np.array(SAMPLER),
        "advantages": np.ones(5),
        "versions": np.array(VERSIONS, np.int64),
        **{name: np.array(values) for name, values in per_token.items()},
    }
    return pack([np.arange(5)], {name: [values] for name, values in arrays.items()})


def compared(
    routes: list[ShadowRoute], batch: PackedBatch, *, trained: str = "oracle",
    reference: str | None = "oracle",
) -> ShadowReport:  # fmt: skip
    losses = ShadowLosses(OBJECTIVE, routes, trained=trained, reference=reference)
    step = losses.step(count([batch]), version_now=NOW)
    loss = PolicyLoss(OBJECTIVE).minibatch(count([batch]), version_now=NOW)
    output = Forward(torch.tensor(CURRENT, dtype=torch.float64, requires_grad=True))
    value = loss(output, batch)
    step.observe(output, batch, loss.traces[-1])
    value.backward()
    alone = Forward(torch.tensor(CURRENT, dtype=torch.float64, requires_grad=True))
    PolicyLoss(OBJECTIVE).minibatch(count([batch]), version_now=NOW)(alone, batch).backward()
    assert torch.equal(output.logprobs_T.grad, alone.logprobs_T.grad)
    return step.report(num_ages=3)


def test_current_recompute_by_hand() -> None:
    report = compared([ShadowRoute("current_recompute", "current")], batch_of())
    scalars, arrays = report.scalars, report.arrays
    # |ℓ̃ - ℓ^old|: 0, 0.9, 0, 0.3
    assert scalars["shadow_current_recompute_error_mean"] == pytest.approx(0.3)
    assert scalars["shadow_current_recompute_error_bias"] == pytest.approx(0.15)
    assert scalars["shadow_current_recompute_error_max"] == pytest.approx(0.9)
    assert scalars["shadow_current_recompute_wrongly_rejected"] == 0.25
    assert scalars["shadow_current_recompute_wrong_any"] == 0.25
    assert scalars["shadow_current_recompute_s_k3"] == 0
    assert scalars["shadow_current_recompute_clipped_on_arrival"] == 0
    by_age = {n.removeprefix("shadow_current_recompute_age_"): a for n, a in arrays.items()}
    assert by_age["count"].tolist() == [1, 2, 1]
    assert by_age["error_sum"] == pytest.approx([0, 0.9, 0.3])
    assert by_age["bias_sum"] == pytest.approx([0, 0.9, -0.3])
    assert by_age["wrong_sum"].tolist() == [0, 1, 0]
    k3 = [math.expm1(x) - x for x in (0.0, 0.9, -0.5, -0.3)]
    assert by_age["k3_d_sum"] == pytest.approx([k3[0], k3[1] + k3[2], k3[3]])
    # the reference on the same tokens: D is the sampler's alone
    assert arrays["shadow_oracle_age_k3_d_sum"] == pytest.approx([0, k3[2], 0])


def test_the_sampler_as_shadow_by_hand() -> None:
    """ℓ̃ = ℓ^inf: nothing is ever rejected, and the clip acts on ρ."""
    report = compared([ShadowRoute("rollout", "sampler")], batch_of())
    assert report.scalars["shadow_rollout_error_mean"] == pytest.approx(0.125)
    assert report.scalars["shadow_rollout_d_k3"] == 0
    assert report.scalars["shadow_rollout_wrong_any"] == 0
    assert report.by_route["rollout"]["clipped_on_arrival"] == pytest.approx(0.75)


def test_a_proxy_is_computed_by_the_loss_itself() -> None:
    """Up to age 1 the log-linear proxy is the sampler; at age 2 it is half-way to ℓ."""
    report = compared([ShadowRoute("interp", "sampler", "loglinear")], batch_of())
    error = report.arrays["shadow_interp_age_error_sum"]
    assert error == pytest.approx([0, 0.5, 0.15])


def test_a_shadow_that_says_what_the_trained_route_says_has_no_error() -> None:
    batch = batch_of(**{given_key("twin"): EXACT})
    report = compared([ShadowRoute("twin", "given")], batch)
    assert report.scalars["shadow_twin_error_max"] == 0
    assert report.scalars["shadow_twin_wrong_any"] == 0
    assert report.arrays["shadow_twin_age_wrong_sum"].tolist() == [0, 0, 0]
    # control: one token off by a hundredth is seen
    batch = batch_of(**{given_key("twin"): [*EXACT[:-1], EXACT[-1] + 0.01]})
    off = compared([ShadowRoute("twin", "given")], batch)
    assert off.scalars["shadow_twin_error_max"] == pytest.approx(0.01)


def test_without_staleness_current_recompute_has_no_error() -> None:
    batch = batch_of(old_logprobs=CURRENT)
    report = compared([ShadowRoute("current_recompute", "current")], batch)
    assert report.scalars["shadow_current_recompute_error_max"] == 0


def test_an_exact_shadow_is_what_an_approximate_route_is_held_against() -> None:
    """The trained route's numbers are the sampler's; the reference lacks the last token's."""
    nan = float("nan")
    batch = batch_of(old_logprobs=SAMPLER, **{given_key("snapshot_old"): [nan, *EXACT[1:4], nan]})
    routes = [ShadowRoute("snapshot_old", "given"), ShadowRoute("current_recompute", "current")]
    report = compared(routes, batch, trained="rollout", reference="snapshot_old")
    assert report.arrays["shadow_rollout_age_count"].tolist() == [1, 2, 0]
    assert report.arrays["shadow_rollout_age_error_sum"] == pytest.approx([0, 0.5, 0])
    assert report.arrays["shadow_current_recompute_age_error_sum"] == pytest.approx([0, 0.9, 0])
    assert report.arrays["exact_scatter"][:, 0] == pytest.approx([0, 0, -0.5])
    assert report.arrays["exact_scatter"][:, 1] == pytest.approx([0, 0.9, 0])


def test_without_a_reference_only_ratios_are_reported() -> None:
    report = compared(
        [ShadowRoute("current_recompute", "current")], batch_of(), trained="rollout",
        reference=None,
    )  # fmt: skip
    assert "shadow_current_recompute_error_mean" not in report.scalars
    assert report.scalars["shadow_current_recompute_d_k3"] > 0
    assert report.arrays["shadow_current_recompute_age_count"].tolist() == [1, 2, 1]


def test_a_reference_that_says_nothing_leaves_no_sums() -> None:
    batch = batch_of(**{given_key("snapshot_old"): [float("nan")] * 5})
    routes = [ShadowRoute("snapshot_old", "given"), ShadowRoute("current_recompute", "current")]
    report = compared(routes, batch, trained="rollout", reference="snapshot_old")
    assert report.arrays == {}
    assert report.by_route["current_recompute"]["d_k3"] > 0


def test_only_the_sampled_trajectories_are_looked_at() -> None:
    batch = batch_of(**{COMPARED: [True, True, False, True, True]})
    report = compared([ShadowRoute("current_recompute", "current")], batch)
    assert report.arrays["shadow_current_recompute_age_count"].tolist() == [1, 1, 1]
    assert report.scalars["shadow_current_recompute_error_mean"] == pytest.approx(0.1)
    nothing = compared(
        [ShadowRoute("current_recompute", "current")], batch_of(**{COMPARED: [False] * 5})
    )
    assert nothing.scalars == {}


def test_the_sample_follows_seed_and_ticket_and_has_the_share_asked_for() -> None:
    tickets = [f"t{number:06d}" for number in range(4000)]
    chosen = [t for t in tickets if is_sampled(t, seed=1, share=0.25)]
    assert chosen == [t for t in tickets if is_sampled(t, seed=1, share=0.25)]
    assert abs(len(chosen) / 4000 - 0.25) < 0.03
    assert set(chosen) < {t for t in tickets if is_sampled(t, seed=1, share=0.5)}
    assert chosen != [t for t in tickets if is_sampled(t, seed=2, share=0.25)]
    assert all(is_sampled(t, seed=1, share=1.0) for t in tickets)
