"""Tasks from files: splits, seeds, a curriculum, and a cursor that a restart continues from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from services.learner.curriculum import Curriculum, Shuffled
from services.learner.task_files import Row, digest_of, read_rows, split_file
from shared.runtime.errors import ConfigError
from shared.runtime.sections import TaskSection
from shared.wire.messages import TaskRef

OPTIONS = ("path", "train", "eval", "eval_share", "required", "curriculum", "curriculum_options")


class FileTaskSource:
    """Satisfies `TaskSource`; a row travels as the task's payload.

    `task.source_options`: `path` (folder with train.* and eval.*), or `train` and `eval` (a file
    each), or one file and `eval_share` (rows whose content hashes into that share are held out);
    `required` (fields every row must have); `curriculum` (package.module:Class) and
    `curriculum_options`. A row's field `seed`, where it has one, is the task's seed.

    Raises:
        ConfigError: a file or a row that cannot be used, or a task in both splits.
    """

    def __init__(self, section: TaskSection, seed: int) -> None:
        options = section.source_options
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ConfigError(
                f"task.source_options.{unknown[0]}: unknown; there are {', '.join(OPTIONS)}"
            )
        train, held_out = _splits(options)
        self._tasks = {
            name: _tasks(section.dataset, name, rows, seed)
            for name, rows in (("train", train), ("eval", held_out))
        }
        self._digest = hashlib.blake2b(
            "".join(digest_of(row) for row in train).encode(), digest_size=8
        ).hexdigest()
        self._curriculum = _curriculum(options, train, seed)
        self._next = 0

    def next_train(self) -> TaskRef:
        task = self._tasks["train"][self._curriculum.choose(self._next)]
        self._next += 1
        return task

    def evaluation(self, num_tasks: int) -> tuple[TaskRef, ...]:
        """Return the first held-out tasks.

        Raises:
            ConfigError: there are not so many.
        """
        tasks = self._tasks["eval"]
        if num_tasks > len(tasks):
            raise ConfigError(
                f"an evaluation of {num_tasks} tasks is asked for, the held-out split has "
                f"{len(tasks)}: lower learner.eval.episodes, or add tasks"
            )
        return tasks[:num_tasks]

    def outcome(self, task: TaskRef, reward: float) -> None:
        """Tell the curriculum how an episode of a training task ended."""
        self._curriculum.outcome(task.index, reward)

    def cursor(self) -> dict[str, Any]:
        return {"next": self._next, "tasks": self._digest, "curriculum": self._curriculum.state()}

    def restore(self, cursor: dict[str, Any]) -> None:
        """Continue where a cursor stands.

        Raises:
            ConfigError: it was written over other tasks.
        """
        if cursor.get("tasks") != self._digest:
            raise ConfigError(
                "task.source_options: the training tasks are not those that this run began with; "
                "restore the files, or start a fresh run"
            )
        self._next = int(cursor["next"])
        self._curriculum.restore(cursor["curriculum"])


def _splits(options: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    required = tuple(str(field) for field in options.get("required", ()))
    share = float(options.get("eval_share", 0.0))
    if not 0 <= share < 1:
        raise ConfigError(f"task.source_options.eval_share: {share:g} is not in [0, 1)")
    paths = {split: _path(options, split) for split in ("train", "eval")}
    if paths["train"] is None:
        raise ConfigError(
            "task.source_options: names no training tasks; set `path` to a folder with "
            "train.jsonl and eval.jsonl, or `train` and `eval` to files"
        )
    train = read_rows(paths["train"], required)
    if paths["eval"] is not None:
        held_out = read_rows(paths["eval"], required)
    else:
        held_out = [row for row in train if int(digest_of(row), 16) < share * 2**128]
        train = [row for row in train if int(digest_of(row), 16) >= share * 2**128]
        if not train:
            raise ConfigError(f"{paths['train']}: eval_share {share:g} leaves no training task")
    both = {digest_of(row) for row in train} & {digest_of(row) for row in held_out}
    if both:
        raise ConfigError(
            f"{paths['eval']}: {len(both)} of its tasks are training tasks too (equal content); "
            "an evaluation on them would measure memory"
        )
    return train, held_out


def _path(options: Mapping[str, Any], split: str) -> Path | None:
    if split in options:
        path = Path(str(options[split]))
        if not path.exists():
            raise ConfigError(f"task.source_options.{split}: {path} does not exist")
        return path
    if "path" not in options:
        return None
    folder = Path(str(options["path"]))
    if not folder.exists():
        raise ConfigError(f"task.source_options.path: {folder} does not exist")
    return split_file(folder, split) if folder.is_dir() else (folder if split == "train" else None)


def _tasks(dataset: str, split: str, rows: Sequence[Row], seed: int) -> tuple[TaskRef, ...]:
    return tuple(
        TaskRef(
            dataset=dataset,
            split=split,
            index=index,
            seed=row["seed"] if isinstance(row.get("seed"), int) else _seed(seed, row),
            payload=row,
        )
        for index, row in enumerate(rows)
    )


def _seed(run_seed: int, row: Row) -> int:
    """Of the content: the same task has the same seed wherever it stands in the file."""
    mixed = hashlib.blake2b(f"{run_seed}/{digest_of(row)}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "big") >> 2


def _curriculum(options: Mapping[str, Any], rows: Sequence[Row], seed: int) -> Curriculum:
    path = str(options.get("curriculum", ""))
    details = dict(options.get("curriculum_options", {}))
    if not path:
        return Shuffled(rows, seed, details)
    module_name, _, class_name = path.partition(":")
    try:
        made: Callable[..., Any] = getattr(import_module(module_name), class_name)
        return cast(Curriculum, made(rows, seed, details))
    except Exception as error:
        raise ConfigError(
            f"task.source_options.curriculum: {path}: {type(error).__name__}: {error}"
        ) from error
