import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.composition import compose
from shared.algo.corrections import (
    Layout,
    icepop,
    kl_mask,
    kpop_mask,
    outside,
    prob_diff_mask,
    self_normalise,
    seq_mask,
    seq_tis,
    tis_token,
    token_mask,
    trm,
    veto,
    weight_mean,
)

D = torch.tensor([0.25, 0.5, 1.0, 2.0, 5.0, 8.0], dtype=torch.float64)


def layout(*lengths: int, mask: list[int] | None = None) -> Layout:
    seq = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    loss_mask = torch.ones(len(seq)) if mask is None else torch.tensor(mask)
    return Layout(loss_mask.bool(), seq, len(lengths))


def test_token_corrections_by_hand():
    log_d = D.log()
    assert tis_token(log_d).tolist() == pytest.approx([0.25, 0.5, 1.0, 2.0, 2.0, 2.0])
    assert tis_token(log_d, low=0.5, high=4.0).tolist() == pytest.approx([0.5, 0.5, 1, 2, 4, 4])
    assert icepop(log_d, low=0.4, high=5.5).tolist() == pytest.approx([0, 0.5, 1, 2, 5, 0])
    assert token_mask(log_d, low=0.4, high=2.5).tolist() == [False, True, True, True, False, False]


def test_bounds_are_inclusive():
    log_d = torch.tensor([0.5, 1.0], dtype=torch.float64).log()
    low, high = float(log_d.exp()[0]), 1.0
    assert icepop(log_d, low=low, high=high).tolist() == [low, 1.0]
    assert token_mask(log_d, low=low, high=high).all()


def test_a_token_on_a_bound_has_no_cause():
    one = torch.zeros(1, dtype=torch.float64)
    for causes in (outside(one, layout(1), 1.0, 5.0), outside(one, layout(1), 0.5, 1.0)):
        assert not any(where.any() for where in causes.values())


def test_the_mask_bounds_the_ratio_itself_not_its_inverse():
    # with bounds 0.1..1.05, D = 1.2 goes and D = 0.833 stays (verl's token_k1 does the opposite)
    log_d = torch.tensor([1.2, 1 / 1.2], dtype=torch.float64).log()
    assert token_mask(log_d, low=0.1, high=1.05).tolist() == [False, True]


def test_sequence_corrections_by_hand():
    log_d = torch.tensor([2.0, 3.0, 9.0, 0.5, 0.5], dtype=torch.float64).log()
    two = layout(3, 2, mask=[1, 1, 0, 1, 1])  # products 6 and 0.25: the 9 is no loss token
    assert seq_tis(log_d, two, high=4.0).tolist() == pytest.approx([4, 4, 4, 0.25, 0.25])
    assert seq_mask(log_d, two, low=0.2, high=5.0).tolist() == [False] * 3 + [True] * 2
    geometric = seq_mask(log_d, two, low=0.6, high=2.5, kind="geo")  # sqrt 6 = 2.449, 0.5
    assert geometric.tolist() == [True] * 3 + [False] * 2


def test_a_product_grows_with_length_and_the_geometric_mean_does_not():
    log_d = torch.full((110,), math.log(1.1), dtype=torch.float64)
    short_and_long = layout(10, 100)
    product = seq_mask(log_d, short_and_long, low=0.1, high=10.0)
    geometric = seq_mask(log_d, short_and_long, low=0.1, high=10.0, kind="geo")
    assert product.tolist() == [True] * 10 + [False] * 100
    assert geometric.all()


def test_the_veto_drops_the_whole_sequence_for_one_loss_token():
    log_d = torch.tensor([1.0, 5e-5, 1.0, 5e-5], dtype=torch.float64).log()
    assert veto(log_d, layout(2, 2, mask=[1, 1, 1, 0])).tolist() == [False, False, True, True]
    assert veto(torch.tensor([1.1e-4]).log(), layout(1)).all()


def test_a_two_sided_veto_and_a_trust_region_are_strict_at_their_bounds():
    log_d = torch.tensor([1.0, 128.0, 1.0, 0.5, 2.0], dtype=torch.float64).log()
    three = layout(2, 1, 2)
    assert veto(log_d, three, above=100.0).tolist() == [False, False, True, True, True]
    assert veto(log_d, three, above=128.0).all()
    low = float(log_d.exp()[3])
    assert trm(log_d, three, low=low, high=2.0).tolist() == [False, False, True, True, True]
    assert trm(log_d, three, low=0.51, high=2.0).tolist() == [False, False, True, False, False]


def test_divergence_masks_by_hand():
    # ½ log² 2 = 0.2402, 2 - 1 - log 2 = 0.3069; ½ - 1 + log 2 = 0.1931
    log_d = torch.tensor([2.0, 1.0, 9.0, 0.5], dtype=torch.float64).log()
    two = layout(3, 1, mask=[1, 1, 0, 1])
    for estimator, agg, high, kept in [
        ("k2", "token", 0.2403, [1, 1, 0, 1]),
        ("k2", "token", 0.2402, [0, 1, 0, 0]),
        ("k3", "token", 0.2, [0, 1, 0, 1]),
        ("k3", "sum", 0.31, [1, 1, 1, 1]),
        ("k3", "sum", 0.30, [0, 0, 0, 1]),
        ("k3", "mean", 0.16, [1, 1, 1, 0]),  # 0.1534 and 0.1931
        ("k2", "max", 0.23, [0, 0, 0, 0]),
        ("k3", "max", 0.31, [1, 1, 1, 1]),
    ]:
        keep = kl_mask(log_d, two, high=high, estimator=estimator, agg=agg)
        assert keep.tolist() == [bool(k) for k in kept], (estimator, agg, high)


