"""Dashboards: what the code would write; a real Prometheus answers every expression.

The Prometheus scrapes recorded metrics: two scrapes of each service of a real run, ten seconds
apart (`recorded/`). `make chart-run` asks live services; with --update-golden it renews them.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.charts.prometheus import DASHBOARDS, Prometheus, expressions, filled_in, rules
from tests.charts.rendering import NAMESPACE, RELEASE, ROOT, tool

pytestmark = pytest.mark.chart

RECORDED = Path(__file__).with_name("recorded")
COMPONENTS = ("learner", "rollout", "env-agents", "logit-oracle")
ALL_UP = "on (release, namespace) count by (release, namespace) (up == 1) == 4"
MAY_BE_SILENT = ("retries", "resumed")
"""Counters that appear with their first event."""


class Replay:
    """Serves the first recorded scrape, then the second for ever."""

    def __init__(self, component: str) -> None:
        texts = [(RECORDED / f"{component}-{n}.txt").read_bytes() for n in (1, 2)]
        served = itertools.chain([texts[0]] * 3, itertools.repeat(texts[1]))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = next(served)
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    replays = {component: Replay(component) for component in COMPONENTS}
    targets = [
        (replay.address, {"release": RELEASE, "namespace": NAMESPACE, "component": component,
                          "pod": f"{component}-0"})
        for component, replay in replays.items()
    ]  # fmt: skip
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), targets, rules())
    try:
        server.until(f"lagwise_rollout_wanted and {ALL_UP}", 60)
        for group in rules()["groups"]:
            for rule in group["rules"]:
                if "record" in rule:
                    server.until(rule["record"], 30)
        yield server
    finally:
        server.close()
        for replay in replays.values():
            replay.server.shutdown()
            replay.server.server_close()


def test_the_dashboards_are_fresh():
    done = subprocess.run(
        [sys.executable, "scripts/dashboards.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda path: path.stem)
def test_every_expression_has_an_answer(board: Path, prometheus: Prometheus):
    silent = [
        (panel, expr)
        for panel, expr in expressions(board)
        if not prometheus.query(filled_in(expr, RELEASE, NAMESPACE, "1m"))
    ]
    assert [s for s in silent if not any(word in s[1] for word in MAY_BE_SILENT)] == []


def test_an_expression_with_a_typo_would_be_seen(prometheus: Prometheus):
    assert not prometheus.query(f'lagwise_learner_polcy_version{{release="{RELEASE}"}}')
    with pytest.raises(AssertionError, match="parse error"):
        prometheus.query("sum(rate(x)")


def test_every_recording_rule_records_and_no_alert_fires_in_a_healthy_run(prometheus: Prometheus):
    for group in rules()["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                assert prometheus.query(rule["record"]), rule["record"]
    assert prometheus.query('ALERTS{alertstate="firing"}') == []


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_scrape_passes_prometheus_own_linter(component: str):
    for number in (1, 2):
        text = (RECORDED / f"{component}-{number}.txt").read_bytes()
        done = subprocess.run(
            [tool("promtool"), "check", "metrics"], input=text, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda path: path.stem)
def test_a_board_is_bound_to_one_release_and_says_why_of_each_panel(board: Path):
    content = json.loads(board.read_text())
    assert {v["name"] for v in content["templating"]["list"]} == {
        "datasource",
        "namespace",
        "release",
    }
    for panel in content["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["description"]
        for target in panel["targets"]:
            assert 'release="$release",namespace="$namespace"' in target["expr"]
