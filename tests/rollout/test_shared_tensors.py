"""One copy of the weights in shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.rollout.shared_tensors import SharedTensors
from shared.weights.digests import specs

SHAPES = {"a": (3, 5), "scalar": (), "b": (7,)}


def make_state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_one_side_writes_the_other_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "area"
    mine = SharedTensors(path, SHAPES, dtype, create=True)
    theirs = SharedTensors(path, SHAPES, dtype, create=False)
    state = make_state(0)
    written = mine.write(state, SHAPES)
    cast = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert sorted(written, key=lambda t: t.name) == list(specs(cast))
    for name, tensor in cast.items():
        assert torch.equal(theirs.tensors[name], tensor)


def test_only_the_named_tensors_are_written(tmp_path: Path) -> None:
    area = SharedTensors(tmp_path / "area", SHAPES, torch.float32, create=True)
    old, new = make_state(0), make_state(1)
    area.write(old, SHAPES)
    assert [t.name for t in area.write(new, ["b"])] == ["b"]
    assert torch.equal(area.tensors["a"], old["a"])
    assert torch.equal(area.tensors["b"], new["b"])


def test_a_removed_file_stays_readable_for_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "area"
    mine = SharedTensors(path, SHAPES, torch.float32, create=True)
    theirs = SharedTensors(path, SHAPES, torch.float32, create=False)
    mine.unlink()
    mine.write(make_state(0), SHAPES)
    assert not path.exists()
    assert torch.equal(theirs.tensors["a"], make_state(0)["a"])


def test_a_file_that_exists_or_lacks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "area"
    with pytest.raises(FileNotFoundError):
        SharedTensors(path, SHAPES, torch.float32, create=False)
    SharedTensors(path, SHAPES, torch.float32, create=True)
    with pytest.raises(FileExistsError):
        SharedTensors(path, SHAPES, torch.float32, create=True)
