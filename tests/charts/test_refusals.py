"""Bad values: refused at `helm lint`, with a message that names the value."""

from __future__ import annotations

import pytest

from tests.charts.rendering import EXAMPLES, REGISTRY, Object, lint, merged, render_fails

pytestmark = pytest.mark.chart

BAD: dict[str, tuple[Object, str]] = {
    "no registry": ({"image": {"registry": ""}}, "/image/registry"),
    "a typo of the chart": ({"rollout": {"replica": 2}}, "replica"),
    "a typo at the top": ({"rollouts": {"replicas": 2}}, "rollouts"),
    "a typo of the run": ({"config": {"learner": {"verions": 3}}}, "verions"),
    "a typo deep in the run": (
        {"config": {"learner": {"optimizer": {"learning_rate": 1}}}},
        "learning_rate",
    ),
    "a wrong word": (
        {"config": {"old_logprobs": {"route": "orakel"}}},
        "/config/old_logprobs/route",
    ),
    "a number as a string": (
        {"config": {"admission": {"group_size": "8"}}},
        "/config/admission/group_size",
    ),
    "latest": ({"image": {"tag": "latest"}}, "/image/tag"),
    "latest of one role": ({"rollout": {"image": {"tag": "latest"}}}, "/rollout/image/tag"),
    "latest of nats": ({"nats": {"image": {"tag": "latest"}}}, "/nats/image/tag"),
    "GPUs as a string": ({"rollout": {"gpu": {"count": "2"}}}, "/rollout/gpu/count"),
    "an external bus without a URL": ({"nats": {"enabled": False}}, "/nats/external/url"),
    "an external bus of a wrong scheme": (
        {"nats": {"enabled": False, "external": {"url": "http://x", "auth": "none"}}},
        "/nats/external/url",
    ),
    "an external bus without its secret": (
        {"nats": {"enabled": False, "external": {"url": "nats://x"}}},
        "/nats/external/secretName",
    ),
    "two buses": ({"nats": {"external": {"url": "nats://x"}}}, "/nats/external/url"),
    "HPA with fixed replicas": (
        {
            "autoscaling": {"mode": "hpa"},
            "rollout": {"replicas": 3},
            "monitoring": {"prometheusRule": {"enabled": True}},
        },
        "/rollout/replicas",
    ),
    "external scaling with fixed replicas": (
        {"autoscaling": {"mode": "external"}, "env_agents": {"replicas": 3}},
        "/env_agents/replicas",
    ),
    "HPA without its signal": (
        {"autoscaling": {"mode": "hpa"}},
        "/monitoring/prometheusRule/enabled",
    ),
    "KEDA without Prometheus": (
        {"autoscaling": {"mode": "keda"}, "monitoring": {"prometheusRule": {"enabled": True}}},
        "/autoscaling/prometheusAddress",
    ),
    "a budget that blocks every drain": (
        {"rollout": {"podDisruptionBudget": {"maxUnavailable": 0}}},
        "maxUnavailable",
    ),
    "the same in percent": (
        {"rollout": {"podDisruptionBudget": {"maxUnavailable": "0%"}}},
        "maxUnavailable",
    ),
    "the same said the other way": (
        {"nats": {"podDisruptionBudget": {"minAvailable": 1}}},
        "minAvailable",
    ),
    "two learners": ({"learner": {"replicas": 2}}, "/learner/replicas"),
    "a digest cut short": (
        {"rollout": {"image": {"digest": "sha256:abc"}}},
        "/rollout/image/digest",
    ),
    "several nodes without a claim that all can write": (
        {"learner": {"nodes": 2}},
        "/learner/storage/existingClaim",
    ),
    "offline without anything to read from": (
        {"huggingface": {"offline": True}},
        "/modelCache/claim",
    ),
    "a size without sense": ({"learner": {"storage": {"size": "fifty"}}}, "/learner/storage/size"),
}


@pytest.mark.parametrize("case", BAD)
def test_lint_refuses_and_names_the_value(case: str):
    values, named = BAD[case]
    accepted, said = lint(merged(REGISTRY, values))
    assert not accepted, case
    assert named in said, said


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_lint_accepts_every_example(example):
    accepted, said = lint(REGISTRY, example)
    assert accepted, said


def test_lint_accepts_the_defaults_with_a_registry():
    accepted, said = lint(REGISTRY)
    assert accepted, said
    assert "WARNING" not in said


def test_a_grace_period_within_the_drain_is_refused():
    said = render_fails(
        {
            "rollout": {"terminationGracePeriodSeconds": 20},
            "config": {"telemetry": {"drain_s": 20}},
        }
    )
    assert "rollout.terminationGracePeriodSeconds 20" in said
    assert "drain_s" in said


def test_an_engine_over_other_than_the_pods_gpus_is_refused():
    said = render_fails(
        {"rollout": {"gpu": {"count": 4}}, "config": {"rollout": {"engine": "vllm"}}}
    )
    assert "config.rollout.vllm.tensor_parallel_size 1" in said
    assert "rollout.gpu.count 4" in said


@pytest.mark.parametrize("mode", ["hpa", "keda"])
def test_an_autoscaler_whose_least_exceeds_its_most_is_refused(mode: str):
    said = render_fails(
        {
            "autoscaling": {
                "mode": mode,
                "prometheusAddress": "http://p",
                "env_agents": {"min": 9},
            },
            "monitoring": {"prometheusRule": {"enabled": True}},
        }
    )
    assert "autoscaling.env_agents.min 9" in said
    assert "max 8" in said
