"""Objective four_policy in a run: what must be configured together."""

from __future__ import annotations

import copy

import pytest

from services.learner.config import LearnerConfig
from shared.runtime.errors import ConfigError

FOUR = {"learner": {"algo": {"objective": {"kind": "four_policy"}}}}


def config(anchor: str, *, route: str = "oracle", four: bool = True) -> LearnerConfig:
    tree = copy.deepcopy(FOUR) if four else {}
    return LearnerConfig.model_validate(
        {**tree, "old_logprobs": {"route": route, "anchor": anchor, "shadow": []}}
    )


@pytest.mark.parametrize(
    ("anchor", "route", "four", "said"),
    [
        ("", "oracle", True, "four_policy needs an anchor"),
        ("ewma_prox", "oracle", False, "nothing else takes one"),
        ("ewma_prox", "ewma_prox", True, "S1 = 1"),
        ("snapshot", "oracle", True, "ppo_ewma_async"),
    ],
)
def test_what_does_not_go_together_is_refused(
    anchor: str, route: str, four: bool, said: str
) -> None:
    with pytest.raises((ValueError, ConfigError), match=said):
        config(anchor, route=route, four=four)


@pytest.mark.parametrize("anchor", ["current_recompute", "ewma_prox", "ppo_ewma_async"])
def test_an_anchor_beside_an_exact_route_is_accepted(anchor: str) -> None:
    assert config(anchor).old_logprobs.anchor == anchor
