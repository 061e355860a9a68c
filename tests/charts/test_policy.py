"""Best practice by another's rules: checkov over several values, exceptions with a reason each."""

from __future__ import annotations

import copy
import json
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tests.charts.rendering import ROOT, Object, merged, of_kind, pod_spec, render, tool
from tests.charts.test_render import VARIANTS

pytestmark = pytest.mark.chart

EXCEPTIONS = ROOT / "charts/policy.yaml"
CHECKED = {
    "defaults": VARIANTS["defaults"],
    "gpu": VARIANTS["gpu"],
    "external": VARIANTS["external bus"],
    "everything": merged(
        VARIANTS["hpa"], VARIANTS["deletion cost"], VARIANTS["tls"], VARIANTS["hub, shared cache"]
    ),
}
BROKEN = "broken"

Failure = tuple[str, str]
"""(check, Kind.name)"""


def broken() -> list[Object]:
    """A pod as nobody should run it: what the engine must see."""
    deployment = copy.deepcopy(of_kind(render({}), "Deployment", "rollout")[0])
    deployment["metadata"]["name"] = "broken"
    spec = pod_spec(deployment)
    spec["hostNetwork"] = True
    spec["containers"][0]["securityContext"] = {"privileged": True}
    return [deployment]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[Failure]]:
    """What checkov refuses, by variant; one run for all, for it takes seconds to start."""
    folder = tmp_path_factory.mktemp("policy")
    rendered = {name: render(values) for name, values in CHECKED.items()}
    for name, objects in {**rendered, BROKEN: broken()}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(objects))
    done = subprocess.run(
        [tool("checkov"), "--framework", "kubernetes", "--directory", str(folder),
         "--output", "json", "--quiet", "--compact", "--skip-download"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 1000
    found: dict[str, set[Failure]] = {name: set() for name in (*rendered, BROKEN)}
    for failed in report["results"]["failed_checks"]:
        kind, _, name = failed["resource"].split(".", 2)
        found[Path(failed["file_path"]).stem].add((failed["check_id"], f"{kind}.{name}"))
    return found


def exceptions() -> list[dict[str, str]]:
    return yaml.safe_load(EXCEPTIONS.read_text())["exceptions"]


def excuses(exception: dict[str, str], failure: Failure) -> bool:
    return exception["check"] == failure[0] and fnmatch(failure[1], exception["where"])


def test_what_the_policies_refuse_is_justified_in_the_file(failures: dict[str, set[Failure]]):
    unexcused = {
        (variant, *failure)
        for variant in CHECKED
        for failure in failures[variant]
        if not any(excuses(exception, failure) for exception in exceptions())
    }
    assert unexcused == set()


def test_every_exception_has_a_reason_and_excuses_something(failures: dict[str, set[Failure]]):
    seen = [failure for variant in CHECKED for failure in failures[variant]]
    for exception in exceptions():
        assert exception.keys() == {"check", "where", "reason"}
        assert len(exception["reason"].split()) >= 8, exception
        assert any(excuses(exception, failure) for failure in seen), exception


def test_a_privileged_pod_on_the_hosts_network_would_be_refused(failures: dict[str, set[Failure]]):
    refused = {
        check
        for check, where in failures[BROKEN]
        if not any(excuses(exception, (check, where)) for exception in exceptions())
    }
    assert {"CKV_K8S_16", "CKV_K8S_19", "CKV_K8S_20", "CKV_K8S_22", "CKV_K8S_37"} <= refused
