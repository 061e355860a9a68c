"""Objective `four_policy` inside the whole loss: from the per-token tensors of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from shared.algo.batching import PackedBatch, pack
from shared.algo.correction_specs import IcePop
from shared.algo.objective import Objective
from shared.algo.objective_specs import FourPolicy, Ppo
from shared.algo.policy_loss import PROX, PolicyLoss, count

LENGTHS = (6, 4, 9)
ICEPOP = (IcePop(low=0.8, high=1.25),)


@dataclass
class Output:
    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor | None = None


def make(seed: int = 0) -> PackedBatch:
    rng = np.random.default_rng(seed)

    def near(rows: list[np.ndarray], spread: float) -> list[np.ndarray]:
        return [row + spread * rng.normal(size=len(row)) for row in rows]

    old = [-rng.random(n) * 3 for n in LENGTHS]
    return pack(
        [rng.integers(0, 9, n) for n in LENGTHS],
        {
            "loss_mask": [(np.arange(n) % 3 > 0).astype(np.uint8) for n in LENGTHS],
            "old_logprobs": old,
            "sampler_logprobs": near(old, 0.2),
            PROX: near(old, 0.3),
            "advantages": [np.full(n, a) for n, a in zip(LENGTHS, (1.0, 2.0, -0.5), strict=True)],
            "versions": [rng.integers(2, 7, n) for n in LENGTHS],
        },
    )


def current(batch: PackedBatch) -> torch.Tensor:
    noise = torch.randn(
        batch.num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return (batch.per_token["old_logprobs"] + 0.3 * noise).requires_grad_()


def loss_of(objective: Objective, batch: PackedBatch, l_T: torch.Tensor) -> torch.Tensor:
    return PolicyLoss(objective).compute(Output(l_T), batch, count([batch]), version_now=6)[0]


@pytest.mark.parametrize(
    "spec",
    [
        FourPolicy(dual=None),
        FourPolicy(dual=1.1),
        FourPolicy(anchor_cap=1.1),
        FourPolicy(max_ratio=1.2),
    ],
)
def test_it_is_the_formula_token_by_token(spec: FourPolicy) -> None:
    batch = make()
    l_T = current(batch)
    names = ("loss_mask", "old_logprobs", "sampler_logprobs", PROX, "advantages")
    rows = zip(l_T.tolist(), *(batch.per_token[name].tolist() for name in names), strict=True)
    total, num_tokens, acted = 0.0, 0, 0
    for now, mask, old, sampler, prox, advantage in rows:
        if not mask:
            continue
        num_tokens += 1
        d, s1, s2 = math.exp(old - sampler), math.exp(prox - old), math.exp(now - prox)
        if not 0.8 <= d <= 1.25:
            continue
        clipped = min(max(s2, 1 - spec.low), 1 + spec.high)
        term = -min(s2 * advantage, clipped * advantage)
        if spec.dual is not None and advantage < 0:
            acted += term > -spec.dual * advantage
            term = min(term, -spec.dual * advantage)
        if spec.anchor_cap is not None:
            acted += s1 > spec.anchor_cap
            s1 = min(s1, spec.anchor_cap)
        weight = d * s1
        if spec.max_ratio is not None and d * math.exp(now - old) > spec.max_ratio:
            acted += 1
            weight *= spec.max_ratio / (d * math.exp(now - old))
        total += weight * term
    want = total / num_tokens
    assert loss_of(Objective(ICEPOP, spec), batch, l_T).item() == pytest.approx(want, rel=1e-12)
    assert acted or spec == FourPolicy(dual=None)


def test_an_anchor_that_is_the_old_policy_leaves_ppo_and_one_that_is_not_does_not() -> None:
    batch = make()
    same = replace(
        batch, per_token={**batch.per_token, PROX: batch.per_token["old_logprobs"].clone()}
    )
    found: list[tuple[float, torch.Tensor]] = []
    narrow = FourPolicy(low=0.05, high=0.05)
    for spec, at in ((Ppo(low=0.05, high=0.05), same), (narrow, same), (narrow, batch)):
        l_T = current(batch)
        loss = loss_of(Objective(ICEPOP, spec), at, l_T)
        loss.backward()
        assert l_T.grad is not None
        found.append((loss.item(), l_T.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.allclose(found[0][1], found[2][1])


def test_without_bounds_the_gradient_does_not_depend_on_the_anchor() -> None:
    open_ended = FourPolicy(low=1.0, high=1e6, dual=None)
    gradients: list[torch.Tensor] = []
    for seed in (0, 5):
        batch = make()
        moved = batch.per_token[PROX] + 0.1 * torch.randn(
            batch.num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        l_T = current(batch)
        at = replace(batch, per_token={**batch.per_token, PROX: moved})
        loss_of(Objective((), open_ended), at, l_T).backward()
        assert l_T.grad is not None
        gradients.append(l_T.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_its_gradient_is_that_of_finite_differences() -> None:
    batch = make()
    objective = Objective(ICEPOP, FourPolicy(anchor_cap=1.2))
    assert torch.autograd.gradcheck(lambda l_T: loss_of(objective, batch, l_T), (current(batch),))


def test_a_token_whose_anchor_is_unknown_is_rejected_and_counted() -> None:
    batch = make()
    [first, *_] = batch.per_token["loss_mask"].bool().nonzero()[:, 0].tolist()
    batch.per_token[PROX][first] = torch.nan
    l_T = current(batch)
    step = PolicyLoss(Objective(ICEPOP, FourPolicy())).minibatch(count([batch]), version_now=6)
    step(Output(l_T), batch).backward()
    assert l_T.grad is not None
    assert torch.isfinite(l_T.grad).all()
    assert l_T.grad[first] == 0
    assert step.report()[0]["rej_nonfinite"] > 0


def test_a_batch_without_an_anchor_names_the_key_that_brings_one() -> None:
    batch = make()
    del batch.per_token[PROX]
    with pytest.raises(ValueError, match=r"old_logprobs\.anchor"):
        loss_of(Objective(ICEPOP, FourPolicy()), batch, current(batch))


@pytest.mark.parametrize("keys", [{"anchor_cap": 0.5}, {"max_ratio": 0.0}, {"low": 2.0}])
def test_bounds_that_re_weight_agreement_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(keys))):
        FourPolicy(**keys)
