import subprocess
import sys
from typing import Any, get_args

import pytest

from shared.algo.objective import AGGREGATION_MODES, DISCREPANCY_BOUNDS, Objective
from shared.runtime.algo_section import AlgoSection, DiscrepancySection
from shared.runtime.config import load
from shared.runtime.errors import ConfigError
from shared.runtime.sections import CommonConfig


class Config(CommonConfig):
    algo: AlgoSection = AlgoSection()


def test_the_defaults_are_those_of_the_reference():
    assert AlgoSection().objective() == Objective(
        discrepancy="icepop",
        discrepancy_low=0.5,
        discrepancy_high=5.0,
        veto=1e-4,
        clip_low=0.2,
        clip_high=0.28,
        dual=3.0,
        entropy_bonus=0.0,
        aggregation="token_mean",
        horizon=None,
    )
    assert AlgoSection().advantage == "dr_grpo"
    assert AlgoSection().objective() == Objective()


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"discrepancy": {"low": 1.5}}, "discrepancy.*must contain 1.*use low"),
        ({"discrepancy": {"kind": "mask", "low": 0.5, "high": 1.0}}, "must contain 1"),
        ({"discrepancy": {"kind": "tis", "high": 0.5}}, "must contain 1.*use low"),
        ({"discrepancy": {"kind": "none", "low": 0.1}}, "takes no bounds; remove"),
        ({"discrepancy": {"kind": "icepopp"}}, "discrepancy.kind"),
        ({"veto": 1.0}, "veto.*use 1e-4"),
        ({"veto": 0}, "veto.*null"),
        ({"clip": {"low": 0}}, r"clip\.low.*use 0\.2"),
        ({"clip": {"low": 1.2}}, r"clip\.low"),
        ({"clip": {"high": 0}}, r"clip\.high.*use 0\.28"),
        ({"clip": {"dual": 1.0}}, r"clip\.dual.*null"),
        ({"entropy_bonus": -0.1}, "entropy_bonus.*use 0"),
        ({"aggregation": "seq_mean_constant"}, "horizon: set it"),
        ({"horizon": 100}, "horizon.*only then"),
        ({"aggregation": "token_sum_constant", "horizon": -1}, "horizon.*not positive"),
        ({"kl_coef": 0.1}, "kl_coef.*set kl_coef: 0.0"),
        ({"clipp": {}}, "algo.clipp. is not a known key"),
    ],
)
def test_a_degenerate_setting_is_refused_with_key_and_fix(tree: dict[str, Any], names: str):
    with pytest.raises(ConfigError, match=names) as caught:
        load(Config, {"algo": tree})
    assert "algo" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", DISCREPANCY_BOUNDS)
def test_every_kind_works_with_its_default_bounds(kind: Any):
    section = AlgoSection(discrepancy=DiscrepancySection(kind=kind))
    assert section.objective().discrepancy == kind
    if DISCREPANCY_BOUNDS[kind]:
        bounds = (section.objective().discrepancy_low, section.objective().discrepancy_high)
        assert bounds == DISCREPANCY_BOUNDS[kind]


def test_the_names_in_the_section_are_the_registered_ones():
    kinds = get_args(DiscrepancySection.model_fields["kind"].annotation)
    assert set(kinds) == set(DISCREPANCY_BOUNDS)
    modes = get_args(AlgoSection.model_fields["aggregation"].annotation)
    assert modes == AGGREGATION_MODES


@pytest.mark.parametrize(("key", "value"), [("discrepancy", "x"), ("aggregation", "mean")])
def test_an_objective_built_by_hand_is_checked_too(key: str, value: str):
    with pytest.raises(ValueError, match=value):
        Objective(**{key: value})


def test_the_section_imports_no_torch():
    code = "import sys, shared.runtime.algo_section; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
