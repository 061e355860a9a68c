import subprocess
import sys
from typing import Any, get_args

import pytest

from shared.algo.correction_specs import SPECS, IcePop, Veto
from shared.algo.objective import AGGREGATION_MODES, Objective
from shared.algo.objective_specs import OBJECTIVE_SPECS, Ppo
from shared.algo.presets import PRESETS
from shared.runtime.algo_section import AlgoSection
from shared.runtime.config import load
from shared.runtime.errors import ConfigError
from shared.runtime.sections import CommonConfig


class Config(CommonConfig):
    algo: AlgoSection = AlgoSection()


def test_the_defaults_are_those_of_the_reference():
    assert AlgoSection().settings() == Objective(
        corrections=(IcePop(low=0.5, high=5.0), Veto(below=1e-4)),
        objective=Ppo(low=0.2, high=0.28, dual=3.0),
        entropy_bonus=0.0,
        aggregation="token_mean",
        horizon=None,
    )
    assert AlgoSection().advantage == "dr_grpo"
    assert AlgoSection().settings() == Objective()


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"corrections": [{"kind": "icepop", "low": 1.5}]}, "must contain 1.*use low"),
        ({"corrections": [{"kind": "token_mask", "high": 1.0}]}, "must contain 1"),
        ({"corrections": [{"kind": "tis", "high": 0.5}]}, "must contain 1.*use low"),
        ({"corrections": [{"kind": "icepopp"}]}, "kind 'icepopp' is none of .*icepop, token_mask"),
        (
            {"corrections": [{"kind": "icepop", "lo": 0.1}]},
            "icepop: lo is not a known key; it takes low, high",
        ),
        ({"corrections": [{"low": 0.1}]}, "has no kind; it is one of .*icepop, token_mask"),
        ({"corrections": ["icepop"]}, r"icepop: write it as \{kind: icepop\}"),
        (
            {"objective": {"kind": "gspo", "clip": 0.1}},
            "gspo: clip is not a known key; it takes low, high",
        ),
        ({"corrections": [{"kind": "veto", "below": 1.0}]}, "veto"),
        ({"corrections": [{"kind": "tis"}, {"kind": "seq_tis"}]}, "contradict; keep one"),
        ({"corrections": [{"kind": "tis"}], "objective": {"kind": "m2po"}}, "has no effect"),
        ({"objective": {"kind": "ppo", "low": 0}}, r"objective\.low.*use 0\.2"),
        ({"objective": {"kind": "ppo", "low": 1.2}}, r"objective\.low"),
        ({"objective": {"kind": "ppo", "high": 0}}, r"objective\.high.*use 0\.28"),
        ({"objective": {"kind": "ppo", "dual": 1.0}}, r"objective\.dual"),
        ({"objective": {"kind": "ppoo"}}, "kind 'ppoo' is none of ppo, gspo, .*m2po"),
        ({"entropy_bonus": -0.1}, "entropy_bonus.*use 0"),
        ({"aggregation": "seq_mean_constant"}, "horizon: set it"),
        ({"horizon": 100}, "horizon.*only then"),
        ({"aggregation": "token_sum_constant", "horizon": -1}, "horizon.*not positive"),
        ({"kl": {"coefficient": -0.1}}, r"kl\.coefficient.*use 0"),
        ({"preset": "gspoo"}, "preset: 'gspoo' is none of .*gspo"),
        ({"clipp": {}}, "algo.clipp. is not a known key"),
    ],
)
def test_a_degenerate_setting_is_refused_with_key_and_fix(tree: dict[str, Any], names: str):
    with pytest.raises(ConfigError, match=names) as caught:
        load(Config, {"algo": tree})
    assert "algo" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_section_and_gives_way_to_explicit_keys(name: str):
    preset = load(Config, {"algo": {"preset": name}}).algo
    assert [spec.kind for spec in preset.corrections] == [
        entry["kind"] for entry in PRESETS[name]["corrections"]
    ]
    assert preset.objective.kind == PRESETS[name]["objective"]["kind"]
    other = load(Config, {"algo": {"preset": name, "corrections": []}}).algo
    assert other.corrections == ()


@pytest.mark.parametrize("kind", OBJECTIVE_SPECS)
def test_every_objective_can_be_configured_by_its_name(kind: str):
    section = load(Config, {"algo": {"objective": {"kind": kind}, "corrections": []}}).algo
    assert section.settings().objective == OBJECTIVE_SPECS[kind]()


def test_every_correction_can_be_configured_by_its_name():
    for kind, cls in SPECS.items():
        needed: dict[str, float] = {"high": 0.01} if kind == "kpop" else {}
        entries = [{"kind": kind, **needed}]
        if kind == "self_normalise":
            entries.append({"kind": "tis"})
        (first, *_) = load(Config, {"algo": {"corrections": entries}}).algo.corrections
        assert isinstance(first, cls)


def test_the_names_in_the_section_are_the_registered_ones():
    modes = get_args(AlgoSection.model_fields["aggregation"].annotation)
    assert modes == AGGREGATION_MODES


def test_the_section_imports_no_torch():
    code = "import sys, shared.runtime.algo_section; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
