"""Which routes may look on beside which, and what is said of those that may not."""

from __future__ import annotations

from typing import Any

import pytest

from services.learner.routes.registry import ROUTES
from shared.runtime.config import load
from shared.runtime.errors import ConfigError
from shared.runtime.sections import EXACT_ROUTES, SHADOWS, CommonConfig, OldLogprobsSection


def section(**tree: Any) -> OldLogprobsSection:
    return load(CommonConfig, {"old_logprobs": tree}).old_logprobs


@pytest.mark.parametrize("route", ROUTES)
def test_every_approximate_route_can_look_on_beside_every_route(route: str) -> None:
    approximate = tuple(n for n in ROUTES if n not in EXACT_ROUTES and n != route)
    assert section(route=route, shadow=approximate).shadow == approximate


def test_all_routes_of_the_registry_but_interrupt_can_be_shadows() -> None:
    assert set(SHADOWS) == set(ROUTES) - {"interrupt"}
    assert {name for name, route in ROUTES.items() if route.exact} == EXACT_ROUTES  # type: ignore[attr-defined]


def test_an_approximate_route_can_have_an_exact_reference() -> None:
    found = section(route="ppo_ewma_async", shadow=["oracle", "snapshot_old", "rollout"])
    assert found.shadow == ("oracle", "snapshot_old", "rollout")


def test_current_recompute_looks_on_by_default_where_there_is_an_exact_answer() -> None:
    assert section().shadow == section(route="snapshot_old").shadow == ("current_recompute",)
    assert section(route="current_recompute").shadow == section(route="rollout").shadow == ()
    assert section(shadow=[]).shadow == ()


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"shadow": ["interrupt"]}, "interrupt cannot be a shadow: it stops all sampling"),
        ({"shadow": ["curent_recompute"]}, "'curent_recompute' is none of oracle, snapshot_old"),
        ({"route": "rollout", "shadow": ["rollout"]}, "rollout is old_logprobs.route itself"),
        ({"route": "interrupt", "shadow": ["oracle"]}, "oracle cannot look on beside interrupt"),
        ({"shadow": ["rollout", "rollout"]}, "rollout is listed twice"),
        ({"shadow_share": 0}, "shadow_share"),
        ({"shadow_share": 1.5}, "shadow_share"),
    ],
)
def test_what_cannot_look_on_is_one_line(tree: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**tree)
    assert line in str(caught.value)
    assert "old_logprobs.shadow" in str(caught.value)
    assert "\n" not in str(caught.value)
