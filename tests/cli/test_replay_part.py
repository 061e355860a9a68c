"""Which processes replay which versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.learner.config import LearnerConfig
from services.learner.replaying import Stretch
from shared.cli.replay_part import Part, parts_of
from shared.runtime.config import load
from shared.runtime.errors import ConfigError


def stretch(stop: int, ranks: int = 1, route: str = "oracle", **model: object) -> Stretch:
    tree = {
        "learner": {"ranks": ranks},
        "model": model,
        "old_logprobs": {"route": route},
    }
    return Stretch(load(LearnerConfig, tree), stop)


def parts(*stretches: Stretch, start: int = 0) -> list[Part]:
    digests = {version: f"d{version}" for version in range(start, stretches[-1].stop + 1)}
    return parts_of(Path("run"), Path("folder"), stretches, digests)


def spans(found: list[Part]) -> list[tuple[int, int, int, bool]]:
    """(ranks, first version, last version, whether another part goes on)."""
    return [(part.ranks, min(part.digests), max(part.digests), part.more) for part in found]


def test_one_process_makes_all_that_one_process_made():
    assert spans(parts(stretch(2), stretch(5, source="elsewhere"))) == [(1, 0, 5, False)]


def test_every_change_of_ranks_or_of_their_model_takes_other_processes():
    found = parts(
        stretch(1, 2), stretch(2, 2), stretch(4), stretch(5, 2), stretch(9, 2, dtype="bfloat16")
    )
    assert spans(found) == [(2, 0, 2, True), (1, 2, 4, True), (2, 4, 5, True), (2, 5, 9, False)]
    assert [len(part.stretches) for part in found] == [2, 1, 1, 1]


def test_nobody_is_started_for_the_version_to_begin_with():
    assert spans(parts(stretch(3, 2), stretch(6), start=3)) == [(1, 3, 6, False)]
    assert spans(parts(stretch(3, 2), start=3)) == [(2, 3, 3, False)]


def test_scores_of_earlier_versions_cannot_be_made_by_other_processes():
    with pytest.raises(ConfigError, match="--versions 2 replays those"):
        parts(stretch(2, 2, "snapshot_old"), stretch(5, 1, "snapshot_old"))
    assert len(parts(stretch(2, 2, "snapshot_old"), stretch(5, 2, "snapshot_old"))) == 1
    assert len(parts(stretch(2, 2, "snapshot_old"), stretch(5, 1))) == 2


def test_what_is_written_for_the_ranks_is_what_they_read(tmp_path: Path):
    [part] = parts(stretch(2, 2), stretch(4, 2), start=1)
    part.write(tmp_path / "part.json")
    assert Part.read(tmp_path / "part.json") == Part(
        part.run_dir.resolve(), part.folder, 1, part.stretches, part.digests, more=False
    )
