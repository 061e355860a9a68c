"""What the pages and NOTES.txt tell people to type works, and the refusals they list are said."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.charts.rendering import CHART, REGISTRY, ROOT, Object, lint, merged, tool

pytestmark = pytest.mark.chart

DEPLOY = (ROOT / "docs/deploy.md").read_text()
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*.yaml")),
]
VALUE_FLAGS = ("-f", "--set", "--set-json", "--set-string", "-n", "--namespace")


def commands(text: str) -> list[list[str]]:
    """`helm` commands of fenced blocks and of comments in values files, a list of words each."""
    blocks = re.findall(r"(?m)^```\n(.*?)^```", text, re.DOTALL)
    blocks += re.findall(r"(?m)^# {3}(helm .*)$", text)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("helm ")]


def releases() -> list[tuple[str, list[str]]]:
    return [
        (path.name, words)
        for path in PAGES
        for words in commands(path.read_text())
        if {"install", "upgrade"} & set(words)
    ]


def as_template(words: list[str]) -> list[str]:
    """`helm template` with the same release, chart and values."""
    flags: list[str] = []
    rest = iter(words[1:])
    plain = []
    for word in rest:
        if word in VALUE_FLAGS:
            flags += [word, next(rest)]
        elif not word.startswith("-") and word not in ("install", "upgrade"):
            plain.append(word)
    return ["template", *plain, *flags]


@pytest.mark.parametrize(
    ("page", "words"), releases(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_installation_and_upgrade_on_the_pages_renders(page: str, words: list[str]):
    given = [*as_template(words), "--set", "image.registry=registry.example.com/team"]
    done = subprocess.run([tool("helm"), *given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (page, done.stderr)


def test_the_pages_tell_of_installations_and_deploy_does_it_in_six_commands():
    assert len(releases()) >= 5
    section = DEPLOY.split("## Six commands")[1].split("\nThe same with")[0]
    typed = re.findall(r"(?m)^```\n(.*?)^```", section, re.DOTALL)[0].replace("\\\n", " ")
    assert len(typed.splitlines()) == 6


def test_the_external_bus_of_the_page_is_accepted():
    [line] = re.findall(r"(?m)^nats: \{enabled: false.*$", DEPLOY)
    accepted, said = lint(merged(REGISTRY, yaml.safe_load(line)))
    assert accepted, said


REFUSED: dict[str, Object] = {
    "at '/image/registry': minLength": {"image": {"registry": ""}},
    "at '/rollout/replicas': got number, want null": {
        "autoscaling": {"mode": "external"},
        "rollout": {"replicas": 2},
    },
    "at '/nats/external/url'": {"nats": {"enabled": False}},
    "at '/image/tag': 'not' failed": {"image": {"tag": "latest"}},
}


@pytest.mark.parametrize("message", re.findall(r"(?m)^\| `(at '.*?)` \|", DEPLOY))
def test_a_refusal_on_the_page_is_what_lint_says(message: str):
    accepted, said = lint(merged(REGISTRY, REFUSED[message]))
    assert not accepted
    assert message in said


# --- NOTES.txt
def notes(values: Object, folder: Path) -> str:
    """What `helm install` prints at the end; no cluster is asked."""
    (folder / "values.yaml").write_text(yaml.safe_dump(merged(REGISTRY, values)))
    done = subprocess.run(
        [tool("helm"), "install", "r1", str(CHART), "--namespace", "ns1", "--dry-run=client", "-f",
         str(folder / "values.yaml")],
        capture_output=True, text=True, env={**os.environ, "KUBECONFIG": str(folder / "none")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\nNOTES:\n")[1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "helm upgrade ... --set rollout.replicas=6"),
        (
            {"autoscaling": {"mode": "external"}},
            "lagwise scale rollout 6 --namespace ns1 --release r1",
        ),
        (
            {"autoscaling": {"mode": "hpa"}, "monitoring": {"prometheusRule": {"enabled": True}}},
            "hpa scales the rollouts between 1 and 8",
        ),
        ({"monitoring": {"podMonitor": {"enabled": False}}}, "Nobody scrapes it"),
        ({}, "three replicas"),
    ],
)  # fmt: skip
def test_the_notes_say_what_to_do_next_in_this_release(values: Object, said: str, tmp_path: Path):
    text = notes(values, tmp_path)
    assert said in text
    assert "helm -n ns1 test r1 --logs" in text
    assert "kubectl -n ns1 logs -f statefulset/r1-lagwise-learner -c learner" in text
    assert "{{" not in text


def test_the_notes_warn_of_gpus_that_the_torch_engine_leaves_idle(tmp_path: Path):
    gpus: Object = {"rollout": {"gpu": {"count": 1}}}
    assert "config.rollout.engine: vllm" in notes(gpus, tmp_path)
    sampling = merged(gpus, {"config": {"rollout": {"engine": "vllm"}}})
    assert "config.rollout.engine" not in notes(sampling, tmp_path)


def test_the_notes_of_a_learner_over_several_nodes_name_the_set_that_runs_it(tmp_path: Path):
    text = notes({"learner": {"nodes": 2, "storage": {"existingClaim": "run"}}}, tmp_path)
    assert "statefulset/" not in text
    assert "app.kubernetes.io/component=learner" in text
