"""The report: self-contained, complete, and honest about what it lacks."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from shared.cli import audit, report, summary
from shared.cli.ledger import of_run
from shared.cli.records import load
from shared.cli.report_data import Regions, cloud, regions, smoothed, steps
from shared.cli.report_shadows import by_age
from shared.cli.report_style import PALETTE
from shared.cli.report_trajectory import explain
from shared.runtime.errors import ConfigError
from shared.wire.base import Array
from shared.wire.journal import RunStarted
from tests.cli.synthetic_run import SHADOWS, Spec, SyntheticRun, build

PANELS = [
    "Success against wall time", "Exactness", "What mask and clip act on",
    "What other routes would have done", "Staleness",
    "Dispatched against trained lengths", "Where the time went", "Ledger",
    "Weight synchronisation", "One trajectory, token by token", "Reproduce",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build(Spec(versions=12)).write(tmp_path_factory.mktemp("runs") / "run")
    audit.save(audit.run(directory, tokens=200), directory)
    summary.write(directory)
    return directory


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return report.write(run_dir).read_text()


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order or never."""

    VOID = frozenset({"meta", "br", "link", "img", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))


def test_all_panels_are_there_in_order(page: str) -> None:
    assert re.findall(r"<h2>(.*?)</h2>", page) == PANELS
    assert page.count("<svg") == 9
    assert 'class="none"' not in page


def test_it_loads_nothing_and_runs_nothing(page: str) -> None:
    outside = re.findall(r'(?:src|href)="(?!#)([^"]*)"|url\((?!#)([^)]*)\)', page)
    assert outside == []
    assert "<script" not in page
    assert "@import" not in page


