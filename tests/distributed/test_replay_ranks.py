"""Runs whose learner was several ranks, replayed on as many; and replays hurt on the way."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from harness import EXAMPLE, ROOT, Run, assert_sound, gone, small

from shared.cli import replay
from shared.cli.archive import ArchivedStream, ArchiveWriter, Record, read_stream
from shared.runtime.errors import Fatal
from shared.wire.codec import decode, encode
from shared.wire.journal import Batch, JournalEntry
from shared.wire.messages import Terminal
from shared.wire.trajectory import Trajectory

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(500)]

VERSIONS = 6
TWO = "learner.ranks=2"
MEGATRON = (TWO, "logit_oracle.ranks=2", "model.backend=megatron", "model.layout.tp=2")
TIMEOUT_S = 5.0


def up(run_dir: Path, *settings: str, versions: int = VERSIONS) -> None:
    """Train in order to the last version."""
    chosen = [part for setting in settings for part in ("--set", setting)]
    run = Run(run_dir, "up", "--config", str(EXAMPLE), *small(versions), *chosen)
    try:
        assert run.wait(400) == 0, run.output()
    finally:
        run.close()
    assert_sound(run.summary(), versions)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("recorded") / "run"
    up(run_dir, TWO)
    return run_dir


@pytest.fixture
def copied(recorded: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    shutil.copytree(recorded, tmp_path / "run")
    return tmp_path / "run"


def command(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shared.cli.main", "replay", str(run_dir), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def assert_equal(done: subprocess.CompletedProcess[str], versions: int) -> None:
    told = f"replayed {versions} versions: {versions} digests equal\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")


def rewrite(run_dir: Path, name: ArchivedStream, change: Callable[[Record], Record | None]) -> None:
    """Change the newest record for which `change` returns another one."""
    kept = list(read_stream(run_dir / "archive", name))
    for index in reversed(range(len(kept))):
        changed = change(kept[index])
        if changed is not None:
            kept[index] = changed
            break
    else:
        raise AssertionError("nothing to change")
    (run_dir / f"archive/{name}.bin").unlink()
    writer = ArchiveWriter(run_dir / "archive")
    writer.append(name, kept)
    writer.close()


def test_two_ranks_come_to_the_published_bytes_again(recorded: Path) -> None:
    assert_equal(command(recorded), VERSIONS)
    # One that is due while another is being written comes later.
    start = min(int(path.name[1:]) for path in (recorded / "checkpoints").glob("v[0-9]*"))
    assert start < VERSIONS
    assert_equal(command(recorded, "--from", str(start)), VERSIONS - start)


def test_one_process_does_not_pass_for_two(recorded: Path) -> None:
    done = command(recorded, "--set", "learner.ranks=1")
    assert done.returncode == 1
    assert "differs: digest " in done.stdout


@pytest.mark.skipif(find_spec("megatron") is None, reason="extra megatron")
def test_tensor_parallel_ranks_come_to_the_published_bytes_again(tmp_path: Path) -> None:
    up(tmp_path / "run", *MEGATRON, versions=3)
    assert_equal(command(tmp_path / "run"), 3)


def test_a_run_whose_number_of_ranks_changed_is_replayed_with_both(tmp_path: Path) -> None:
    up(tmp_path / "run", TWO, versions=2)
    up(tmp_path / "run", "learner.ranks=1", versions=3)
    up(tmp_path / "run", TWO, versions=4)
    assert_equal(command(tmp_path / "run"), 4)


def test_a_tampered_trajectory_is_named(copied: Path) -> None:
    def change(record: Record) -> Record | None:
        terminal = decode(record.payload, Terminal)
        if terminal.purpose != "train" or not isinstance(terminal.outcome, Trajectory):
            return None
        outcome = terminal.outcome.model_copy(update={"reward": 0.5})
        return replace(record, payload=encode(terminal.model_copy(update={"outcome": outcome})))

    rewrite(copied, "terminals", change)
    done = command(copied)
    assert done.returncode == 1
    assert "archive/terminals.bin: record " in done.stdout
    assert done.stdout.endswith(", is not the one that was trained\n")


def test_a_tampered_batch_gives_other_bytes(copied: Path) -> None:
    def change(record: Record) -> Record | None:
        entry = decode(record.payload, JournalEntry)
        batch = entry.body
        if not isinstance(batch, Batch) or not any(m.advantage for m in members(batch)):
            return None
        groups = tuple(
            group.model_copy(
                update={
                    "members": tuple(
                        m.model_copy(update={"advantage": 2 * m.advantage}) for m in group.members
                    )
                }
            )
            for group in batch.groups
        )
        body = batch.model_copy(update={"groups": groups})
        return replace(record, payload=encode(entry.model_copy(update={"body": body})))

    rewrite(copied, "journal", change)
    done = command(copied)
    assert done.returncode == 1, done.stderr
    assert "differs: digest " in done.stdout


def members(batch: Batch) -> Iterator:
    return (member for group in batch.groups for member in group.members)


def ranks() -> dict[int, psutil.Process]:
    """Of the replay that this process has started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            rank = process.environ().get("RANK")
        except psutil.Error:
            continue
        if rank is not None:
            found[int(rank)] = process
    return found


