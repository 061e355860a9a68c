"""Images: linted, locked, and complete for every workload that the chart renders."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.charts.rendering import ROOT, pod_spec, render, with_pods

pytestmark = pytest.mark.chart

DOCKERFILE = ROOT / "charts/images/Dockerfile"
SERVICES = ("learner", "rollout", "env-agents", "logit-oracle", "operator")


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).with_name("hadolint")
    assert hadolint.exists(), "hadolint is missing: make chart installs it"
    done = subprocess.run([str(hadolint), str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_image_that_the_chart_names_is_built():
    objects = render({"deletionCost": {"enabled": True}, "image": {"tag": "1.2.3"}})
    named = {
        match[1]
        for item in with_pods(objects)
        for container in [*pod_spec(item).get("initContainers", []), *pod_spec(item)["containers"]]
        if (match := re.search(r"/lagwise-([a-z-]+):1\.2\.3$", container["image"]))
    }
    assert named == set(SERVICES)
    script = (ROOT / "scripts/images.sh").read_text()
    assert " ".join(SERVICES) in script


def pip_calls(service: str, tmp_path: Path, torch: str = "cpu") -> tuple[str, str]:
    """(what pip is asked for, what it is asked to install), with pip replaced by a recorder."""
    pip = tmp_path / "pip"
    pip.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >>{tmp_path}/calls\n'
        f'for a; do case $a in /tmp/req*) cat "$a" >{tmp_path}/wanted;; esac; done\n'
    )
    pip.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SERVICE": service,
                   "TORCH": torch, "TORCH_INDEX": "https://index.example.com"}  # fmt: skip
    done = subprocess.run(
        ["sh", "scripts/image_install.sh"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return (tmp_path / "calls").read_text(), (tmp_path / "wanted").read_text()


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_installs_its_services_extra_from_the_lock_and_no_more(service: str, tmp_path):
    calls, wanted = pip_calls(service, tmp_path)
    installs = calls.splitlines()
    assert all("--constraint constraints.txt" in line or "torch==" in line for line in installs)
    with_torch = service not in ("env-agents", "operator")
    assert ("torch==2.13.0+cpu" in calls) is with_torch
    assert ("transformers" in wanted) is (service in ("learner", "logit-oracle"))
    assert ("kubernetes" in wanted) is (service == "operator")
    assert "nkeys" in wanted
    assert "pytest" not in wanted


def test_every_image_whose_pod_fetches_a_model_can_fetch_one(tmp_path: Path):
    objects = render({"config": {"model": {"source": "hf://org/name@abc"}}})
    fetchers = {
        re.search(r"/lagwise-([a-z-]+):", container["image"])[1]  # type: ignore[index]
        for item in with_pods(objects)
        for container in pod_spec(item).get("initContainers", [])
        if container["name"] == "fetch-model"
    }
    assert fetchers == set(SERVICES) - {"operator"}
    for service in fetchers:
        assert "huggingface_hub==" in pip_calls(service, tmp_path)[1], service


def test_a_cuda_variant_takes_torch_from_its_own_index(tmp_path: Path):
    calls, wanted = pip_calls("rollout", tmp_path, torch="cu130")
    assert "--index-url https://index.example.com/cu130 torch==2.13.0+cu130" in calls
    assert "--constraint constraints-cuda.txt --requirement" in calls
    assert "vllm==0.32.0" in wanted


def locked(path: str) -> dict[str, str]:
    lines = (ROOT / path).read_text().splitlines()
    pins = (line.partition(";")[0].split("==") for line in lines if "==" in line and line[0] != "#")
    return {canonicalize_name(name): version.strip() for name, version in pins}


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("torch", ["cpu", "cu130"])
def test_the_lock_of_an_image_has_a_version_that_its_extras_accept(
    service: str, torch: str, tmp_path: Path
):
    calls, wanted = pip_calls(service, tmp_path, torch)
    [lock] = re.findall(r"--constraint (\S+) --requirement", calls)
    pins = locked(lock)
    for line in wanted.splitlines():
        requirement = Requirement(line)
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (lock, line, version)


def test_an_unknown_service_is_refused_by_name():
    environment = {**os.environ, "SERVICE": "rolout", "TORCH": "cpu", "TORCH_INDEX": "x"}
    done = subprocess.run(
        ["sh", "scripts/image_install.sh"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "SERVICE=rolout" in done.stderr


def test_every_pinned_extra_of_an_image_is_in_the_lock():
    lock = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    text = (ROOT / "pyproject.toml").read_text()
    for extra in ("kube", "nkeys", "hub", "s3", "torch", "learner", "env-agents"):
        block = re.search(rf"(?m)^{extra} = \[(.*?)\]", text, re.DOTALL)
        assert block
        for name in re.findall(r'"([A-Za-z0-9_.-]+)==', block[1]):
            assert name.lower().replace("_", "-") in lock, name


def test_the_image_runs_as_the_charts_user_without_root_and_takes_signals():
    text = DOCKERFILE.read_text()
    assert "USER 10001:10001" in text
    assert 'ENTRYPOINT ["python", "-m"]' in text  # exec form: Python is PID 1
    assert "latest" not in text
    assert re.search(r"ARG BASE_IMAGE=\S+:\d+\.\d+\.\d+", text)


def command(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_docker_without_its_daemon_leaves_the_work_to_podman(tmp_path: Path):
    command(tmp_path / "docker", 'echo "Cannot connect to the Docker daemon" >&2; exit 1')
    command(tmp_path / "podman", f'echo "$1" >>{tmp_path}/podman-calls')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SERVICES": "operator"}
    done = subprocess.run(
        ["scripts/images.sh", "build"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "podman-calls").read_text().split() == ["info", "build"]
    command(tmp_path / "podman", "exit 125")
    done = subprocess.run(
        ["scripts/images.sh", "build"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "podman info" in done.stderr


def test_pushing_needs_a_registry_and_refuses_latest(tmp_path: Path):
    command(tmp_path / "docker", "exit 0")
    clean = {k: v for k, v in os.environ.items() if k not in ("REGISTRY", "TAG")}
    environment = {**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for extra, said in (
        ({}, "REGISTRY is not set"),
        ({"REGISTRY": "r", "TAG": "latest"}, "latest"),
    ):
        done = subprocess.run(
            ["scripts/images.sh", "push"], cwd=ROOT, env={**environment, **extra},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert said in done.stderr
