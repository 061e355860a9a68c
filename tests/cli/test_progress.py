"""What the live view says, from leases, reports and events."""

import io

import pytest

from shared.cli.display import render
from shared.cli.progress import GENERATED_COUNTER, Progress, plain_line
from shared.wire.telemetry import Lease, StepReport


def lease(pod="rollout-0", at=100.0, incarnation="a", busy_s=0.0, tokens=0.0, **more) -> Lease:
    fields = {
        "role": "rollout", "pid": 1, "ready": True, "version": 3,
        "counters": {GENERATED_COUNTER: tokens},
    } | more  # fmt: skip
    return Lease(pod=pod, incarnation=incarnation, sent_at=at, busy_s=busy_s, **fields)


def step(version: int, at: float, **scalars: float) -> StepReport:
    return StepReport(
        version=version, started_at=at, trained_at=at, published_at=at, scalars=scalars
    )


@pytest.fixture
def progress() -> Progress:
    return Progress(started_at=90.0, versions=100, staleness_bound=4)


def test_busy_share_and_speed_are_differences_between_leases(progress: Progress) -> None:
    progress.on_lease(lease(at=100.0, busy_s=1.0, tokens=1000), 100.0)
    progress.on_lease(lease(at=102.0, busy_s=2.5, tokens=5000), 102.0)
    [service] = progress.snapshot(103.0).services
    assert service.busy_share == pytest.approx(0.75)
    assert service.tokens_per_s == pytest.approx(2000)


def test_a_lease_right_after_another_does_not_disturb_the_rates(progress: Progress) -> None:
    progress.on_lease(lease(at=100.0, busy_s=0.0), 100.0)
    progress.on_lease(lease(at=102.0, busy_s=1.0), 102.0)
    progress.on_lease(lease(at=102.01, busy_s=1.01, version=4), 102.01)
    [service] = progress.snapshot(103.0).services
    assert (service.version, service.busy_share) == (4, pytest.approx(0.5))
    progress.on_lease(lease(at=104.0, busy_s=2.0), 104.0)
    assert progress.snapshot(104.0).services[0].busy_share == pytest.approx(0.5)


def test_a_restarted_process_starts_its_rates_anew(progress: Progress) -> None:
    progress.on_lease(lease(at=100.0, busy_s=50.0), 100.0)
    progress.on_lease(lease(at=102.0, busy_s=0.1, incarnation="b"), 102.0)
    assert progress.snapshot(103.0).services[0].busy_share == 0.0


def test_a_silent_process_leaves_the_picture(progress: Progress) -> None:
    progress.on_lease(lease(at=100.0), 100.0)
    assert progress.snapshot(105.9).services != ()
    assert progress.snapshot(106.1).services == ()


def test_success_and_staleness_are_means_over_the_last_steps_and_the_maximum_is_kept(
    progress: Progress,
) -> None:
    for version in range(1, 11):
        progress.on_step(
            step(
                version,
                100.0 + version,
                success=0.1 * version,
                staleness_mean=2.0,
                staleness_max=4.0 if version == 1 else 3.0,
                tokens_trained=500.0,
            )
        )
    shot = progress.snapshot(111.0)
    assert shot.version == 10
    assert shot.success == pytest.approx(sum(0.1 * v for v in range(3, 11)) / 8)
    assert (shot.staleness_mean, shot.staleness_max) == (2.0, 4.0)
    assert shot.trained_per_s == pytest.approx(500.0)


def kill_and_recovery(progress: Progress) -> list[str | None]:
    return [
        progress.on_event({"at": 100.0, "event": "kill", "pod": "rollout-0", "pid": 7}),
        progress.on_event(
            {"at": 100.1, "event": "exited", "pod": "rollout-0", "code": -9, "cause": "signal 9"}
        ),
        progress.on_event(
            {"at": 100.3, "event": "started", "pod": "rollout-0", "pid": 8, "restart": 1}
        ),
        progress.on_lease(lease(at=101.0, incarnation="b", ready=False), 101.0),
        progress.on_lease(lease(at=103.0, incarnation="b"), 103.0),
        progress.on_lease(lease(at=105.0, incarnation="b"), 105.0),
    ]


def test_a_kill_and_the_recovery_from_it_are_told(progress: Progress) -> None:
    progress.version = 45
    assert kill_and_recovery(progress) == [
        "KILL -9 rollout-0 (pid 7) at version 45",
        "rollout-0 died: signal 9",
        "rollout-0 restarted (pid 8)",
        None,
        "rollout-0 is back, serving version 3",
        None,
    ]
    assert progress.snapshot(106.0).restarts == 1


def test_the_plain_line_is_complete_before_the_first_step_and_after(progress: Progress) -> None:
    assert plain_line(progress.snapshot(90.0)).startswith("[   0.0s] version 0/100  success -")
    progress.tickets = 12
    progress.on_step(step(48, 95.0, success=0.5, staleness_mean=1.5, staleness_max=3.0))
    line = plain_line(progress.snapshot(100.0))
    for part in ("version 48/100", "success 0.50", "staleness 1.50 (max 3 of 4)", "tickets 12"):
        assert part in line


def test_the_terminal_shows_the_kill_in_red(progress: Progress) -> None:
    from rich.console import Console

    kill_and_recovery(progress)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system="standard")
    console.print(render(progress.snapshot(106.0), "lagwise demo"))
    assert "\x1b[1;31m" in out.getvalue()
    assert "KILL -9 rollout-0" in out.getvalue()


def test_a_process_is_hung_when_it_alone_is_silent(progress: Progress) -> None:
    progress.on_lease(lease("rollout-0", at=100.0), 100.0)
    progress.on_lease(lease("rollout-1", at=130.0), 130.0)
    assert progress.silent(130.0, bound_s=30.0) == []
    assert progress.silent(130.5, bound_s=30.0) == ["rollout-0"]
    progress.forget("rollout-0")
    assert progress.silent(130.5, bound_s=30.0) == []


def test_nobody_is_hung_while_nobody_is_heard(progress: Progress) -> None:
    assert progress.silent(500.0, bound_s=30.0) == []
    progress.on_lease(lease("rollout-0", at=100.0), 100.0)
    progress.on_lease(lease("rollout-1", at=110.0), 110.0)
    assert progress.silent(200.0, bound_s=30.0) == []
