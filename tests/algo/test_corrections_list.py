import math
from typing import Annotated

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from shared.algo.composition import compose
from shared.algo.correction_list import DEFAULT_CORRECTIONS, spec_from
from shared.algo.correction_specs import LOG_BOUND, SPECS, CorrectionSpec, IcePop, Tis, Veto
from shared.algo.layout import Layout
from shared.algo.objective import Objective
from shared.algo.ratios import SAFETY_BOUND

# D of two sequences: 8 and 5e-5 in the first
LOG_D = torch.tensor([8.0, 5e-5, 1.0, 1.5, 0.25, 1.0], dtype=torch.float64).log()
LAYOUT = Layout(torch.ones(6).bool(), torch.tensor([0, 0, 0, 1, 1, 1]), 2)


def by_cause(verdict) -> dict[str, list[int]]:
    return {cause: where.nonzero()[:, 0].tolist() for cause, where in verdict.rejected.items()}


def test_masks_see_untruncated_ratios_and_the_original_mask():
    verdict = compose(
        [
            {"kind": "tis", "low": 0.5, "high": 2.0},  # would hide 8 and 5e-5 from every mask
            {"kind": "token_mask", "low": 0.1, "high": 5.0},  # would hide them from the others
            {"kind": "veto", "below": 1e-4},
            {"kind": "seq_mask", "low": 0.1, "high": 10.0},  # products 4e-4 and 0.375
            {"kind": "seq_geo_mask", "low": 0.5, "high": 2.0},  # roots 0.0737 and 0.721
            {"kind": "kl_mask", "estimator": "k2", "agg": "max", "high": 4.0},
        ]
    ).apply(LOG_D, LAYOUT)
    assert by_cause(verdict) == {
        "token_low": [1],
        "token_high": [0],
        "veto": [0, 1, 2],
        "seq": [0, 1, 2],
        "seq_geo": [0, 1, 2],
        "kl_max_k2": [0, 1, 2],
    }
    assert verdict.weight_T.tolist() == pytest.approx([2, 0.5, 1, 1.5, 0.5, 1])
    assert verdict.truncated_T.tolist() == [True, True, False, False, True, False]


def test_tis_inside_icepop_caps_before_icepop_zeroes():
    verdict = compose([IcePop(), Tis(high=1.2)]).apply(LOG_D, LAYOUT)
    assert verdict.weight_T.tolist() == pytest.approx([0, 0, 1, 1.2, 0, 1])
    assert by_cause(verdict) == {"token_low": [1, 4], "token_high": [0]}


def test_self_normalisation_follows_truncation_and_counts_rejected_tokens():
    verdict = compose([{"kind": "tis"}, {"kind": "self_normalise"}]).apply(LOG_D, LAYOUT)
    truncated = [2, 5e-5, 1, 1.5, 0.25, 1]
    mean = sum(truncated) / 6
    assert verdict.weight_T.tolist() == pytest.approx([w / mean for w in truncated])
    icepop = compose([{"kind": "icepop"}, {"kind": "self_normalise"}]).apply(LOG_D, LAYOUT)
    mean = (1 + 1.5 + 1) / 6  # three zeros count
    assert icepop.weight_T.tolist() == pytest.approx([0, 0, 1 / mean, 1.5 / mean, 0, 1 / mean])


def test_sequence_weights_are_normalised_over_sequences():
    layout = Layout(torch.ones(4).bool(), torch.tensor([0, 1, 1, 1]), 3)  # sequence 2 is empty
    log_d = torch.tensor([0.5, 1.5, 1.0, 1.0], dtype=torch.float64).log()
    specs = [{"kind": "seq_tis"}, {"kind": "self_normalise"}]
    assert compose(specs).normalise_level == "sequence"
    weights = compose(specs).apply(log_d, layout).weight_T
    assert weights.tolist() == pytest.approx([0.5, 1.5, 1.5, 1.5])  # mean over two sequences: 1
    per_token = compose([specs[0], {"kind": "self_normalise", "level": "token"}])
    assert per_token.apply(log_d, layout).weight_T[0].item() == pytest.approx(0.5 / 1.25)