def test_the_markup_is_balanced_and_ids_are_quoted(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(svg)


def test_every_colour_follows_the_colour_scheme(page: str) -> None:
    body = page[page.index("<body>") :]
    assert set(re.findall(r"#[0-9a-f]{6}\b", body)) <= {"#000000", "#ffffff"}
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", page))
    assert used <= set(PALETTE)
    assert "prefers-color-scheme:dark" in page


def test_the_figures_are_those_of_the_run(page: str, run_dir: Path) -> None:
    facts = json.loads((run_dir / "summary.json").read_text())
    text = text_of(page)
    assert f"{facts['success_base']:.2f} → {facts['success_final']:.2f}" in text
    assert f"0 of {facts['audited_tokens']:,}" in text
    assert "kill −9 rollout-1" in text
    assert "bound 4" in text
    assert f"{facts['trajectories_issued']:,} issued = {facts['trajectories_trained']:,}" in text
    assert "lagwise demo --seed 0" in text
    assert "max_staleness: 4" in text
    assert "0.5 ≤ D ≤ 5" in text
    assert "0.8 ≤ S ≤ 1.28" in text


def test_the_same_run_gives_the_same_page(page: str, run_dir: Path) -> None:
    assert report.write(run_dir).read_text() == page


def test_a_run_with_problems_says_so_first(tmp_path: Path) -> None:
    synthetic = build(Spec(versions=3))
    synthetic.queued.clear()
    run_dir = synthetic.write(tmp_path / "run")
    text = text_of(report.write(run_dir).read_text())
    assert "Not sound: a ticket is lost: 1" in text
    assert "not ok" in text
    assert "Not audited. Run: lagwise audit" in text


def test_an_empty_run_explains_every_missing_panel(tmp_path: Path) -> None:
    empty = SyntheticRun(Spec())
    empty.journal.append(RunStarted(incarnation="i", seed=0, model_digest="d"))
    run_dir = empty.write(tmp_path / "run")
    for name in ("run.json", "resolved.yaml"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "base")
    page = report.write(run_dir).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == PANELS
    assert page.count('class="none"') == 10
    assert "<svg" not in page


def test_markup_in_a_run_is_escaped(tmp_path: Path) -> None:
    run_dir = build(Spec(versions=2)).write(tmp_path / "run")
    facts = json.loads((run_dir / "run.json").read_text())
    facts["command"] = ["lagwise", "<script>alert(1)</script>"]
    (run_dir / "run.json").write_text(json.dumps(facts))
    assert "<script" not in report.write(run_dir).read_text()


def test_the_explained_trajectory_switches_versions_and_agrees_with_the_audit(
    run_dir: Path,
) -> None:
    records = load(run_dir)
    explained = explain(records, of_run(records))
    assert explained is not None
    assert len(explained.versions) > 1
    assert explained.switch_inside_turn
    sampled = [token for token in explained.tokens if token.sampled]
    assert 0 < len(sampled) < len(explained.tokens)
    for token in sampled:
        assert token.old == pytest.approx(token.reference, abs=1e-6)
        assert token.age == explained.batch_version - token.version
        if token.age == 0:
            assert token.log_s == pytest.approx(0, abs=1e-6)
        else:
            assert abs(token.log_s) > 1e-6
    text = "".join(token.text for token in explained.tokens)
    assert text.startswith("SFFF\nFHFH\nFFFH\nHFFG\n@00>")


def test_without_a_tokenizer_ids_are_shown(tmp_path: Path) -> None:
    run_dir = build(Spec(versions=2)).write(tmp_path / "run")
    (run_dir / "base" / "tokenizer.json").unlink()
    records = load(run_dir)
    explained = explain(records, of_run(records))
    assert explained is not None
    assert explained.tokens[0].text == f"[{explained.tokens[0].token_id}]"


def test_figures_by_age_are_token_weighted_means_over_the_run(run_dir: Path) -> None:
    reports = steps(load(run_dir))
    found = by_age(reports)
    assert found is not None
    assert found.reference == "oracle"
    assert set(found.error) == set(found.wrong) == set(SHADOWS)
    assert set(found.k3) == {"oracle", *SHADOWS}

    def summed(name: str) -> np.ndarray:
        return sum(r.arrays[name].numpy() for r in reports)

    tokens = summed("shadow_oracle_age_count")
    assert np.array_equal(found.ages, np.flatnonzero(tokens >= 30))
    for name, values in found.error.items():
        expected = summed(f"shadow_{name}_age_error_sum") / np.maximum(tokens, 1)
        assert values == pytest.approx(expected[found.ages])
    exact = summed("shadow_oracle_age_k3_d_sum") / np.maximum(tokens, 1)
    assert found.k3["oracle"] == pytest.approx(exact[found.ages])
    assert by_age(reports, min_tokens=1e9) is None


def test_the_panel_of_shadows_carries_every_route_with_its_numbers(
    page: str, run_dir: Path
) -> None:
    reports = steps(load(run_dir))
    text = text_of(page)
    assert "held against the exact answer of oracle" in text
    for name in SHADOWS:
        mean = np.mean([r.scalars[f"shadow_{name}_error_mean"] for r in reports])
        wrong = np.mean([r.scalars[f"shadow_{name}_wrongly_rejected"] for r in reports])
        assert re.search(rf"{name} ?{mean:.4f}.*?{wrong:.2%}", text)


def test_a_run_without_an_exact_answer_says_so(tmp_path: Path) -> None:
    synthetic = build(Spec(versions=3, route="rollout"))
    for number, step in enumerate(synthetic.steps):
        arrays = {n: a for n, a in step.arrays.items() if not n.startswith("shadow_")}
        synthetic.steps[number] = step.model_copy(update={"arrays": arrays})
    run_dir = synthetic.write(tmp_path / "run")
    values = yaml.safe_load((run_dir / "resolved.yaml").read_text())
    values["config"]["old_logprobs"] = {"route": "rollout"}
    (run_dir / "resolved.yaml").write_text(yaml.safe_dump(values))
    audit.save(audit.run(run_dir, tokens=50), run_dir)
    summary.write(run_dir)
    text = text_of(report.write(run_dir).read_text())
    assert "trained on rollout, an approximation; nothing was lost" in text
    assert "no token was promised its own version" in text
    assert "No route was held against an exact answer" in text
    assert "D and S as rollout has them, not the exact ones" in text
    assert "kept by the same mask under current_recompute" not in text


def test_the_cloud_is_the_exact_one_where_an_exact_route_looked_on(tmp_path: Path) -> None:
    synthetic = build(Spec(versions=2, route="rollout"))
    points = np.array([[0.0, 0.0, 1], [1.0, -0.9, 1], [0.0, 1.0, 2], [0.2, 1.5, 2]])
    for number, step in enumerate(synthetic.steps):
        arrays = {**step.arrays, "exact_scatter": Array.of(points, "f4")}
        synthetic.steps[number] = step.model_copy(update={"arrays": arrays})
    found = cloud(load(synthetic.write(tmp_path / "run")))
    assert found is not None
    assert found.exact
    assert len(found.points) == 8
    region = Regions((-0.7, 1.6), (-1.0, 0.5), "icepop")
    # first two: both; the third: strip alone (log S above the clip); the fourth: neither
    assert found.kept(region) == (0.5, 0.0, 0.25)
    assert found.kept(Regions((-0.7, 0.05), (-1.0, 2.0), "icepop")) == (0.25, 0.25, 0.0)


def test_the_regions_follow_the_configuration(tmp_path: Path) -> None:
    run_dir = build(Spec(versions=1)).write(tmp_path / "run")
    values = (run_dir / "resolved.yaml").read_text()
    algo = "    algo: {corrections: [{kind: tis}], objective: {kind: ppo, low: 0.5, high: 0.5}}\n"
    (run_dir / "resolved.yaml").write_text(values.replace("  learner:\n", f"  learner:\n{algo}", 1))
    region = regions(load(run_dir))
    assert region.mask is None
    assert region.clip == pytest.approx((np.log(0.5), np.log(1.5)))


def test_smoothing_bridges_gaps() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0])
    assert smoothed(values, 3) == pytest.approx([1.0, 2.0, 4.0, 4.0])


def test_the_readme_figure_carries_its_own_colours(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "k3_by_age.svg"
    report.plot_k3_by_age(run_dir, path)
    svg = path.read_text()
    ET.fromstring(svg.encode())
    assert "--blue:" in svg
    assert "current_recompute" in svg


def test_a_run_without_shadow_has_no_readme_figure(tmp_path: Path) -> None:
    synthetic = build(Spec(versions=2))
    synthetic.steps = [s.model_copy(update={"arrays": {}}) for s in synthetic.steps]
    with pytest.raises(ConfigError, match=r"old_logprobs\.shadow"):
        report.plot_k3_by_age(synthetic.write(tmp_path / "run"), tmp_path / "x.svg")


def test_a_configuration_of_another_release_is_one_line(tmp_path: Path) -> None:
    run_dir = build(Spec(versions=1)).write(tmp_path / "run")
    values = (run_dir / "resolved.yaml").read_text()
    old = values.replace("  learner:\n", "  learner:\n    algo: {veto: 0.1}\n", 1)
    (run_dir / "resolved.yaml").write_text(old)
    with pytest.raises(ConfigError, match="`veto` is not a known key"):
        regions(load(run_dir))
