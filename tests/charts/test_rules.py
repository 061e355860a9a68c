"""Rules under `promtool`: valid, right in cases worked by hand, every alert fires and resolves."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.prometheus import rules
from tests.charts.rendering import NAMESPACE, RELEASE, ROOT, tool

pytestmark = pytest.mark.chart

WHO = f'release="{RELEASE}",namespace="{NAMESPACE}"'
LABELS = f'namespace="{NAMESPACE}", release="{RELEASE}"'

TRAINING = {"lagwise_learner_policy_version": "3x200", "lagwise_learner_target_version": "100x200"}
ALERTS: dict[str, tuple[dict[str, str], dict[str, str], float, float]] = {
    # name: series while in trouble that then ends, labels it adds, minute in trouble, minute after
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
    "LagwiseServiceDown": (
        {
            'lagwise_logit_oracle_ready{component="logit-oracle",pod="a"}': "0x80 1x40",
            'lagwise_logit_oracle_ready{component="logit-oracle",pod="b"}': "0x120",
        },
        {"component": "logit-oracle"},
        15,
        25,
    ),
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


def case(alert: str, folder: Path, *, swap: bool = False) -> Path:
    """A promtool test in which the alert fires and resolves; `swap` expects the opposite."""
    given, added, bad_minute, good_minute = ALERTS[alert]
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


@pytest.mark.parametrize("alert", ALERTS)
def test_the_alert_fires_and_resolves(alert: str, tmp_path: Path):
    promtool("test", "rules", str(case(alert, tmp_path)))


def test_the_alert_tests_can_fail(tmp_path: Path):
    with pytest.raises(AssertionError):
        promtool("test", "rules", str(case("LagwiseStreamFull", tmp_path, swap=True)))


def test_every_alert_has_a_case_and_an_entry_in_the_runbook():
    assert defined().keys() == ALERTS.keys()
    runbook = (ROOT / "docs/operations.md").read_text()
    for name, rule in defined().items():
        assert f"### {name}\n" in runbook
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= rule["annotations"].keys()
