import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from shared.algo.batching import PackedBatch, pack
from shared.algo.correction_specs import IcePop, Veto
from shared.algo.kl_spec import KlSpec
from shared.algo.losses import Denominators
from shared.algo.objective import Objective
from shared.algo.objective_specs import Ppo
from shared.algo.policy_loss import PER_TOKEN, REFERENCE, PolicyLoss, count

NOW = 6


@dataclass
class Output:
    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor | None = None


def make(lengths: tuple[int, ...] = (6, 4, 9), seed: int = 0, spread: float = 0.1) -> PackedBatch:
    rng = np.random.default_rng(seed)

    def each(draw):
        return [draw(n) for n in lengths]

    old = each(lambda n: -rng.random(n) * 3)
    return pack(
        each(lambda n: rng.integers(0, 9, n)),
        {
            "loss_mask": each(lambda n: (np.arange(n) % 3 > 0).astype(np.uint8)),
            "old_logprobs": old,
            "sampler_logprobs": [o + spread * rng.normal(size=len(o)) for o in old],
            "advantages": [np.full(n, a) for n, a in zip(lengths, (1.0, -0.5, 0.25), strict=True)],
            "versions": each(lambda n: rng.integers(NOW - 4, NOW + 1, n)),
        },
    )


def current(batch: PackedBatch, shift: float = 0.05, seed: int = 1) -> torch.Tensor:
    noise = torch.randn(
        batch.num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return (batch.per_token["old_logprobs"] + shift * noise).requires_grad_()


def by_hand(batch: PackedBatch, l_T: torch.Tensor, want: Objective) -> float:
    """Section 2, token by token, in plain python."""
    p = {name: batch.per_token[name].tolist() for name in PER_TOKEN}
    owner = [i for i, n in enumerate(batch.lengths) for _ in range(n)]
    d = [math.exp(o - i) for o, i in zip(p["old_logprobs"], p["sampler_logprobs"], strict=True)]
    tokens = [t for t in range(batch.num_tokens) if p["loss_mask"][t]]
    mask = next((c for c in want.corrections if isinstance(c, IcePop)), None)
    vetoes = [c.below for c in want.corrections if isinstance(c, Veto)]
    clip = want.objective
    assert isinstance(clip, Ppo)
    vetoed = {owner[t] for t in tokens for below in vetoes if d[t] < below}
    total = 0.0
    for t in tokens:
        if owner[t] in vetoed or (mask and not mask.low <= d[t] <= mask.high):
            continue
        s, a = math.exp(l_T[t].item() - p["old_logprobs"][t]), p["advantages"][t]
        clipped = min(max(s, 1 - clip.low), 1 + clip.high)
        loss = -min(s * a, clipped * a)
        if a < 0 and clip.dual is not None:
            loss = min(loss, -clip.dual * a)
        total += d[t] * loss
    return total / len(tokens)


@pytest.mark.parametrize(("spread", "shift"), [(0.1, 0.05), (1.0, 0.5), (5.0, 2.0)])
def test_the_loss_equals_the_order_of_operations_token_by_token(spread: float, shift: float):
    batch = make(spread=spread)
    l_T = current(batch, shift)
    objective = Objective()
    step = PolicyLoss(objective).minibatch(count([batch]), version_now=NOW)
    assert step(Output(l_T), batch).item() == pytest.approx(by_hand(batch, l_T, objective))


def test_only_loss_tokens_are_ever_read():
    batch = make()
    outside = ~batch.per_token["loss_mask"].bool()
    step = PolicyLoss(Objective()).minibatch(count([batch]), version_now=NOW)
    clean = step(Output(current(batch)), batch).item()
    for name in PER_TOKEN[1:]:
        poison = torch.nan if batch.per_token[name].is_floating_point() else -1
        batch.per_token[name] = batch.per_token[name].masked_fill(outside, poison)
    l_T = current(make()).detach().masked_fill(outside, torch.nan).requires_grad_()
    again = PolicyLoss(Objective()).minibatch(count([batch]), version_now=NOW)
    loss = again(Output(l_T), batch)
    loss.backward()
    assert loss.item() == clean
    assert l_T.grad is not None
    assert torch.isfinite(l_T.grad).all()
    assert l_T.grad[outside].abs().max() == 0


def test_its_gradient_is_that_of_finite_differences():
    batch = make(spread=0.3)
    policy_loss = PolicyLoss(Objective(entropy_bonus=0.1))

    def loss(l_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        return policy_loss.compute(Output(l_T, entropy_T), batch, count([batch]))[0]

    entropy = torch.rand(batch.num_tokens, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (current(batch), entropy))


@pytest.mark.parametrize(
    "mode", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_constant"]
)
def test_micro_batches_with_global_denominators_add_up(mode: str):
    objective = Objective(
        aggregation=mode, horizon=20.0 if mode == "seq_mean_constant" else None, entropy_bonus=0.01
    )
    whole, l_T = make(), None
    lists = {n: [x.numpy() for x in whole.split(whole.per_token[n])] for n in PER_TOKEN}
    ids = [x.numpy() for x in whole.split(whole.token_ids_T)]
    parts = [
        pack(ids[:2], {n: lists[n][:2] for n in PER_TOKEN}),
        pack(ids[2:], {n: lists[n][2:] for n in PER_TOKEN}),
    ]
    l_T = current(whole)
    entropy_T = torch.rand(whole.num_tokens, dtype=torch.float64)
    by = count(parts, objective.horizon)
    assert by == count([whole], objective.horizon)
    one = PolicyLoss(objective).minibatch(by, version_now=NOW)
    want = one(Output(l_T, entropy_T), whole).item()
    two = PolicyLoss(objective).minibatch(by, version_now=NOW)
    for part, values, entropies in zip(
        parts, l_T.split([10, 9]), entropy_T.split([10, 9]), strict=True
    ):
        two(Output(values, entropies), part)
    assert two.loss == pytest.approx(want)
    first, second = one.report()[0], two.report()[0]
    assert first == pytest.approx(second)


def test_sequences_of_one_trajectory_are_vetoed_together():
    batch = make(spread=0.0)
    start = batch.lengths[0]
    batch.per_token["sampler_logprobs"][start + 1] += 12.0  # D = e^-12 in the second sequence
    step = PolicyLoss(Objective()).minibatch(count([batch]), version_now=NOW)
    step(Output(current(batch)), batch)
    per_sequence = step.report()[0]["rej_veto"]
    batch.per_token["trajectory"] = torch.tensor([0] * 10 + [1] * 9)
    assert count([batch]).num_sequences == 2
    joined = PolicyLoss(Objective()).minibatch(count([batch]), version_now=NOW)
    joined(Output(current(batch)), batch)
    mask = batch.per_token["loss_mask"].bool()
    assert per_sequence == pytest.approx(int(mask[6:10].sum()) / int(mask.sum()))
    assert joined.report()[0]["rej_veto"] == pytest.approx(int(mask[:10].sum()) / int(mask.sum()))


def test_a_token_without_a_finite_ratio_is_rejected_and_counted():
    batch = make()
    batch.per_token["old_logprobs"][1] = -torch.inf
    l_T = current(make())
    step = PolicyLoss(Objective()).minibatch(count([batch]), version_now=NOW)
    loss = step(Output(l_T), batch)
    loss.backward()
    assert math.isfinite(loss.item())
    assert l_T.grad is not None
    assert l_T.grad[1] == 0
    scalars, _ = step.report()
    assert scalars["rej_nonfinite"] == pytest.approx(1 / scalars["num_loss_tokens"])


def test_on_policy_and_one_engine_is_the_plain_policy_gradient():
    batch = make(spread=0.0)
    l_T = current(batch, shift=0.0)
    step = PolicyLoss(Objective()).minibatch(count([batch]), version_now=NOW)
    loss = step(Output(l_T), batch)
    loss.backward()
    mask = batch.per_token["loss_mask"].bool()
    want = torch.where(mask, -batch.per_token["advantages"] / mask.sum(), 0.0)
    assert torch.equal(l_T.grad, want)
    scalars, arrays = step.report()
    assert (scalars["s_min"], scalars["s_max"], scalars["d_k3"]) == (1.0, 1.0, 0.0)
    assert (scalars["clipped_on_arrival"], scalars["rej_any"], scalars["contributing"]) == (0, 0, 1)
    assert arrays["age_k3_d_sum"].tolist() == [0.0] * len(arrays["age_count"])


def test_the_report_covers_ages_ratios_and_scatter():
    batch = make()
    l_T = current(batch)
    step = PolicyLoss(Objective()).minibatch(count([batch]), version_now=NOW, first=False)
    step(Output(l_T), batch)
    scalars, arrays = step.report(scatter_size=4, num_ages=6)
    mask = batch.per_token["loss_mask"].bool()
    ages = NOW - batch.per_token["versions"][mask]
    log_d = (batch.per_token["old_logprobs"] - batch.per_token["sampler_logprobs"])[mask]
    log_rho = (l_T.detach() - batch.per_token["sampler_logprobs"])[mask]
    assert arrays["age_count"].tolist() == torch.bincount(ages, minlength=6).tolist()
    for age in range(6):
        at = ages == age
        want = (torch.expm1(log_d[at]) - log_d[at]).sum().item()
        assert arrays["age_k3_d_sum"][age] == pytest.approx(want)
        want = (torch.expm1(log_rho[at]) - log_rho[at]).sum().item()
        assert arrays["age_k3_rho_sum"][age] == pytest.approx(want)
    assert arrays["scatter"].shape == (4, 3)
    assert scalars["num_loss_tokens"] == int(mask.sum())
    assert scalars["staleness_max"] == int(ages.max())
    assert "clipped_on_arrival" not in scalars
    assert all(isinstance(v, float) and math.isfinite(v) for v in scalars.values())


def test_a_micro_batch_without_loss_tokens_adds_nothing():
    batch, empty = make(), make(seed=5)
    empty.per_token["loss_mask"] = torch.zeros(empty.num_tokens)
    l_T = current(batch)
    alone = PolicyLoss(Objective()).minibatch(count([batch]), version_now=NOW)
    want = alone(Output(l_T), batch).item()
    step = PolicyLoss(Objective()).minibatch(count([batch, empty]), version_now=NOW)
    step(Output(l_T), batch)
    nothing = step(Output(current(empty)), empty)
    nothing.backward()
    assert nothing.item() == 0.0
    assert step.loss == want
    assert step.report()[0] == alone.report()[0]


def test_missing_inputs_are_named():
    batch = make()
    policy_loss = PolicyLoss(Objective(entropy_bonus=0.1))
    assert policy_loss.needs_entropy
    with pytest.raises(ValueError, match="with_entropy"):
        policy_loss.compute(Output(current(batch)), batch, count([batch]))
    del batch.per_token["versions"]
    with pytest.raises(ValueError, match="versions"):
        policy_loss.compute(Output(current(make())), batch, Denominators(1.0, 1.0))
    with pytest.raises(ValueError, match="no micro-batch"):
        policy_loss.minibatch(Denominators(1.0, 1.0), version_now=0).report()


@pytest.mark.parametrize("proxy", ["loglinear", "linear"])
def test_a_proxy_stands_for_the_old_log_prob_by_the_age_of_each_token(proxy):
    batch = make(spread=0.4)
    l_T = current(batch)
    ages = (NOW - batch.per_token["versions"]).tolist()
    stand_in = []
    for now, inf, age in zip(
        l_T.tolist(), batch.per_token["sampler_logprobs"].tolist(), ages, strict=True
    ):
        alpha = (age - 1) / age if age > 0 else 0.0
        mixed = math.log((1 - alpha) * math.exp(inf) + alpha * math.exp(now))
        stand_in.append(inf + alpha * (now - inf) if proxy == "loglinear" else mixed)
    old = torch.tensor(stand_in, dtype=torch.float64)
    replaced = PackedBatch(
        batch.token_ids_T, batch.positions_T, batch.lengths, batch.per_token | {"old_logprobs": old}
    )
    want = Objective(corrections=(IcePop(low=0.8, high=1.2),))
    loss, trace = PolicyLoss(want, proxy=proxy).compute(
        Output(l_T), batch, count([batch]), version_now=NOW
    )
    assert loss.item() == pytest.approx(by_hand(replaced, l_T, want), rel=1e-9)
    assert any(where.any() for where in trace.rejected.values())


def test_divergence_and_entropy_are_means_over_all_loss_tokens_rejected_ones_too():
    batch = make(spread=1.0)
    l_T = current(batch)
    generator = torch.Generator().manual_seed(3)
    reference_T = l_T.detach() + 0.3 * torch.randn(
        batch.num_tokens, dtype=torch.float64, generator=generator
    )
    entropy_T = torch.rand(batch.num_tokens, dtype=torch.float64, generator=generator)
    batch.per_token[REFERENCE] = reference_T
    plain = Objective(corrections=(IcePop(),))
    full = replace(plain, kl=KlSpec(coefficient=0.5, estimator="k2"), entropy_bonus=0.1)
    output, counts = Output(l_T, entropy_T), count([batch])
    loss, trace = PolicyLoss(full).compute(output, batch, counts, version_now=NOW)
    base, _ = PolicyLoss(plain).compute(output, batch, counts, version_now=NOW)
    assert any(where.any() for where in trace.rejected.values())
    m_T = batch.per_token["loss_mask"].bool()
    divergence = float((0.5 * (reference_T - l_T.detach()).square())[m_T].mean())
    want = 0.5 * divergence - 0.1 * float(entropy_T[m_T].mean())
    assert (loss - base).item() == pytest.approx(want, rel=1e-9)