@pytest.mark.parametrize("kind", ["tis", "seq_tis", "icepop"])
def test_totals_of_micro_batches_normalise_by_the_mean_of_the_step(kind: str):
    composition = compose([{"kind": kind}, {"kind": "self_normalise"}, {"kind": "veto"}])
    whole = composition.apply(LOG_D, LAYOUT).weight_T
    parts = [
        (LOG_D[part], Layout(torch.ones(3).bool(), torch.zeros(3).long(), 1))
        for part in (slice(0, 3), slice(3, 6))
    ]
    first, second = (composition.totals(*part) for part in parts)
    mean = (first + second).mean
    weights = [composition.apply(*part, weight_mean=mean).weight_T for part in parts]
    torch.testing.assert_close(torch.cat(weights), whole)
    assert compose([{"kind": kind}]).totals(LOG_D, LAYOUT) is None


@pytest.mark.parametrize("empty", [Layout(torch.zeros(6).bool(), LAYOUT.seq_T, 2), LAYOUT])
def test_weights_that_are_all_zero_stay_finite(empty: Layout):
    composition = compose([{"kind": "icepop"}, {"kind": "self_normalise"}])
    log_d = torch.full((6,), -9.0, dtype=torch.float64)
    assert composition.apply(log_d, empty).weight_T.tolist() == [0.0] * 6


def test_the_default_list_is_the_objectives_and_an_empty_one_weighs_by_the_ratio():
    assert Objective().corrections == DEFAULT_CORRECTIONS
    assert compose([]).apply(LOG_D, LAYOUT).weight_T.tolist() == pytest.approx(LOG_D.exp().tolist())


COMPATIBLE = [
    {"kind": "tis"}, {"kind": "icepop"}, {"kind": "veto"}, {"kind": "seq_mask"},
    {"kind": "seq_geo_mask"}, {"kind": "kl_mask"}, {"kind": "self_normalise"},
    {"kind": "kl_mask", "agg": "token"}, {"kind": "prob_diff"}, {"kind": "kpop", "high": 0.1},
    {"kind": "segment_mask"},
]  # fmt: skip


@given(
    st.permutations(COMPATIBLE),
    st.lists(st.floats(-1, 1), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_the_order_of_the_list_does_not_matter(order, values: list[float], mask: list[bool]):
    log_d = torch.tensor(values, dtype=torch.float64)
    layout = Layout(torch.tensor(mask), LAYOUT.seq_T, 2)
    more = {
        "l_old_T": log_d - 2.0,
        "l_inf_T": torch.full((6,), -2.0, dtype=torch.float64),
        "versions_T": torch.tensor([1, 1, 2, 2, 2, 2]),
    }
    one = compose(order).apply(log_d, layout, **more)
    two = compose(COMPATIBLE).apply(log_d, layout, **more)
    assert torch.equal(one.weight_T, two.weight_T)
    assert one.rejected.keys() == two.rejected.keys()
    assert all(torch.equal(one.rejected[c], two.rejected[c]) for c in one.rejected)
    assert not any((where & ~layout.m_T).any() for where in one.rejected.values())


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"kind": "icepops"}, "none of importance, unit, tis"),
        ({"low": 0.5}, "None is none of"),
        ({"kind": "tis", "hihg": 2}, "unknown hihg; it takes low, high"),
        ({"kind": "unit", "low": 2}, "no parameters"),
        ({"kind": "kpop"}, "set high"),
        ({"kind": "kpop", "high": 0}, "positive"),
        ({"kind": "icepop", "low": 1.0}, "contain 1"),
        ({"kind": "token_mask", "low": -0.1}, "contain 1"),
        ({"kind": "seq_geo_mask", "low": 1.0001, "high": 1.001}, "contain 1"),
        ({"kind": "seq_mask", "high": math.nan}, "contain 1"),
        ({"kind": "segment_mask", "high": 0.9}, "contain 1"),
        ({"kind": "trm", "low": 1.5}, "contain 1"),
        ({"kind": "token_mask", "low": 0, "high": math.inf}, "never rejects"),
        ({"kind": "tis", "high": 0.9}, "contain 1"),
        ({"kind": "tis", "low": 1, "high": 1}, "unit"),
        ({"kind": "segment_tis", "high": math.inf}, "never truncates"),
        ({"kind": "seq_tis", "high": 1}, "above 1"),
        ({"kind": "kl_mask", "high": 0}, "positive"),
        ({"kind": "kl_mask", "estimator": "k1"}, "none of k2, k3"),
        ({"kind": "kl_mask", "agg": "min"}, "none of token, sum"),
        ({"kind": "veto", "below": 1.0}, "1e-4"),
        ({"kind": "veto", "below": 1e-9}, "clamped"),
        ({"kind": "veto", "above": 1.0}, "above"),
        ({"kind": "prob_diff", "low": 0.1}, "contain 0"),
        ({"kind": "prob_diff", "low": -1, "high": 1}, "never rejects"),
        ({"kind": "self_normalise", "level": "batch"}, "none of auto"),
    ],
)
def test_a_degenerate_correction_is_refused(entry, match: str):
    with pytest.raises(ValueError, match=match):
        spec_from(entry)


