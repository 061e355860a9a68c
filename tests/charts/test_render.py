"""What the chart renders, over a matrix of values: valid, isolated, hardened, and no more."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from tests.charts.rendering import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    RELEASE,
    ROOT,
    Object,
    component_of,
    merged,
    of_kind,
    pod_spec,
    render,
    with_pods,
)

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the chart extra")

pytestmark = pytest.mark.chart

OLDEST, NEWEST = "1.29", "1.37"
ALLOWED_CRDS = {
    ("monitoring.coreos.com/v1", "PodMonitor"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("keda.sh/v1alpha1", "ScaledObject"),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"),
}
"""kubernetes-validate knows no schema of these: golden files hold them."""

MONITORED = {
    "monitoring": {
        "podMonitor": {"enabled": True, "labels": {"team": "rl"}},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True},
    }
}
GPU = {role: {"gpu": {"count": 2}} for role in ("learner", "rollout", "logit_oracle")}
PLACED = {
    role: {
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "a", "operator": "Exists"}]}
                    ]
                }
            }
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"a": "b"}},
            }
        ],
        "priorityClassName": "high",
        "podLabels": {"team": "rl"},
        "podAnnotations": {"note": "x"},
        "extraEnv": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        "extraVolumes": [{"name": "code", "configMap": {"name": "my-env"}}],
        "extraVolumeMounts": [{"name": "code", "mountPath": "/code"}],
        "podSpecExtra": {
            "schedulerName": "mine",
            "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a"]}],
        },
    }
    for role in ("learner", "rollout", "env_agents", "logit_oracle", "nats")
}
EXTERNAL = {
    "nats": {
        "enabled": False,
        "external": {"url": "tls://nats.example.com:4443", "auth": "creds", "secretName": "bus"},
        "tls": {"secretName": "ca"},
    }
}
VARIANTS: dict[str, Object] = {
    "defaults": {},
    "gpu": GPU,
    "placed": merged(GPU, PLACED),
    "monitored": MONITORED,
    "external bus": EXTERNAL,
    "external bus, passwords": {
        "nats": {
            "enabled": False,
            "external": {
                "url": "nats://bus",
                "auth": "password",
                "secretName": "bus",
                "userPrefix": "team-",
            },
        }
    },
    "external bus, open": {
        "nats": {"enabled": False, "external": {"url": "nats://bus:4222", "auth": "none"}}
    },
    "tls": {"nats": {"tls": {"secretName": "nats-tls"}, "auth": {"existingSecret": "mine"}}},
    "hub": {
        "config": {"model": {"source": "hf://org/name@abc123"}},
        "huggingface": {
            "tokenSecret": {"name": "hf"},
            "endpoint": "https://mirror",
        },
    },
    "hub, shared cache": {
        "config": {"model": {"source": "hf://org/name@abc123"}},
        "huggingface": {"offline": True},
        "modelCache": {"claim": "models"},
    },
    "claim": {"config": {"model": {"source": "pvc://models/qwen/4b"}}},
    "external scaling": {"autoscaling": {"mode": "external"}},
    "hpa": merged(MONITORED, {"autoscaling": {"mode": "hpa", "rollout": {"min": 2, "max": 20}}}),
    "keda": merged(
        MONITORED, {"autoscaling": {"mode": "keda", "prometheusAddress": "http://prometheus:9090"}}
    ),
    "several nodes": merged(GPU, {"learner": {"nodes": 2, "storage": {"existingClaim": "run"}}}),
    "deletion cost": {"deletionCost": {"enabled": True}},
    "bare": {
        "networkPolicy": {"enabled": False},
        "runAsUser": None,
        "config": {"run": {"archive": False}},
        "rollout": {"podDisruptionBudget": {"enabled": False}, "replicas": 0, "shmSize": ""},
    },
    "names": {
        "fullnameOverride": "custom",
        "commonLabels": {"cost": "rl"},
        "image": {"pullSecrets": ["pull"]},
        "rollout": {"image": {"repository": "other/rollout", "digest": "sha256:" + "a" * 64}},
    },
}
CASES = list(itertools.product(VARIANTS, ["", *(str(e.relative_to(ROOT)) for e in EXAMPLES[:1])]))


def rendered(variant: str, **options: str) -> list[Object]:
    return render(VARIANTS[variant], **options)


def every() -> list[tuple[str, Object]]:
    return [(name, item) for name in VARIANTS for item in rendered(name)]


# --- valid
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_valid_in_the_oldest_and_newest_kubernetes(variant: str, version: str):
    for item in rendered(variant, kube_version=version):
        kind = (item["apiVersion"], item["kind"])
        if kind in ALLOWED_CRDS:
            continue
        kubernetes_validate.validate(item, version, strict=True)


def test_the_validator_would_see_a_typo():
    broken = of_kind(rendered("defaults"), "Deployment")[0]
    broken = json.loads(json.dumps(broken))
    broken["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, NEWEST, strict=True)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_renders_valid_objects(example):
    for item in render({}, example):
        if (item["apiVersion"], item["kind"]) not in ALLOWED_CRDS:
            kubernetes_validate.validate(item, NEWEST, strict=True)


def test_an_older_kubernetes_is_refused():
    from tests.charts.rendering import helm

    done = helm("template", "r", str(CHART), "--set", "image.registry=x", "--kube-version", "1.28")
    assert done.returncode != 0
    assert "1.29" in done.stderr


def test_custom_resources_are_the_listed_kinds_and_all_of_them_occur():
    known = re.compile(
        r"v1|apps/v1|policy/v1|autoscaling/v2|(networking|rbac\.authorization)\.k8s\.io/v1"
    )
    found = {
        (o["apiVersion"], o["kind"]) for _, o in every() if not known.fullmatch(o["apiVersion"])
    }
    assert found == ALLOWED_CRDS


@pytest.mark.parametrize(
    ("variant", "kind"),
    [("keda", "ScaledObject"), ("monitored", "PodMonitor"), ("several nodes", "LeaderWorkerSet")],
)
def test_custom_resources_are_what_was_reviewed(variant: str, kind: str, request):
    """Golden files: `python -m pytest tests/charts --update-golden` writes them for a review."""
    items = of_kind(rendered(variant), kind)
    text = json.dumps(items, indent=1, sort_keys=True) + "\n"
    text = re.sub(r'"checksum/config": "[0-9a-f]+"', '"checksum/config": "SUM"', text)
    golden = CHART.parents[1] / "tests" / "charts" / "golden" / f"{kind}.json"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert golden.read_text() == text


# --- isolated
def test_selectors_tell_releases_and_roles_apart():
    for variant in VARIANTS:
        pods: list[tuple[str, str, dict]] = []
        selectors: list[tuple[str, str, dict]] = []
        for release in ("a", "b"):
            for item in render(VARIANTS[variant], release=release):
                if item["kind"] == "Pod":
                    pods.append((release, component_of(item), item["metadata"]["labels"]))
                elif item["kind"] in ("Deployment", "StatefulSet"):
                    labels = item["spec"]["template"]["metadata"]["labels"]
                    pods.append((release, component_of(item), labels))
                    selectors.append(
                        (release, component_of(item), item["spec"]["selector"]["matchLabels"])
                    )
                elif item["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
                    found = item["spec"].get("selector") or item["spec"]["podSelector"]
                    selectors.append((release, component_of(item), found["matchLabels"]))
                elif item["kind"] == "Service":
                    selectors.append((release, component_of(item), item["spec"]["selector"]))
        for release, component, wanted in selectors:
            chosen = {(r, c) for r, c, labels in pods if wanted.items() <= labels.items()}
            assert chosen <= {(release, component)}, variant
            if component not in ("learner",) or variant != "several nodes":
                assert chosen == {(release, component)}, (variant, component)


def test_two_releases_share_no_object_and_no_namespace_is_written():
    for variant in VARIANTS:
        if "fullnameOverride" in VARIANTS[variant]:
            continue
        for releases in (("a", "b"), ("a" * 52 + "b", "a" * 52 + "c")):
            a, b = (
                {(o["kind"], o["metadata"]["name"]) for o in render(VARIANTS[variant], release=r)}
                for r in releases
            )
            assert not a & b
        for item in rendered(variant):
            assert "namespace" not in item["metadata"]
    assert "namespace" not in (CHART / "values.yaml").read_text().replace(
        "namespaceSelector", ""
    ).replace("every namespace", "")


def test_names_stay_within_63_characters_for_a_long_release():
    for item in render(MONITORED, release="a" * 53):
        assert len(item["metadata"]["name"]) <= 58, item["metadata"]["name"]  # room for ordinals


# --- ports, images, commands
def containers(item: Object) -> list[Object]:
    spec = pod_spec(item)
    return [*spec.get("initContainers", []), *spec["containers"]]


def test_every_port_is_named_and_has_a_protocol():
    for _, item in every():
        for container in containers(item) if item["kind"] in _WORKLOADS else []:
            for port in container.get("ports", []):
                assert {"name", "containerPort", "protocol"} <= port.keys()
        if item["kind"] == "Service":
            for port in item["spec"]["ports"]:
                assert {"name", "port", "targetPort", "protocol"} <= port.keys()
        if item["kind"] == "NetworkPolicy":
            for rule in [*item["spec"].get("ingress", []), *item["spec"].get("egress", [])]:
                for port in rule.get("ports", []):
                    assert "protocol" in port


_WORKLOADS = ("Deployment", "StatefulSet", "LeaderWorkerSet", "Pod")


def test_images_are_pinned_and_nothing_sleeps():
    for variant, item in every():
        text = json.dumps(item)
        assert "sleep" not in text, variant
        assert ":latest" not in text
        for container in containers(item) if item["kind"] in _WORKLOADS else []:
            assert re.search(r":[\w.-]+$|@sha256:[0-9a-f]{64}$", container["image"])
            assert container["command"][0] in ("python", "nats-server")


def test_a_digest_wins_over_a_tag():
    rollout = of_kind(rendered("names"), "Deployment", "rollout")[0]
    assert pod_spec(rollout)["containers"][0]["image"] == "other/rollout@sha256:" + "a" * 64


# --- life cycle
def test_startup_readiness_and_liveness_ask_three_different_questions():
    for _, item in every():
        if item["kind"] not in ("Deployment", "StatefulSet", "LeaderWorkerSet"):
            continue
        main = pod_spec(item)["containers"][0]
        if component_of(item) == "operator":
            continue  # serves nothing: it ends when it cannot work
        paths = {main[f"{p}Probe"]["httpGet"]["path"] for p in ("startup", "readiness", "liveness")}
        assert len(paths) == 3
        assert "initialDelaySeconds" not in json.dumps(main)
        startup = main["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


def test_the_grace_period_exceeds_the_drain():
    for drain, expected in ((None, 30), (60, 75), (12.3, 28)):
        config = {} if drain is None else {"telemetry": {"drain_s": drain}}
        for item in with_pods(render({"config": config})):
            if component_of(item) in ("rollout", "learner", "env-agents", "logit-oracle"):
                # the recorder catches up after the learner has ended
                beside = 30 if component_of(item) == "learner" else 0
                assert pod_spec(item)["terminationGracePeriodSeconds"] == expected + beside


def test_gpu_roles_never_surge_and_cpu_roles_do():
    gpu, cpu = rendered("gpu"), rendered("defaults")
    for role in ("rollout", "logit-oracle"):
        rolling = of_kind(gpu, "Deployment", role)[0]["spec"]["strategy"]["rollingUpdate"]
        assert rolling == {"maxSurge": 0, "maxUnavailable": 1}
    rolling = of_kind(gpu, "Deployment", "env-agents")[0]["spec"]["strategy"]["rollingUpdate"]
    assert rolling["maxUnavailable"] == 0
    assert (
        of_kind(cpu, "Deployment", "rollout")[0]["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
        == "25%"
    )


def test_gpus_are_requested_and_limited_as_integers():
    for item in with_pods(rendered("gpu")):
        if component_of(item) in ("learner", "rollout", "logit-oracle"):
            resources = pod_spec(item)["containers"][0]["resources"]
            assert (
                resources["limits"]["nvidia.com/gpu"]
                == resources["requests"]["nvidia.com/gpu"]
                == 2
            )


def test_budgets_let_every_drain_go_on():
    for _, item in every():
        if item["kind"] == "PodDisruptionBudget":
            assert "minAvailable" not in item["spec"]
            assert item["spec"]["maxUnavailable"] not in (0, "0%")
            assert item["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_a_change_of_the_run_restarts_the_pods_and_a_change_of_placement_leaves_the_checksum():
    def sums(values: Object) -> dict[str, str]:
        return {
            component_of(o): o["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
            for o in render(values)
            if o["kind"] in ("Deployment", "StatefulSet")
        }

    before = sums({})
    assert sums({}) == before  # random passwords are not part of it
    changed = sums({"config": {"learner": {"optimizer": {"lr": 1e-5}}}})
    assert all(
        changed[c] != before[c] for c in ("learner", "rollout", "env-agents", "logit-oracle")
    )
    assert changed["nats"] == before["nats"]
    assert sums({"nats": {"maxPayload": "4MB"}})["nats"] != before["nats"]


@pytest.mark.parametrize(
    ("variant", "fixed"),
    [("defaults", True), ("external scaling", False), ("hpa", False), ("keda", False)],
)
def test_replicas_are_written_only_when_nobody_else_decides(variant: str, fixed: bool):
    objects = rendered(variant)
    for role in ("rollout", "env-agents", "logit-oracle"):
        assert ("replicas" in of_kind(objects, "Deployment", role)[0]["spec"]) is fixed
    assert of_kind(objects, "StatefulSet", "learner")[0]["spec"]["replicas"] == 1
    assert len(of_kind(objects, "HorizontalPodAutoscaler")) == (3 if variant == "hpa" else 0)
    assert len(of_kind(objects, "ScaledObject")) == (3 if variant == "keda" else 0)


def test_the_autoscaler_targets_the_wanted_number_of_pods():
    hpa = of_kind(rendered("hpa"), "HorizontalPodAutoscaler", "rollout")[0]["spec"]
    external = hpa["metrics"][0]["external"]
    assert external["metric"]["name"] == "lagwise_rollout_wanted"
    assert external["target"] == {"type": "AverageValue", "averageValue": "1"}
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (2, 20)
    assert hpa["scaleTargetRef"]["name"] == f"{RELEASE}-lagwise-rollout"


def test_jetstream_always_has_its_claim_and_an_external_bus_has_no_nats_objects():
    for variant in VARIANTS:
        claims = [
            s["spec"]["volumeClaimTemplates"][0]["metadata"]["name"]
            for s in of_kind(rendered(variant), "StatefulSet", "nats")
        ]
        assert claims == ([] if variant.startswith("external bus") else ["jetstream"])
    assert [o for o in rendered("external bus") if component_of(o) == "nats"] == []
    assert of_kind(rendered("external bus"), "Secret") == []


# --- security
def test_pods_pass_the_restricted_standard_and_write_only_to_volumes():
    for variant, item in every():
        if item["kind"] not in _WORKLOADS:
            continue
        spec = pod_spec(item)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        if variant != "bare":
            assert spec["securityContext"]["runAsUser"] == 10001
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all("hostPath" not in volume for volume in spec["volumes"])
        for container in containers(item):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            }
            environment = {e["name"]: e.get("value", "") for e in container.get("env", [])}
            if container["command"][0] == "python":
                caches = (
                    "HOME",
                    "XDG_CACHE_HOME",
                    "HF_HOME",
                    "NUMBA_CACHE_DIR",
                    "TRITON_CACHE_DIR",
                    "TORCHINDUCTOR_CACHE_DIR",
                    "VLLM_CACHE_ROOT",
                )
                assert all(environment[name].startswith("/tmp") for name in caches)
                assert "/tmp" in {m["mountPath"] for m in container["volumeMounts"]}


def test_only_the_annotator_has_an_api_token():
    for variant in VARIANTS:
        objects = rendered(variant)
        with_token = {
            component_of(o)
            for o in with_pods(objects)
            if pod_spec(o)["automountServiceAccountToken"]
        }
        assert with_token == ({"operator"} if variant == "deletion cost" else set())
        for account in of_kind(objects, "ServiceAccount"):
            assert account["automountServiceAccountToken"] is False
        roles = of_kind(objects, "Role")
        assert [r["rules"] for r in roles] == (
            [[{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "patch"]}]]
            if variant == "deletion cost"
            else []
        )


def test_every_pod_runs_under_an_account_that_the_chart_makes():
    for variant in VARIANTS:
        objects = rendered(variant)
        made = {a["metadata"]["name"] for a in of_kind(objects, "ServiceAccount")}
        assert {pod_spec(o)["serviceAccountName"] for o in with_pods(objects)} <= made


def test_no_password_reaches_configuration_or_environment():
    for variant, item in every():
        if item["kind"] in _WORKLOADS:
            for container in containers(item):
                for entry in container.get("env", []):
                    if re.search("PASSWORD|TOKEN|SECRET", entry["name"]) and "value" in entry:
                        assert entry["name"].endswith(("_FILE", "TOKENIZERS_PARALLELISM")), variant


def test_each_role_mounts_its_own_bus_secret_and_no_other():
    for variant in ("defaults", "external bus, passwords", "external bus"):
        for item in with_pods(rendered(variant)):
            role = component_of(item).replace("-", "_")
            keys = {
                i["key"].removesuffix(".creds")
                for v in pod_spec(item)["volumes"]
                if v["name"].startswith("bus-") and v["name"] != "bus-ca"
                for i in v["secret"]["items"]
            }
            expected = {"learner": {"learner", "recorder"}, "nats": set(), "check": {"operator"}}
            assert keys == expected.get(role, {role})


def test_a_policy_per_role_lets_through_the_bus_and_scraping_only():
    objects = rendered("defaults")
    policies = {component_of(o): o["spec"] for o in of_kind(objects, "NetworkPolicy")}
    assert policies.keys() == {"learner", "rollout", "env-agents", "logit-oracle", "nats", "check"}
    for role, spec in policies.items():
        assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
        ports = {p["port"] for r in spec["egress"] for p in r["ports"]}
        assert ports == (set() if role == "nats" else {53, 4222})
    hub = of_kind(
        render({"config": {"model": {"source": "hf://org/name@abc"}}}), "NetworkPolicy", "rollout"
    )
    assert 443 in {p["port"] for r in hub[0]["spec"]["egress"] for p in r["ports"]}
    bus = of_kind(rendered("external bus"), "NetworkPolicy", "rollout")
    assert {p["port"] for r in bus[0]["spec"]["egress"] for p in r["ports"]} == {53, 4443}
    assert of_kind(rendered("bare"), "NetworkPolicy") == []


# --- helm test
@pytest.mark.parametrize(
    ("example", "roles"),
    [
        ("frozen_lake/values", "learner,rollout,env_agents,logit_oracle"),
        ("fixed_async_offpolicy/snapshot_old", "learner,rollout,env_agents"),
    ],
)
def test_helm_test_waits_for_the_roles_that_have_pods(example: str, roles: str):
    pod = of_kind(render({}, ROOT / f"examples/{example}.yaml"), "Pod")[0]
    arguments = pod_spec(pod)["containers"][0]["args"]
    assert arguments[arguments.index("--roles") + 1] == roles


# --- model sources
def test_a_hub_model_is_fetched_once_before_the_service_and_read_from_the_folder():
    objects = rendered("hub")
    config = json.loads(of_kind(objects, "ConfigMap", "config")[0]["data"]["values.yaml"])["config"]
    assert config["model"]["source"] == "/models/org/name/abc123"
    for role, files in (("learner", "all"), ("env-agents", "config")):
        item = next(o for o in with_pods(objects) if component_of(o) == role)
        fetch = pod_spec(item)["initContainers"][0]
        assert fetch["args"] == [
            "hf://org/name@abc123",
            "/models/org/name/abc123",
            "--files",
            files,
        ]
        environment = {e["name"]: e for e in fetch["env"]}
        assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {
            "name": "hf",
            "key": "token",
        }
        assert environment["HF_ENDPOINT"]["value"] == "https://mirror"
        assert "HF_HUB_OFFLINE" not in environment
        main = {e["name"]: e for e in pod_spec(item)["containers"][0]["env"]}
        assert "HF_TOKEN" not in main
        assert main["HF_HUB_OFFLINE"]["value"] == "1"


def test_offline_the_fetcher_reads_the_shared_cache_and_opens_no_way_out():
    objects = rendered("hub, shared cache")
    for item in with_pods(objects):
        if component_of(item) in ("nats", "check"):
            continue
        fetch = pod_spec(item)["initContainers"][0]
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in fetch["env"]
        volume = next(v for v in pod_spec(item)["volumes"] if v["name"] == "models")
        assert volume["persistentVolumeClaim"] == {"claimName": "models"}
    for policy in of_kind(objects, "NetworkPolicy"):
        assert 443 not in {p["port"] for r in policy["spec"]["egress"] for p in r["ports"]}


def test_the_annotator_can_be_told_what_every_pod_can():
    extra = {
        key: PLACED["rollout"][key] for key in ("extraEnv", "extraVolumes", "extraVolumeMounts")
    }
    values = {"deletionCost": {"enabled": True, **extra}}
    spec = pod_spec(of_kind(render(values), "Deployment", "operator")[0])
    assert extra["extraEnv"][0] in spec["containers"][0]["env"]
    assert extra["extraVolumeMounts"][0] in spec["containers"][0]["volumeMounts"]
    assert extra["extraVolumes"][0] in spec["volumes"]


def test_the_recorder_gets_the_learners_environment_for_its_trackers():
    key = {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "w", "key": "key"}}}
    trackers = {"trackers": {"wandb": {"project": "p", "mode": "online"}}}
    objects = render({"learner": {"extraEnv": [key]}, "config": trackers})
    spec = pod_spec(of_kind(objects, "StatefulSet", "learner")[0])
    recorder = next(c for c in spec["initContainers"] if c["name"] == "recorder")
    assert key in recorder["env"]
    assert key in spec["containers"][0]["env"]


def test_a_claim_is_mounted_read_only_and_fetched_by_nobody():
    objects = rendered("claim")
    for item in with_pods(objects):
        if component_of(item) in ("nats", "check"):
            continue
        spec = pod_spec(item)
        volume = next(v for v in spec["volumes"] if v["name"] == "models")
        assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
        assert "fetch-model" not in [c["name"] for c in spec.get("initContainers", [])]
    config = json.loads(of_kind(objects, "ConfigMap", "config")[0]["data"]["values.yaml"])["config"]
    assert config["model"]["source"] == "/models/qwen/4b"


# --- what must not render
def test_optional_objects_are_absent_by_default():
    kinds = {o["kind"] for o in rendered("defaults")}
    assert not kinds & {
        "PodMonitor",
        "PrometheusRule",
        "ScaledObject",
        "HorizontalPodAutoscaler",
        "Role",
        "RoleBinding",
        "LeaderWorkerSet",
        "Ingress",
        "ClusterRole",
    }
    learner = of_kind(rendered("bare"), "StatefulSet", "learner")[0]
    assert "initContainers" not in pod_spec(learner)
    assert of_kind(rendered("bare"), "Deployment", "rollout")[0]["spec"]["replicas"] == 0
    assert "/dev/shm" not in json.dumps(of_kind(rendered("bare"), "Deployment", "rollout")[0])
    assert "/dev/shm" in json.dumps(of_kind(rendered("defaults"), "Deployment", "rollout")[0])


def test_large_integers_reach_the_services_as_integers():
    objects = render(
        {"config": {"bus": {"max_stream_bytes": 26843545600}, "run": {"seed": 1000000}}}
    )
    text = of_kind(objects, "ConfigMap", "config")[0]["data"]["values.yaml"]
    assert "26843545600" in text
    assert '"seed": 1000000' in text


def test_rules_and_alerts_are_bound_to_the_release():
    rule = of_kind(rendered("monitored"), "PrometheusRule")[0]
    text = json.dumps(rule["spec"])
    assert "SELECTOR" not in text
    assert f'release=\\"{RELEASE}\\",namespace=\\"{NAMESPACE}\\"' in text
