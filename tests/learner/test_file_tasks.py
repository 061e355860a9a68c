"""Tasks from files: splits, order, cursor, curriculum, and every file that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from services.learner.curriculum import Graded, Shuffled
from services.learner.file_tasks import FileTaskSource
from services.learner.task_source import WatchesOutcomes
from shared.runtime.errors import ConfigError
from shared.runtime.sections import TaskSection
from shared.wire.codec import decode, encode
from shared.wire.journal import Issued, JournalEntry


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"question": f"{i} + 1?", "answer": str(i + 1), "level": i % 3}
        for i in range(start, start + count)
    ]


def write(path: Path, content: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def source(seed: int = 0, **options: Any) -> FileTaskSource:
    return FileTaskSource(TaskSection(dataset="sums", source_options=options), seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", rows(10))
    write(tmp_path / "eval.jsonl", rows(4, start=100))
    return tmp_path


def test_every_epoch_deals_every_task_once_in_an_order_of_its_own(folder: Path) -> None:
    dealt = source(path=str(folder))
    epochs = [[dealt.next_train().index for _ in range(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = source(path=str(folder))
    assert [again.next_train().index for _ in range(10)] == epochs[0]
    other = source(seed=1, path=str(folder))
    assert [other.next_train().index for _ in range(10)] != epochs[0]


def test_a_task_carries_its_row_and_a_seed_of_its_content(folder: Path) -> None:
    dealt = source(path=str(folder))
    tasks = {task.index: task for task in (dealt.next_train() for _ in range(10))}
    assert tasks[3].payload == rows(10)[3]
    assert (tasks[3].dataset, tasks[3].split) == ("sums", "train")
    assert len({task.seed for task in tasks.values()}) == 10
    write(folder / "train.jsonl", list(reversed(rows(10))))
    moved = source(path=str(folder))
    seeds = {task.payload["answer"]: task.seed for task in (moved.next_train() for _ in range(10))}
    assert seeds == {task.payload["answer"]: task.seed for task in tasks.values()}
    write(folder / "train.jsonl", [{"seed": 17}])
    assert source(path=str(folder)).next_train().seed == 17


def test_a_restored_cursor_deals_what_would_have_been_dealt(folder: Path) -> None:
    options: dict[str, Any] = {
        "path": str(folder),
        "curriculum": "services.learner.curriculum:Graded",
        "curriculum_options": {"window": 2},
    }
    first = source(**options)
    assert isinstance(first, WatchesOutcomes)
    for _ in range(7):
        first.outcome(first.next_train(), 1.0)
    entry = JournalEntry(
        entry_id="e", written_at=0.0, body=Issued(version=0, tickets=(), cursor=first.cursor())
    )
    stored = decode(encode(entry), JournalEntry).body
    assert isinstance(stored, Issued)
    second = source(**options)
    second.restore(stored.cursor)
    assert [first.next_train() for _ in range(9)] == [second.next_train() for _ in range(9)]


def test_a_cursor_over_other_tasks_is_refused(folder: Path) -> None:
    cursor = source(path=str(folder)).cursor()
    write(folder / "train.jsonl", rows(11))
    with pytest.raises(ConfigError, match="not those that this run began with"):
        source(path=str(folder)).restore(cursor)


def test_evaluation_is_always_the_same_tasks_and_never_more_than_there_are(folder: Path) -> None:
    dealt = source(path=str(folder))
    assert [task.payload["answer"] for task in dealt.evaluation(3)] == ["101", "102", "103"]
    assert dealt.evaluation(3) == source(seed=0, path=str(folder)).evaluation(3)
    with pytest.raises(ConfigError, match="5 tasks is asked for, the held-out split has 4"):
        dealt.evaluation(5)


def test_one_file_is_split_by_content_whatever_its_order(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", rows(400))
    dealt = source(train=str(path), eval_share=0.25)
    held_out = {task.payload["answer"] for task in dealt.evaluation(60)}
    trained = {dealt.next_train().payload["answer"] for _ in range(300)}
    assert not held_out & trained
    write(path, list(reversed(rows(400))))
    assert {
        t.payload["answer"] for t in source(train=str(path), eval_share=0.25).evaluation(60)
    } <= ({str(i + 1) for i in range(400)} - trained)


def test_levels_open_when_the_last_one_is_mastered() -> None:
    graded = Graded(rows(9), 0, {"window": 4, "threshold": 0.5})
    assert {graded.choose(i) % 3 for i in range(50)} == {0}
    for reward in (1, 0, 1, 0):
        graded.outcome(0, reward)
    assert {graded.choose(i) % 3 for i in range(80)} == {0, 1}
    for reward in (1, 0, 0, 0):
        graded.outcome(1, reward)
        graded.outcome(0, 1.0)  # an easier level opens nothing
    assert {graded.choose(i) % 3 for i in range(80)} == {0, 1}
    with pytest.raises(ValueError, match="task 0 has no number in its field 'rank'"):
        Graded(rows(2), 0, {"field": "rank"})


def test_tasks_may_be_dealt_in_file_order() -> None:
    in_order = Shuffled(rows(3), 0, {"in_order": True})
    assert [in_order.choose(i) for i in range(5)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1}\n{"a": \n', "train.jsonl: line 2 is not JSON"),
        ('[1]\n', "train.jsonl: line 1 is not a JSON object"),
        ("\n\n", "train.jsonl: has no tasks"),
        ('{"question": "x"}\n{"answer": "y"}\n', "row 2 has no field 'question' (it has answer)"),
        ('{"question": null}\n', "row 1 has no field 'question'"),
        ('{"question": NaN}\n', "a task is not JSON-like"),
    ],
)  # fmt: skip
def test_a_flawed_row_is_named_at_start(folder: Path, content: str, reason: str) -> None:
    (folder / "train.jsonl").write_text(content)
    with pytest.raises(ConfigError) as refused:
        source(path=str(folder), required=["question"])
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_a_source_is_named(folder: Path) -> None:
    for options, reason in (
        ({"paths": "x"}, "source_options.paths: unknown"),
        ({}, "names no training tasks"),
        ({"path": "/nowhere"}, "/nowhere does not exist"),
        ({"train": "/nowhere.jsonl"}, "source_options.train: /nowhere.jsonl does not exist"),
        ({"train": str(folder / "train.jsonl"), "eval_share": 1.0}, "eval_share: 1 is not in"),
        (
            {"train": str(folder / "train.jsonl"), "eval": str(folder / "train.jsonl")},
            "10 of its tasks are training tasks too",
        ),
        ({"path": str(folder), "curriculum": "nowhere:X"}, "curriculum: nowhere:X"),
    ):
        with pytest.raises(ConfigError) as refused:
            source(**options)
        assert reason in str(refused.value)


def test_without_pyarrow_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "eval.jsonl").unlink()
    (folder / "eval.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"lagwise\[datasets\]"):
        source(path=str(folder))
