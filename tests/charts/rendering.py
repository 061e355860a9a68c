"""helm, run for real: what a chart renders and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "lagwise"
EXAMPLES = sorted(
    path
    for path in (ROOT / "examples").rglob("*.yaml")
    if isinstance(yaml.safe_load(path.read_text()).get("config"), dict)
)
REGISTRY = {"image": {"registry": "registry.example.com/team"}}
RELEASE, NAMESPACE = "r1", "ns1"

Object = dict[str, Any]


def tool(name: str) -> str:
    """A tool that scripts/tools.sh fetched; missing is a failure, never a skip."""
    own = ROOT / ".tools" / name
    found = str(own) if own.exists() else shutil.which(name)
    assert found, f"{name} is missing: run scripts/tools.sh (make chart does)"
    return found


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("helm"), *arguments], capture_output=True, text=True, check=False)


def merged(*trees: Object) -> Object:
    result: Object = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def lint(values: Object, *examples: Path) -> tuple[bool, str]:
    """Whether `helm lint --strict` accepts, and what it says."""
    done = _with_values(values, lambda file: helm(
        "lint", "--strict", str(CHART), *_files(examples), "-f", file))  # fmt: skip
    return done.returncode == 0, done.stdout + done.stderr


def render(
    values: Object | None = None, *examples: Path, release: str = RELEASE,
    namespace: str = NAMESPACE, kube_version: str = "",
) -> list[Object]:  # fmt: skip
    """The objects of `helm template`, shared by all who ask: not to be changed."""
    key = json.dumps(merged(REGISTRY, values or {}), sort_keys=True)
    return _render(key, examples, release, namespace, kube_version)


def render_fails(values: Object) -> str:
    """What `helm template` says when it refuses."""
    done = _with_values(merged(REGISTRY, values), lambda file: helm(
        "template", RELEASE, str(CHART), "-f", file))  # fmt: skip
    assert done.returncode != 0, "helm template accepted this"
    return done.stderr


def yaml_objects(text: str) -> list[Object]:
    return [item for item in yaml.load_all(text, yaml.CSafeLoader) if item]


def of_kind(objects: list[Object], kind: str, component: str = "") -> list[Object]:
    return [
        item
        for item in objects
        if item["kind"] == kind and (not component or component_of(item) == component)
    ]


def component_of(item: Object) -> str:
    return item["metadata"].get("labels", {}).get("app.kubernetes.io/component", "")


def pod_spec(item: Object) -> Object:
    """Of a LeaderWorkerSet the leader's: `test_ranks.py` says how its workers differ."""
    match item["kind"]:
        case "Pod":
            return item["spec"]
        case "LeaderWorkerSet":
            return item["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]
        case _:
            return item["spec"]["template"]["spec"]


def with_pods(objects: list[Object]) -> list[Object]:
    kinds = ("Deployment", "StatefulSet", "LeaderWorkerSet", "Pod")
    return [item for item in objects if item["kind"] in kinds]


@lru_cache(maxsize=256)
def _render(
    key: str, examples: tuple[Path, ...], release: str, namespace: str, kube_version: str
) -> list[Object]:
    version = ["--kube-version", kube_version] if kube_version else []
    done = _with_values(json.loads(key), lambda file: helm(
        "template", release, str(CHART), "--namespace", namespace, *version, *_files(examples),
        "-f", file))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return yaml_objects(done.stdout)


def _files(examples: tuple[Path, ...]) -> list[str]:
    return [part for path in examples for part in ("-f", str(path))]


def _with_values(values: Object, run: Any) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        return run(file.name)