def test_a_trust_region_is_the_largest_divergence():
    log_d = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64)
    singles = layout(*[1] * 40)
    by_region = trm(log_d, singles, low=0.6, high=1 / 0.6)
    by_divergence = kl_mask(
        log_d, singles, estimator="k2", agg="max", high=0.5 * math.log(0.6) ** 2
    )
    assert torch.equal(by_region, by_divergence)


def test_probability_differences_by_hand():
    old = torch.tensor([0.9, 0.5, 0.02, 0.001], dtype=torch.float64)
    inf = torch.tensor([0.6, 0.4, 0.01, 0.0001], dtype=torch.float64)
    assert prob_diff_mask(old.log(), inf.log()).tolist() == [False, True, True, True]
    assert prob_diff_mask(inf.log(), old.log()).tolist() == [False, True, True, True]
    # D = 1.5, 1.25, 2, 10: a bound on the ratio drops what hardly moves any probability
    kpop = kpop_mask(old.log(), inf.log(), high=0.02)
    # 0.9 log 1.5 + 0.1 log 0.25 = 0.2263; 0.0201 and 0.0204; 0.0040 and 0.0031; 0.0014
    assert kpop.tolist() == [False, False, True, True]
    assert kpop_mask(old.log(), inf.log(), high=0.0205).tolist() == [False, True, True, True]
    # the larger of the two directions decides, and the difference has a sign
    assert kpop_mask(old.log(), inf.log(), high=0.02025).tolist()[1] is False
    assert prob_diff_mask(old.log(), inf.log(), low=-0.2, high=0.05).tolist()[1] is False
    assert prob_diff_mask(inf.log(), old.log(), low=-0.2, high=0.05).tolist()[1] is True
    certain = torch.zeros(1, dtype=torch.float64)
    assert kpop_mask(certain, certain, high=1e-9).all()


def test_a_sequence_without_loss_tokens_is_kept_and_counts_nowhere():
    log_d = torch.tensor([99.0, 1.0], dtype=torch.float64).log()
    two = layout(1, 1, mask=[0, 1])
    for agg in ("sum", "mean", "max"):
        assert kl_mask(log_d, two, high=0.01, agg=agg).all()
    assert trm(log_d, two).all()
    assert weight_mean(log_d.exp(), two, level="sequence").item() == 1.0


def test_self_normalised_weights_have_mean_one_per_token_and_per_sequence():
    weights = torch.tensor([1.0, 3.0, 2.0, 100.0])
    three = layout(2, 2, mask=[1, 1, 1, 0])
    assert weight_mean(weights, three).item() == pytest.approx(2.0)
    assert weight_mean(weights, three, level="sequence").item() == pytest.approx(2.0)
    assert self_normalise(weights, weight_mean(weights, three)).tolist() == [0.5, 1.5, 1.0, 50.0]
    uneven = layout(1, 2)
    by_sequence = weight_mean(torch.tensor([1.0, 2.0, 4.0]), uneven, level="sequence")
    assert by_sequence.item() == pytest.approx((1 + 3) / 2)


def test_masks_come_from_untruncated_ratios_and_the_original_mask():
    # token 0 is rejected as too high; its D of 5e-5 elsewhere in the sequence must still veto,
    # and truncation to [0, 2] must not hide the 9 from a mask.
    log_d = torch.tensor([9.0, 5e-5, 1.0], dtype=torch.float64).log()
    verdict = compose([{"kind": "icepop"}, {"kind": "veto"}]).apply(log_d, layout(2, 1))
    assert {k: v.tolist() for k, v in verdict.rejected.items()} == {
        "token_low": [False, True, False],
        "token_high": [True, False, False],
        "veto": [True, True, False],
    }
    assert verdict.weight_T.tolist() == pytest.approx([0, 0, 1])


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    st.sampled_from(["icepop", "tis", "token_mask"]),
    st.floats(0.0, 0.9),
    st.floats(1.1, 10.0),
)
def test_every_kind_keeps_weights_finite_and_leaves_agreement_alone(
    values: list[float], kind: str, low: float, high: float
):
    log_d = torch.tensor([*values, 0.0], dtype=torch.float64)
    entry = {"kind": kind, "low": low, "high": high}
    verdict = compose([entry]).apply(log_d, layout(len(log_d)))
    assert torch.isfinite(verdict.weight_T).all()
    assert (verdict.weight_T >= 0).all()
    assert verdict.weight_T[-1] == 1.0
    rejected = torch.zeros(len(log_d), dtype=torch.bool)
    for where in verdict.rejected.values():
        rejected |= where
    assert not rejected[-1]
    if kind in ("icepop", "tis"):
        assert verdict.weight_T[~rejected].max() <= high
