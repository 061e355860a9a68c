"""A run is trained again from its archive, on every route, and whatever was changed is noticed."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.learner.config import LearnerConfig
from shared.cli import replay
from shared.cli.archive import ArchivedStream, ArchiveWriter, Record, read_stream
from shared.cli.main import main
from shared.runtime.errors import ConfigError
from shared.runtime.memory_server import MemoryServer
from shared.wire.base import Array
from shared.wire.codec import decode, encode
from shared.wire.messages import Score, Terminal
from shared.wire.trajectory import Trajectory
from tests.learner.crash_world import (
    NUM_VERSIONS,
    archive,
    config_for,
    learn,
    players,
    save_model,
)
from tests.learner.interrupt_world import World

ROOT = Path(__file__).resolve().parents[2]
ROUTES = (
    "oracle", "snapshot_old", "ewma_prox", "ppo_ewma_async", "interp_prox_loglinear",
    "interp_prox_linear", "current_recompute", "rollout",
)  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recorded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default route that ended in order."""
    run_dir = tmp_path_factory.mktemp("recorded")
    asyncio.run(record(config_for(model_dir, run_dir), run_dir))
    return run_dir


@pytest.fixture
def run_dir(recorded: Path, tmp_path: Path) -> Path:
    """A copy to be hurt."""
    shutil.copytree(recorded, tmp_path / "run")
    return tmp_path / "run"


async def record(config: LearnerConfig, run_dir: Path) -> None:
    server = MemoryServer()
    async with players(server):
        assert not await learn(server, config, "first", None)
    await archive(server, run_dir)


def rewrite(
    run_dir: Path, name: ArchivedStream, change: Callable[[list[Record]], list[Record]]
) -> None:
    kept = change(list(read_stream(run_dir / "archive", name)))
    (run_dir / f"archive/{name}.bin").unlink()
    writer = ArchiveWriter(run_dir / "archive")
    writer.append(name, kept)
    writer.close()


@pytest.mark.parametrize("route", ROUTES)
async def test_every_route_comes_to_the_published_bytes_again(
    route: str, model_dir: Path, tmp_path: Path
) -> None:
    """The run dies twice on the way; scores come from the archive, or from replayed versions."""
    server, config = MemoryServer(), config_for(model_dir, tmp_path, route)
    async with players(server):
        assert await learn(server, config, "first", ("manifest", 3, "after"))
        assert await learn(server, config, "second", ("batch", 1, "after"))
        assert not await learn(server, config, "third", None)
    await archive(server, tmp_path)
    result = await in_thread(tmp_path)
    assert (result.versions, result.problem) == (NUM_VERSIONS, "")


async def test_route_interrupt_is_replayed_from_the_scores_that_its_fences_stored(
    tmp_path: Path,
) -> None:
    async with World(tmp_path, 3) as world:
        for role in ("learner", "rollout", "env_agents"):
            world.start(role)
        assert not await world.learned()
        await archive(world.server, tmp_path, "fence")
    result = await in_thread(tmp_path)
    assert (result.versions, result.problem) == (3, "")


async def test_a_run_whose_learning_rate_changed_on_the_way_is_replayed_with_both(
    model_dir: Path, tmp_path: Path
) -> None:
    server, config = MemoryServer(), config_for(model_dir, tmp_path, "ppo_ewma_async")
    optimizer = config.learner.optimizer
    shorter = config.learner.model_copy(update={"versions": 3})
    faster = config.learner.model_copy(
        update={"optimizer": optimizer.model_copy(update={"lr": 3e-2})}
    )
    async with players(server):
        for number, learner in enumerate((shorter, faster)):
            changed = config.model_copy(update={"learner": learner})
            assert not await learn(server, changed, f"process {number}", None)
    await archive(server, tmp_path)
    result = await in_thread(tmp_path)
    assert (result.versions, result.problem) == (NUM_VERSIONS, "")
    result = await in_thread(tmp_path, "learner.optimizer.lr=3e-2")
    assert result.versions == 0
    assert result.problem.startswith("version 1 differs: digest ")


async def in_thread(run_dir: Path, *overrides: str) -> replay.Replayed:
    return await asyncio.to_thread(replay.run, run_dir, overrides=overrides)


def checkpointed(run_dir: Path) -> int:
    """Return a version to begin from; one that is due while another is written comes later."""
    return min(int(path.name[1:]) for path in (run_dir / "checkpoints").glob("v[0-9]*"))


def test_the_command_says_it_in_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run_dir)]) == 0
    assert capsys.readouterr().out == "replayed 5 versions: 5 digests equal\n"
    assert main(["replay", str(run_dir), "--versions", "3"]) == 0
    assert capsys.readouterr().out == "replayed 3 versions: 3 digests equal\n"
    start = checkpointed(run_dir)
    assert main(["replay", str(run_dir), "--from", str(start)]) == 0
    told = f"replayed {5 - start} versions: {5 - start} digests equal\n"
    assert capsys.readouterr().out == told
    assert main(["replay", str(run_dir), "--set", "learner.optimizer.lr=0.02"]) == 1
    line = capsys.readouterr().out
    assert line.startswith("replayed 0 versions: 0 digests equal, then version 1 differs: digest ")
    assert line.count("\n") == 1


