import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from shared.algo.layout import Layout
from shared.algo.loss_terms import Tokens
from shared.algo.objective_base import kind_of
from shared.algo.objective_specs import (
    OBJECTIVE_SPECS,
    Cispo,
    Gspo,
    ObjectiveSpec,
    Ppo,
    Topr,
    objective_from,
)
from shared.algo.objective_terms import objective_terms


def test_an_entry_names_its_kind_and_overrides_defaults():
    assert objective_from({}) == Ppo(low=0.2, high=0.28, dual=3.0)
    assert objective_from({"kind": "gspo", "low": 0.01}) == Gspo(low=0.01, high=4e-4)
    assert objective_from({"kind": "ppo", "dual": None}).dual is None


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"objective.kind: 'gpso' is none of ppo, gspo, "):
        objective_from({"kind": "gpso"})
    with pytest.raises(ValueError, match=r"objective: sapo has no low; it takes tau_positive, "):
        objective_from({"kind": "sapo", "low": 0.2})


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"kind": "ppo", "low": 0.0}, "low"),
        ({"kind": "ppo", "low": 1.5}, "low"),
        ({"kind": "ppo", "high": 0.0}, "high"),
        ({"kind": "ppo", "dual": 1.0}, "dual"),
        ({"kind": "gspo_token", "high": math.nan}, "high"),
        ({"kind": "cispo", "low": -0.1}, "low"),
        ({"kind": "cispo", "anchor": "sampler"}, "anchor"),
        ({"kind": "reinforce", "cap": 0.5}, "cap"),
        ({"kind": "topr", "level": "turn"}, "level"),
        ({"kind": "sapo", "tau_negative": 0.0}, "tau_negative"),
        ({"kind": "dppo_tv", "low": 0.0}, "low"),
        ({"kind": "dppo_kl", "cap": 0.0}, "cap"),
        ({"kind": "prime_rl_default", "kappa": -1.0}, "kappa"),
        ({"kind": "vespo", "k_positive": math.inf}, "k_positive"),
        ({"kind": "opsm", "delta": -1e-4}, "delta"),
        ({"kind": "m2po", "threshold": 0.0}, "threshold"),
        ({"kind": "four_policy", "anchor_cap": 0.5}, "anchor_cap"),
        ({"kind": "four_policy", "max_ratio": 0.0}, "max_ratio"),
    ],
)
def test_degenerate_settings_are_refused_with_key_and_fix(entry: dict[str, float], key: str):
    with pytest.raises(ValueError, match=rf"objective\.{key}: .*; use "):
        objective_from(entry)


def test_a_settings_model_tells_the_kinds_apart():
    adapter = TypeAdapter(ObjectiveSpec)
    for kind, cls in OBJECTIVE_SPECS.items():
        parsed = adapter.validate_python({"kind": kind})
        assert isinstance(parsed, cls)
        assert kind_of(parsed) == kind
        assert parsed == cls()
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "gspo", "hihg": 0.2})


@pytest.mark.parametrize("kind", OBJECTIVE_SPECS)
def test_the_weight_multiplies_exactly_where_the_ratio_is_the_staleness(kind: str):
    spec = objective_from({"kind": kind})
    layout = Layout(torch.ones(2, dtype=torch.bool), torch.tensor([0, 0]), 1)
    old, one = torch.tensor([-1.0, -2.0]).double(), torch.ones(2).double()

    def loss(weight: torch.Tensor) -> torch.Tensor:
        given = Tokens.of(old + 1e-4, old, old - 1e-4, one, weight, layout, one, old)
        return objective_terms(given, spec).loss_T

    factor = 3.0 if spec.uses_weight else 1.0
    torch.testing.assert_close(loss(3.0 * one), factor * loss(one))


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_anchored_on_the_sampler_an_objective_ignores_the_old_logits(first: float, second: float):
    layout = Layout(torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), 1)
    one, now = torch.ones(1).double(), torch.tensor([-1.0]).double()
    for kind, cls in OBJECTIVE_SPECS.items():
        takes = {f.name for f in fields(cls)}
        entry = {"kind": kind} | ({"anchor": "rollout"} if "anchor" in takes else {})
        spec = objective_from(entry)
        if spec.uses_weight:
            continue
        losses = [
            objective_terms(Tokens.of(now, now + old, now - 0.3, one, one, layout, one), spec)
            for old in (first, second)
        ]
        assert losses[0].loss_T.item() == losses[1].loss_T.item()


@pytest.mark.parametrize("kind", OBJECTIVE_SPECS)
def test_only_the_current_policy_is_differentiated(kind: str):
    layout = Layout(torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), 1)
    values = (-1.0, -1.01, -1.02, 1.0, 1.0)
    now, *others = (torch.tensor([x], requires_grad=True) for x in values)
    prox = torch.tensor([-1.03], requires_grad=True)
    given = Tokens.of(now, *others, layout, torch.ones(1), prox)
    objective_terms(given, objective_from({"kind": kind})).loss_T.sum().backward()
    assert now.grad is not None
    assert [x.grad for x in (*others, prox)] == [None] * 5


def test_a_missing_score_is_an_error():
    layout = Layout(torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), 1)
    one = torch.ones(1)
    with pytest.raises(ValueError, match="topr needs the raw reward"):
        objective_terms(Tokens.of(-one, -one, -one, one, one, layout), Topr())


def test_tokens_outside_the_mask_or_not_finite_are_neutral():
    nan = float("nan")
    layout = Layout(torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.int64), 1)
    now = torch.tensor([-1.0, -5.0, nan], dtype=torch.bfloat16)
    given = Tokens.of(now, now - 1, now - 2, torch.ones(3), torch.ones(3), layout)
    assert given.l_T.dtype == torch.float32
    assert given.log_ratio("old").tolist() == [1.0, 0.0, 0.0]
    assert given.log_ratio("rollout").tolist() == [2.0, 0.0, 0.0]


def test_facts_that_a_run_needs_before_it_starts():
    assert Cispo().uses_weight
    assert not Cispo(anchor="rollout").uses_weight
    whole = {kind for kind, cls in OBJECTIVE_SPECS.items() if cls.whole_sequences}
    assert whole == {"gspo", "gspo_token", "topr", "vespo", "opsm"}
    assert [kind for kind, cls in OBJECTIVE_SPECS.items() if cls.needs_score] == ["topr"]
    assert [kind for kind, cls in OBJECTIVE_SPECS.items() if cls.needs_prox] == ["four_policy"]
