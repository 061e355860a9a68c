"""Rows of task files: JSON lines, parquet, arrow, and what `datasets.save_to_disk` leaves.

JSON lines need nothing; the others need the extra `datasets`. Rows are read whole at start, so
that a flaw is found before the first version and not in the middle of a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from shared.runtime.errors import ConfigError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".parquet", ".arrow")


def split_file(folder: Path, split: str) -> Path | None:
    """Return the file or saved dataset of a split in a folder, None where there is none."""
    candidates = [folder / f"{split}{suffix}" for suffix in SUFFIXES] + [folder / split]
    return next((path for path in candidates if path.exists()), None)


def read_rows(path: Path, required: Sequence[str] = ()) -> list[Row]:
    """Read all rows of a file or of a saved dataset's folder.

    Args:
        path: .jsonl, .parquet, .arrow, or a folder with state.json.
        required: fields that every row must have, and not as null.

    Raises:
        ConfigError: the file cannot be read, or a row is none; names file and row.
    """
    if path.is_dir():
        rows = [row for file in _saved_files(path) for row in _arrow_rows(file)]
    elif path.suffix == ".jsonl":
        rows = list(_json_rows(path))
    elif path.suffix in SUFFIXES:
        rows = _arrow_rows(path)
    else:
        raise ConfigError(
            f"{path}: no task file; {', '.join(SUFFIXES)} or a saved dataset's folder"
        )
    if not rows:
        raise ConfigError(f"{path}: has no tasks")
    for number, row in enumerate(rows, start=1):
        for field in required:
            if row.get(field) is None:
                raise ConfigError(
                    f"{path}: row {number} has no field {field!r} "
                    f"(it has {', '.join(sorted(row)) or 'none'})"
                )
    return rows


def digest_of(row: Row) -> str:
    """Digest of a row's content: equal rows have equal digests, whatever the order of fields."""
    try:
        written = json.dumps(row, sort_keys=True, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a task is not JSON-like: {error}: {str(row)[:120]}") from error
    return hashlib.blake2b(written.encode(), digest_size=16).hexdigest()


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: line {number} is not a JSON object")
        yield cast(Row, row)


def _saved_files(folder: Path) -> list[Path]:
    state = folder / "state.json"
    if not state.is_file():
        raise ConfigError(
            f"{folder}: is no saved dataset (no state.json); name a split's folder, or a file"
        )
    try:
        files = [
            folder / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{state}: not the state of a saved dataset: {error!r}") from error
    return files


def _arrow_rows(path: Path) -> list[Row]:
    try:
        import pyarrow as arrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading it needs pyarrow; pip install 'lagwise[datasets]', or export the "
            "tasks as .jsonl"
        ) from error
    try:
        if path.suffix == ".parquet":
            table: Any = parquet.read_table(path)
        else:
            with arrow.memory_map(str(path)) as source:
                table = arrow.ipc.open_stream(source).read_all()
        return cast("list[Row]", table.to_pylist())
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ConfigError(f"{path}: cannot be read: {error}") from error