def test_nothing_of_the_run_folder_is_touched(run_dir: Path) -> None:
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    replay.run(run_dir, start=checkpointed(run_dir))
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


def test_a_tampered_trajectory_is_named(run_dir: Path) -> None:
    tampered: list[str] = []

    def change(records: list[Record]) -> list[Record]:
        for index in reversed(range(len(records))):
            terminal = decode(records[index].payload, Terminal)
            if terminal.purpose == "train" and isinstance(terminal.outcome, Trajectory):
                outcome = terminal.outcome.model_copy(update={"reward": 0.5})
                changed = encode(terminal.model_copy(update={"outcome": outcome}))
                records[index] = replace(records[index], payload=changed)
                tampered.append(terminal.ticket_id)
                return records
        raise AssertionError

    rewrite(run_dir, "terminals", change)
    result = replay.run(run_dir)
    assert replay.line(result).startswith(
        f"replayed {NUM_VERSIONS - 1} versions: {NUM_VERSIONS - 1} digests equal, then version "
        f"{NUM_VERSIONS}: archive/terminals.bin: record "
    )
    assert result.problem.endswith(
        f"of ticket {tampered[0]}, trained in version {NUM_VERSIONS}, is not the one that was "
        "trained"
    )


def test_a_tampered_score_gives_other_bytes(run_dir: Path) -> None:
    def change(records: list[Record]) -> list[Record]:
        for index, record in enumerate(records):
            score = decode(record.payload, Score)
            [sequence] = score.sequences
            values = Array.of(sequence.old_logprobs.numpy() * 1.2, "f4")
            other = sequence.model_copy(update={"old_logprobs": values})
            payload = encode(score.model_copy(update={"sequences": (other,)}))
            records[index] = replace(record, payload=payload)
        return records

    rewrite(run_dir, "scores", change)
    assert "differs: digest" in replay.run(run_dir).problem


def test_records_that_were_purged_before_anything_needed_them_are_no_gap(run_dir: Path) -> None:
    def evaluations_only(records: list[Record]) -> list[Record]:
        return [r for r in records if decode(r.payload, Terminal).purpose == "train"]

    rewrite(run_dir, "terminals", evaluations_only)
    assert replay.run(run_dir).versions == NUM_VERSIONS


@pytest.mark.parametrize("name", ["terminals", "scores", "journal", "manifests"])
def test_an_archive_that_lacks_a_record_is_one_line(
    name: ArchivedStream, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run_dir, name, lambda records: [*records[:6], *records[7:]][: len(records) // 2])
    code = main(["replay", str(run_dir)])
    told = capsys.readouterr()
    if name == "manifests":  # fewer versions, each of them whole
        assert (code, told.out) == (0, "replayed 2 versions: 2 digests equal\n")
        rewrite(run_dir, name, lambda records: [records[0], *records[2:]])
        code = main(["replay", str(run_dir)])
        told = capsys.readouterr()
    assert code == 2
    assert f"archive/{name}.bin lacks" in told.err
    assert told.err.count("\n") == 1


def test_requests_that_cannot_be_met_are_one_line(
    run_dir: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(tmp_path / "other", seed=1)
    weights = run_dir / "checkpoints/v000005/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    cases = {
        ("--versions", "9"): "manifests.bin has versions up to 5",
        ("--from", "5"): "versions 6 to 5 cannot be replayed",
        ("--from", "3"): "--from 3: checkpoint",
        ("--set", f"model.source={other}"): "is not the model that this run began with",
        ("--set", "model.source=nowhere"): "model.source",
        ("--set", "learner.lrr=1"): "`learner.lrr` is not a known key",
        ("--set", "learner.ranks=2", "--set", "model.layout.tp=2"): "model.layout",
    }
    for arguments, words in cases.items():
        assert main(["replay", str(run_dir), *arguments]) == 2, arguments
        told = capsys.readouterr().err
        assert words in told
        assert told.count("\n") == 1
    with pytest.raises(ConfigError, match="journal"):
        replay.run(tmp_path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.backend=megatron", "needs megatron-core (not here): install the extra megatron"),
        pytest.param(
            "model.device=cuda",
            "shows no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it does"),
        ),
    ],
)
def test_what_two_ranks_refuse_is_one_line(
    setting: str,
    words: str,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "hidden/megatron").mkdir(parents=True)
    (tmp_path / "hidden/megatron/__init__.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'hidden'}{os.pathsep}{ROOT}")
    assert main(["replay", str(run_dir), "--set", "learner.ranks=2", "--set", setting]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err
    assert told.err.count("\n") == 1
