"""How the chart starts a learner or an oracle of several processes."""

from __future__ import annotations

import copy
import json

import pytest

from tests.charts.rendering import Object, merged, of_kind, pod_spec, render, render_fails

pytestmark = pytest.mark.chart

NODES = {"learner": {"nodes": 3, "gpu": {"count": 4}, "storage": {"existingClaim": "run"}}}


def resolved(values: Object) -> Object:
    config = of_kind(render(values), "ConfigMap", "config")[0]
    return json.loads(config["data"]["values.yaml"])["config"]


def started(item: Object) -> list[str]:
    main = pod_spec(item)["containers"][0]
    return [*main["command"], *main["args"]]


def leader_and_worker(values: Object) -> tuple[Object, Object]:
    template = of_kind(render(values), "LeaderWorkerSet")[0]["spec"]["leaderWorkerTemplate"]
    return template["leaderTemplate"]["spec"], template["workerTemplate"]["spec"]


@pytest.mark.parametrize(
    ("values", "learner", "oracle"),
    [
        ({}, 1, 1),
        ({"learner": {"gpu": {"count": 1}}}, 1, 1),
        ({"learner": {"gpu": {"count": 8}}, "logit_oracle": {"gpu": {"count": 2}}}, 8, 2),
        ({"config": {"learner": {"ranks": 4}, "logit_oracle": {"ranks": 3}}}, 4, 3),
        (NODES, 12, 1),
        ({"learner": {"nodes": 2, "storage": {"existingClaim": "run"}}}, 2, 1),
    ],
)
def test_every_gpu_gets_a_rank_unless_the_configuration_says_how_many(
    values: Object, learner: int, oracle: int
):
    config = resolved(values)
    assert config["learner"]["ranks"] == learner
    assert config["logit_oracle"]["ranks"] == oracle


def test_one_rank_is_started_without_torchrun():
    for kind, role in (("StatefulSet", "learner"), ("Deployment", "logit-oracle")):
        command = started(of_kind(render({}), kind, role)[0])
        assert command[:3] == ["python", "-m", f"services.{role.replace('-', '_')}"]


@pytest.mark.parametrize(
    ("kind", "role"), [("StatefulSet", "learner"), ("Deployment", "logit_oracle")]
)
def test_the_ranks_of_one_node_are_started_by_torchrun_which_restarts_nothing(kind, role):
    values = {role: {"gpu": {"count": 2}}, "config": {"telemetry": {"drain_s": 40}}}
    item = of_kind(render(values), kind, role.replace("_", "-"))[0]
    command = started(item)
    assert command[:3] == ["python", "-m", "shared.cli.torchrun"]
    own, _, of_service = " ".join(command[3:]).partition(" -m ")
    assert own.split() == [
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=0",
        "--shutdown-timeout=43",
    ]
    assert of_service == f"services.{role} --config /etc/lagwise/values.yaml --pod $(POD_NAME)"
    # what is left of a stop is killed by torchrun before the kubelet kills torchrun
    assert pod_spec(item)["terminationGracePeriodSeconds"] > 43
    assert "startupProbe" in pod_spec(item)["containers"][0]


def test_the_nodes_of_a_group_find_the_first_by_what_the_leader_worker_set_tells_them():
    for spec in leader_and_worker(NODES):
        arguments = spec["containers"][0]["args"]
        assert {
            "--nnodes=3",
            "--nproc-per-node=4",
            "--node-rank=$(LWS_WORKER_INDEX)",
            "--master-addr=$(LWS_LEADER_ADDRESS)",
        } <= set(arguments)
        assert "--standalone" not in arguments
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4


def test_a_worker_is_the_leader_without_probes_bus_and_recorder():
    leader, worker = (copy.deepcopy(spec) for spec in leader_and_worker(NODES))
    main, further = leader["containers"][0], worker["containers"][0]
    for name in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
        assert main.pop(name)
        assert name not in further
    main["env"] = [e for e in main["env"] if not e["name"].startswith("LAGWISE_BUS__")]
    main["volumeMounts"] = [m for m in main["volumeMounts"] if not m["name"].startswith("bus-")]
    assert main == further
    assert [c["name"] for c in leader.pop("initContainers")] == ["recorder"]
    leader["volumes"] = [v for v in leader["volumes"] if not v["name"].startswith("bus-")]
    assert leader == worker
    assert {m["name"] for m in further["volumeMounts"]} >= {"run-data", "config"}


def test_a_worker_fetches_the_model_too():
    values = merged(NODES, {"config": {"model": {"source": "hf://org/name@main"}}})
    leader, worker = leader_and_worker(values)
    assert [c["name"] for c in worker["initContainers"]] == ["fetch-model"]
    assert [c["name"] for c in leader["initContainers"]] == ["fetch-model", "recorder"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (
            {"learner": {"gpu": {"count": 2}}, "config": {"learner": {"ranks": 4}}},
            ["config.learner.ranks 4", "learner.gpu.count 2"],
        ),
        (
            {"logit_oracle": {"gpu": {"count": 2}}, "config": {"logit_oracle": {"ranks": 1}}},
            ["config.logit_oracle.ranks 1", "logit_oracle.gpu.count 2"],
        ),
        (
            {
                "learner": {"nodes": 2, "storage": {"existingClaim": "run"}},
                "config": {"learner": {"ranks": 3}},
            },
            ["config.learner.ranks 3", "learner.nodes 2"],
        ),
    ],
)
def test_ranks_that_do_not_fit_nodes_and_gpus_are_refused_by_name(values: Object, named: list[str]):
    said = render_fails(values)
    for part in named:
        assert part in said
