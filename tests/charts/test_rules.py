"""Rules under `promtool`: valid, right in cases worked by hand, every alert fires and resolves."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.prometheus import rules
from tests.charts.rendering import NAMESPACE, RELEASE, ROOT, of_kind, render, tool

pytestmark = pytest.mark.chart

WHO = f'release="{RELEASE}",namespace="{NAMESPACE}"'
LABELS = f'namespace="{NAMESPACE}", release="{RELEASE}"'

ALL_READY = {
    'lagwise_learner_ready{component="learner"}': "1x200",
    'lagwise_rollout_ready{component="rollout"}': "1x200",
    'lagwise_env_agents_ready{component="env-agents"}': "1x200",
    'lagwise_logit_oracle_ready{component="logit-oracle"}': "1x200",
}
TRAINING = {"lagwise_learner_policy_version": "3x200", "lagwise_learner_target_version": "100x200"}
ALERTS: dict[str, tuple[dict[str, str], dict[str, str], float, float]] = {
    # name (and which of its cases): series while in trouble that then ends, labels it adds,
    # minute in trouble, minute after
    "LagwiseStalenessAtBound": (
        {
            "lagwise_learner_step_staleness_mean": "3.9x80 2x80",
            "lagwise_learner_staleness_bound": "4x160",
        },
        {},
        15,
        25,
    ),
    "LagwiseOracleBacklog": (
        {
            "lagwise_learner_unscored_trajectories": "100x100 0x100",
            "lagwise_logit_oracle_busy_seconds_total": "0+15x100 1500+0x100",
        },
        {},
        20,
        40,
    ),
    "LagwiseInexactOldLogits": (
        {
            "lagwise_learner_step_old_logits_exact_ratio": "0.98x40 1x40",
            "lagwise_learner_exact_route": "1x80",
        },
        {},
        5,
        15,
    ),
    "LagwiseCanaryFailed": (
        {"lagwise_logit_oracle_canary_failures_total": "0x10 2x200"},
        {},
        6,
        30,
    ),
    "LagwiseLearnerIdle": (
        {"lagwise_learner_busy_seconds_total": "0+3x100 300+14x100", **TRAINING},
        {},
        24,
        45,
    ),
    "LagwiseRolloutsIdle": (
        {"lagwise_rollout_busy_seconds_total": "0+1x120 120+14x100", **TRAINING},
        {},
        29,
        50,
    ),
    "LagwiseNoNewVersion": (
        {
            "lagwise_learner_policy_version": "3x120 4+1x80",
            "lagwise_learner_target_version": "100x200",
        },
        {},
        28,
        40,
    ),
    "LagwiseStepsSkipped": (
        {"lagwise_learner_skipped_steps_total": "0x20 2x200"},
        {},
        6,
        30,
    ),
    "LagwiseCheckpointOld": (
        {
            "lagwise_learner_policy_version": "30x160 31x40",
            "lagwise_learner_checkpoint_version": "9x100 30x100",
            "lagwise_learner_checkpoint_every_versions": "10x200",
        },
        {},
        10,
        28,
    ),
    "LagwiseStreamFull": (
        {
            'lagwise_learner_stream_bytes{stream="chunks"}': "90x40 10x40",
            "lagwise_learner_stream_limit_bytes": "100x80",
        },
        {"stream": "chunks"},
        5,
        15,
    ),
    "LagwiseDeadLetters": (
        {'lagwise_rollout_dead_letters_total{component="rollout"}': "0x10 3x200"},
        {"component": "rollout"},
        6,
        30,
    ),
    "LagwiseServiceDown of pods that answer": (
        {
            **{k: v for k, v in ALL_READY.items() if "oracle" not in k},
            'lagwise_logit_oracle_ready{component="logit-oracle",pod="a"}': "0x80 1x40",
            'lagwise_logit_oracle_ready{component="logit-oracle",pod="b"}': "0x120",
        },
        {"component": "logit-oracle"},
        15,
        25,
    ),
    **{
        # minutes 0-5 there, then nobody answers until minute 25
        f"LagwiseServiceDown of a {component} that is gone": (
            {k: "1x20 _x80 1x60" if component in k else v for k, v in ALL_READY.items()},
            {"component": component},
            23,
            30,
        )
        for component in ("learner", "rollout", "env-agents", "logit-oracle")
    },
}


def write_rules(folder: Path) -> Path:
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(rules(), sort_keys=False))
    return path


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        [tool("promtool"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def series(name: str) -> str:
    metric, brace, labels = name.partition("{")
    return f"{metric}{{{WHO},{labels}" if brace else f"{metric}{{{WHO}}}"


def defined() -> dict[str, Any]:
    return {r["alert"]: r for g in rules()["groups"] for r in g["rules"] if "alert" in r}


def test_the_rules_are_valid(tmp_path: Path):
    promtool("check", "rules", str(write_rules(tmp_path)))


def test_the_signal_is_what_the_cases_worked_by_hand_say(tmp_path: Path):
    text = (ROOT / "tests/charts/rules_cases.yaml").read_text()
    text = text.replace("RULES", str(write_rules(tmp_path)))
    text = text.replace("WHO", WHO).replace("LABELS", LABELS)
    (tmp_path / "cases.yaml").write_text(text)
    promtool("test", "rules", str(tmp_path / "cases.yaml"))


def case(name: str, folder: Path, *, swap: bool = False) -> Path:
    """A promtool test in which the alert fires and resolves; `swap` expects the opposite."""
    given, added, bad_minute, good_minute = ALERTS[name]
    alert = name.split()[0]
    if swap:
        bad_minute, good_minute = good_minute, bad_minute
    rule = defined()[alert]
    labels = {"release": RELEASE, "namespace": NAMESPACE, **added, **rule["labels"]}
    tests = {
        "rule_files": [str(write_rules(folder))],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": series(n), "values": v} for n, v in given.items()],
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing",'
                        + ",".join(f'{k}="{v}"' for k, v in labels.items())
                        + "})",
                        "eval_time": f"{bad_minute}m",
                        "exp_samples": [{"labels": "{}", "value": 1}],
                    },
                    {
                        "expr": f'ALERTS{{alertname="{alert}",alertstate="firing"}}',
                        "eval_time": f"{good_minute}m",
                        "exp_samples": [],
                    },
                ],
            }
        ],
    }
    path = folder / "case.yaml"
    path.write_text(yaml.safe_dump(tests))
    return path


@pytest.mark.parametrize("name", ALERTS)
def test_the_alert_fires_and_resolves(name: str, tmp_path: Path):
    promtool("test", "rules", str(case(name, tmp_path)))


def test_the_alert_tests_can_fail(tmp_path: Path):
    with pytest.raises(AssertionError):
        promtool("test", "rules", str(case("LagwiseStreamFull", tmp_path, swap=True)))


def test_a_role_that_is_meant_to_have_no_pods_is_not_missed():
    without = {"monitoring": {"prometheusRule": {"enabled": True}}, "logit_oracle": {"replicas": 0}}
    expr = {
        name: next(
            rule["expr"]
            for group in of_kind(render(values), "PrometheusRule")[0]["spec"]["groups"]
            for rule in group["rules"]
            if rule.get("alert") == "LagwiseServiceDown"
        )
        for name, values in (
            ("none", without),
            ("scaled", {**without, "autoscaling": {"mode": "external"}, "logit_oracle": {}}),
        )
    }
    assert "absent(lagwise_logit_oracle_ready" not in expr["none"]
    assert expr["none"].count("absent(") == 3
    assert expr["scaled"].count("absent(") == 4


def test_every_alert_has_a_case_and_an_entry_in_the_runbook():
    assert defined().keys() == {name.split()[0] for name in ALERTS}
    runbook = (ROOT / "docs/operations.md").read_text()
    for name, rule in defined().items():
        assert f"### {name}\n" in runbook
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= rule["annotations"].keys()