@pytest.mark.parametrize(
    ("kinds", "match"),
    [
        (["tis", "seq_tis"], "contradict"),
        (["importance", "unit"], "contradict"),
        (["tis", "tis"], "twice"),
        (["kl_mask", "kl_mask"], "twice"),
        (["icepop", "seq_tis"], "token_mask"),
        (["icepop", "token_mask"], "keep one"),
        (["self_normalise"], "without weights"),
        (["self_normalise", "token_mask"], "without weights"),
        (["unit", "self_normalise"], "changes nothing"),
        (["trm", "veto"], "veto rejects nothing"),
        (["trm", "token_mask"], "token_mask rejects nothing"),
        (["trm", "icepop"], "icepop rejects nothing"),
    ],
)
def test_a_list_that_contradicts_itself_is_refused(kinds: list[str], match: str):
    with pytest.raises(ValueError, match=match):
        compose([{"kind": kind} for kind in kinds])


def test_a_veto_that_leaves_the_token_mask_its_low_side_may_stand_beside_it():
    compose([IcePop(), Veto(below=0.4, above=4.0)])
    with pytest.raises(ValueError, match="icepop rejects nothing"):
        compose([IcePop(), Veto(below=0.6, above=4.0)])


def test_inputs_that_a_kind_needs_are_asked_for():
    for kind, match in [("segment_mask", "versions_T"), ("prob_diff", "l_old_T")]:
        with pytest.raises(ValueError, match=match):
            compose([{"kind": kind}]).apply(LOG_D, LAYOUT)


def test_a_configuration_model_reads_every_kind_and_refuses_a_typo():
    adapter = TypeAdapter(list[Annotated[CorrectionSpec, Field(discriminator="kind")]])
    for kind in SPECS:
        entry = {"kind": kind} | ({"high": 0.1} if kind == "kpop" else {})
        assert adapter.validate_python([entry]) == [spec_from(entry)]
    for wrong in ({"kind": "tis", "hihg": 2}, {"kind": "tsi"}, {"kind": "icepop", "low": 2}):
        with pytest.raises(ValidationError):
            adapter.validate_python([wrong])
    assert adapter.json_schema()["items"]["discriminator"]["mapping"].keys() == SPECS.keys()


def test_the_clamp_of_the_specs_is_that_of_the_ratios():
    assert LOG_BOUND == SAFETY_BOUND
