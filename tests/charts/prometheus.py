"""A real Prometheus on this machine, and what the chart's rules and dashboards ask of it."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from shared.runtime import nats_server
from tests.charts.rendering import CHART, NAMESPACE, RELEASE, of_kind, render, tool

DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))


def rules(release: str = RELEASE, namespace: str = NAMESPACE) -> dict[str, Any]:
    """The groups of the rendered PrometheusRule."""
    objects = render(
        {"monitoring": {"prometheusRule": {"enabled": True}}}, release=release, namespace=namespace
    )
    return of_kind(objects, "PrometheusRule")[0]["spec"]


def expressions(board: Path) -> list[tuple[str, str]]:
    """(panel, expression) of a dashboard, as Grafana would send it."""
    found = []
    for panel in json.loads(board.read_text())["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel.get("targets", [])]
    assert found, board
    return found


def filled_in(expr: str, release: str, namespace: str, window: str) -> str:
    return (
        expr.replace("$release", release).replace("$namespace", namespace)
        .replace("$__rate_interval", window)
    )  # fmt: skip


class Prometheus:
    """Scrapes every second."""

    def __init__(
        self, folder: Path, targets: list[tuple[str, dict[str, str]]], groups: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # as rendered, but evaluated at once: each group waits for a random part of its interval
        quick = {"groups": [{**group, "interval": "1s"} for group in groups["groups"]]}
        (folder / "rules.yaml").write_text(yaml.safe_dump(quick))
        static = [{"targets": [address], "labels": labels} for address, labels in targets]
        config = {
            "global": {
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "evaluation_interval": "1s",
            },
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "lagwise", "static_configs": static}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{nats_server.free_port()}"
        with (folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Current samples; an expression that Prometheus refuses raises."""
        text = urllib.parse.urlencode({"query": expr})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{text}", timeout=10) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: {error.read().decode()}") from error

    def until(self, expr: str, bound_s: float) -> None:
        deadline = time.monotonic() + bound_s
        while True:
            try:
                if self.query(expr):
                    return
            except OSError:
                pass  # not up yet
            assert time.monotonic() < deadline, f"nothing within {bound_s} s: {expr}"
            time.sleep(0.3)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