class Hurt:
    """Does something when version 2 is equal, and has seen all processes of the replay."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do
        self.processes: list[psutil.Process] = []
        self.at = 0.0

    def __call__(self, version: int) -> None:
        if version == 2:
            self.processes = psutil.Process().children(recursive=True)
            assert len(self.processes) == 3
            self.at = time.monotonic()
            self._do()

    def ended_within(self, bound_s: float) -> bool:
        while not gone(self.processes):
            if time.monotonic() > self.at + bound_s:
                return False
            time.sleep(0.05)
        return True


@pytest.mark.parametrize(
    ("rank", "line"),
    [(0, "rank 0: its process ended by SIGKILL"), (1, "rank 1: its process ended")],
)
def test_a_dead_rank_ends_the_replay_at_once(recorded: Path, rank: int, line: str) -> None:
    hurt = Hurt(lambda: ranks()[rank].kill())
    with pytest.raises(Fatal, match=line):
        replay.run(recorded, progress=hurt)
    assert hurt.ended_within(TIMEOUT_S)


def test_a_rank_that_dies_before_they_have_met_is_one_line(recorded: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "shared.cli.main", "replay", str(recorded)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while 1 not in (found := ranks()) and time.monotonic() < deadline:
        time.sleep(0.1)
    found[1].kill()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == (
        "lagwise: a rank ended before all had met: the replay ends here; start it again\n"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_ends_the_replay_within_the_bound(recorded: Path, rank: int) -> None:
    hurt = Hurt(lambda: ranks()[rank].suspend())
    found = (
        "rank 0, or one that it waits for" if rank == 0 else "rank (1|0, or one that it waits for)"
    )
    with pytest.raises(Fatal, match=f"^{found}: silent for {TIMEOUT_S:g} s"):
        replay.run(recorded, overrides=[f"model.rank_timeout_s={TIMEOUT_S}"], progress=hurt)
    assert hurt.ended_within(TIMEOUT_S + 10)


def test_an_interrupted_replay_leaves_nothing_running(
    recorded: Path, request: pytest.FixtureRequest
) -> None:
    # A shell's job in the background begins with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    hurt = Hurt(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        replay.run(recorded, progress=hurt)
    assert gone(hurt.processes)


def test_a_killed_replay_leaves_nothing_running(recorded: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "shared.cli.main", "replay", str(recorded)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
    )
    below: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(below) < 3 and time.monotonic() < deadline:
        below = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert len(below) == 3
    deadline = time.monotonic() + 10
    while not gone(below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(below)
