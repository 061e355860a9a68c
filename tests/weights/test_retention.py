from __future__ import annotations

import pytest

from shared.weights.retention import PublishedLog, oldest_needed
from shared.wire.weights import Artefact, Keyframe


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 9),
        ({"token_versions": [7, 8]}, 7),
        ({"token_versions": [7], "issue_versions": [5, 9]}, 5),
        ({"token_versions": [7], "issue_versions": [8], "checkpoint_versions": [3, 6]}, 3),
        ({"issue_versions": [12]}, 9),
    ],
)
def test_the_low_water_mark_is_the_oldest_reference(arguments, expected: int) -> None:
    assert oldest_needed(9, **arguments) == expected


def _artefact(kind: str, upload_id: str, *, located: bool = False) -> Artefact:
    return Artefact(
        kind=kind,  # type: ignore[arg-type]
        upload_id=upload_id,
        num_chunks=0 if located else 1,
        num_bytes=1,
        digest="",
        location=f"{upload_id}/model.safetensors" if located else "",
    )


def _record(version: int, upload_id: str, *, located: bool = False) -> Keyframe:
    return Keyframe(
        version=version,
        artefact=_artefact("keyframe", upload_id, located=located),
        digest="",
        sha256="",
        published_at=0.0,
        producer="test",
    )


@pytest.fixture
def log(make_manifest) -> PublishedLog:
    """Versions 0..9, manifests at sequences 1, 3, 5, ...; keyframes of 0 (in its manifest), 4 and 8
    (records; that of 8 is a file)."""
    log = PublishedLog()
    for v in range(10):
        delta = _artefact("delta", f"d{v}") if v else None
        keyframe = None if v else _artefact("keyframe", "k0")
        log.note_manifest(2 * v + 1, make_manifest(v, {}, delta=delta, keyframe=keyframe))
    log.note_keyframe(_record(4, "k4"))
    log.note_keyframe(_record(8, "k8", located=True))
    return log


def test_the_newest_keyframe_at_or_below_the_mark_comes_first(log) -> None:
    found = [[place.upload_id for place in log.keepers(n)] for n in (0, 3, 4, 7, 8, 99)]
    assert found == [
        ["k0"],
        ["k0"],
        ["k4", "k0"],
        ["k4", "k0"],
        ["k8", "k4", "k0"],
        ["k8", "k4", "k0"],
    ]
    assert PublishedLog().keepers(3) == []
    assert (log.newest_keyframe, PublishedLog().newest_keyframe) == (8, -1)


def test_needed_are_later_deltas_and_keyframes_from_the_kept_version_on(log) -> None:
    assert log.needed_uploads(4) == {"k4", "d5", "d6", "d7", "d8", "d9"}
    assert log.needed_uploads(8) == {"d9"}


def test_the_newest_delta_stays_so_that_what_is_being_uploaded_behind_it_does(log) -> None:
    log.note_keyframe(_record(9, "k9", located=True))
    assert log.needed_uploads(9) == {"d9"}


def test_dropped_versions_leave_their_files_to_be_deleted(log, make_manifest) -> None:
    assert log.drop_below(4) == []
    assert sorted(log.seqs) == list(range(4, 10))
    assert [place.upload_id for place in log.drop_below(9)] == ["k8"]
    assert log.keyframes == []
    assert log.needed_uploads(9) == {"d9"}


def test_a_keyframe_record_of_a_purged_version_is_ignored(log) -> None:
    log.drop_below(8)
    log.note_keyframe(_record(4, "late"))
    assert [place.upload_id for place in log.keyframes] == ["k8"]


def test_a_second_manifest_of_a_version_changes_nothing(log, make_manifest) -> None:
    log.note_manifest(99, make_manifest(4, {}, delta=_artefact("delta", "other")))
    assert log.seqs[4] == 9
    assert "other" not in log.needed_uploads(0)
