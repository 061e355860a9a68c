"""What the real `datasets` package writes is read back, row for row (make test-agents)."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from services.learner.task_files import read_rows, split_file
from shared.runtime.errors import ConfigError

ROWS = [
    {"question": f"{i}?", "answer": i, "tags": ["a", "b"], "meta": {"x": None}} for i in range(7)
]


def test_saved_datasets_and_their_splits_are_read(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict({"train": whole, "eval": whole.select(range(2))})
    both.save_to_disk(str(tmp_path / "saved"))
    train = split_file(tmp_path / "saved", "train")
    held_out = split_file(tmp_path / "saved", "eval")
    assert train is not None
    assert held_out is not None
    assert read_rows(train, ["question"]) == ROWS
    assert read_rows(held_out) == ROWS[:2]
    with pytest.raises(ConfigError, match="is no saved dataset"):
        read_rows(tmp_path / "saved")
    with pytest.raises(ConfigError, match="row 1 has no field 'level'"):
        read_rows(train, ["level"])


def test_several_shards_and_parquet_are_read(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "sharded"), num_shards=3)
    assert read_rows(tmp_path / "sharded") == ROWS
    whole.to_parquet(str(tmp_path / "train.parquet"))
    assert read_rows(tmp_path / "train.parquet") == ROWS
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"broken\.parquet: cannot be read"):
        read_rows(tmp_path / "broken.parquet")
