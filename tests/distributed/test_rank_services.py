"""Runs whose learner and oracle are several ranks: trained, audited, and hurt in the middle."""

import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from harness import EXAMPLE, Run, assert_sound, gone, small

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(500)]

VERSIONS = 24
TIMEOUT_S = 15.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*settings: str) -> Run:
        arguments = ["up", "--config", str(EXAMPLE), "--audit", "300", *small(VERSIONS)]
        given = (f"model.rank_timeout_s={TIMEOUT_S}", "learner.ranks=2", *settings)
        arguments += [part for setting in given for part in ("--set", setting)]
        runs.append(Run(tmp_path / "run", *arguments))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def ranks(run: Run, pod: str = "learner-0") -> list[psutil.Process]:
    """The processes that torchrun started, by rank."""
    launcher = run.live(pod)
    if launcher is None:
        return []
    found: dict[int, psutil.Process] = {}
    for process in launcher.children():
        try:
            found[int(process.environ()["RANK"])] = process
        except (psutil.Error, KeyError):
            return []
    return [found[rank] for rank in sorted(found)]


def wait_for_ranks(run: Run) -> list[psutil.Process]:
    run.until(lambda: len(ranks(run)) == 2, 30)
    return ranks(run)


def ended(run: Run) -> list[dict]:
    return [event for event in run.events("exited") if event["pod"] == "learner-0"]


def confirmed(run: Run) -> int:
    return (run.run_dir / "logs" / "learner-0.log").read_text().count('"version_confirmed"')


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((), id="fsdp2"),
        pytest.param(
            ("model.backend=megatron", "model.layout.tp=2"),
            id="tp2",
            marks=pytest.mark.skipif(find_spec("megatron") is None, reason="extra megatron"),
        ),
    ],
)
def test_a_learner_and_an_oracle_of_two_ranks_train_exactly(start, layout) -> None:
    run = start("logit_oracle.ranks=2", *layout)
    assert run.wait(400) == 0, run.output()
    summary = run.summary()
    assert_sound(summary, VERSIONS)
    assert summary["restarts"] == 0, run.output()
    assert summary["audit_mismatches"] == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_with_its_name_and_the_run_goes_on(start, rank: int) -> None:
    run = start()
    run.until(lambda: run.version() >= 3, 240)
    both = wait_for_ranks(run)
    both[rank].kill()
    run.until(lambda: bool(ended(run)), TIMEOUT_S)
    if rank:
        assert "rank 1: its process ended: starting again" in ended(run)[0]["cause"]
    assert gone(both)
    assert run.wait(400) == 0, run.output()
    assert_sound(run.summary(), VERSIONS)
    assert run.summary()["audit_mismatches"] == 0
    assert confirmed(run) >= 1  # what was committed came out with the same digest


def test_a_frozen_rank_is_noticed_within_the_bound_and_the_run_goes_on(start) -> None:
    run = start()
    run.until(lambda: run.version() >= 3, 240)
    both = wait_for_ranks(run)
    both[1].suspend()
    began = time.monotonic()
    run.until(lambda: bool(ended(run)), TIMEOUT_S + 20)
    assert time.monotonic() - began >= TIMEOUT_S - 5
    assert "rank 1: silent for" in ended(run)[0]["cause"]
    assert gone(both)
    assert run.wait(400) == 0, run.output()
    assert_sound(run.summary(), VERSIONS)


def test_ranks_do_not_outlive_their_launcher(start) -> None:
    run = start()
    both = wait_for_ranks(run)
    run.kill("learner-0")
    run.until(lambda: gone(both), 20)
    assert run.wait(400) == 0, run.output()
    assert_sound(run.summary(), VERSIONS)


def test_a_number_of_ranks_that_does_not_fit_is_refused_and_not_tried_again(start) -> None:
    run = start("model.backend=megatron", "model.layout.tp=3")
    assert run.wait(60) == 2, run.output()
    assert "learner.ranks 2 is no multiple of model.layout tp 3" in run.output()
