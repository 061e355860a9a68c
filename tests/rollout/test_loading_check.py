"""The comparison after each swap, on modules that pack like vLLM's do on CPUs; and its controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services.rollout.loading_check import LoadingCheck, WrongCopy, same_bits
from shared.weights.layout_parts import Source, fuse, replicate, shard_rows, share_of
from shared.weights.layouts import Layout

Q, K, NORM = Source("q", (6, 4)), Source("k", (2, 4)), Source("norm", (4,))
ALL = share_of(0, 1)
LAYOUT = Layout(
    {
        "qk.weight": fuse(shard_rows(Q, ALL), shard_rows(K, ALL)),
        "norm.weight": replicate(NORM, 0),
    }
)


class Packing:
    """Computes with a copy that is made when weights have been loaded."""

    def __init__(self, *, stale: bool = False, empties: bool = True) -> None:
        self.stale = stale
        self.empties = empties
        self.packed: torch.Tensor | None = None

    def process_weights_after_loading(self, module: Any) -> None:
        if self.packed is None or not self.stale:
            self.packed = module.weight.detach().clone()
        if self.empties:
            module.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(self, module: Any, rows: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None
        return rows @ self.packed.T


class Linear(torch.nn.Module):
    def __init__(self, method: Packing, dtype: torch.dtype) -> None:
        super().__init__()
        self.quant_method = method
        self.weight = torch.nn.Parameter(torch.zeros(8, 4, dtype=dtype), requires_grad=False)


class Model(torch.nn.Module):
    def __init__(self, method: Packing, dtype: torch.dtype) -> None:
        super().__init__()
        self.qk = Linear(method, dtype)
        self.norm = torch.nn.Module()
        self.norm.weight = torch.nn.Parameter(torch.zeros(4, dtype=dtype), requires_grad=False)

    def load(self, source: dict[str, torch.Tensor], *, swapped: bool = False) -> None:
        parts = [source["k"], source["q"]] if swapped else [source["q"], source["k"]]
        self.qk.weight = torch.nn.Parameter(torch.cat(parts), requires_grad=False)
        self.norm.weight.data.copy_(source["norm"])
        self.qk.quant_method.process_weights_after_loading(self.qk)  # type: ignore[operator]


def make_source(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        source.name: torch.randn(source.shape, generator=generator).to(dtype)
        for source in (Q, K, NORM)
    }


def load(model: Model, check: LoadingCheck, source: dict[str, torch.Tensor], **how: Any) -> None:
    with check.watching(source):
        model.load(source, **how)
    check.compare({"qk", "norm"}, source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("empties", [True, False])
def test_what_was_loaded_and_packed_rightly_passes(dtype: torch.dtype, empties: bool) -> None:
    model = Model(Packing(empties=empties), dtype)
    check = LoadingCheck(model, LAYOUT)
    for seed in range(3):
        load(model, check, make_source(seed, dtype))


def test_a_packed_copy_of_older_weights_is_seen() -> None:
    model = Model(Packing(stale=True), torch.bfloat16)
    check = LoadingCheck(model, LAYOUT)
    load(model, check, make_source(0, torch.bfloat16))
    # One unit in the last place of one column in four, as a small learning rate makes it.
    close = make_source(0, torch.bfloat16)
    close["q"].view(torch.int16)[2, 1] += 1
    with pytest.raises(WrongCopy, match=r"packed copy of 'qk.weight'"):
        load(model, check, close)


def test_parts_fused_in_the_wrong_order_are_seen() -> None:
    model = Model(Packing(), torch.float32)
    check = LoadingCheck(model, LAYOUT)
    with pytest.raises(WrongCopy, match=r"'qk.weight' does not hold q\[0:6, 0:4\]"):
        load(model, check, make_source(0), swapped=True)


def test_a_tensor_that_is_not_packed_is_compared_as_it_is() -> None:
    model = Model(Packing(), torch.float32)
    check = LoadingCheck(model, LAYOUT)
    source = make_source(0)
    with check.watching(source):
        model.load(source)
    model.norm.weight.data[2] += 1
    with pytest.raises(WrongCopy, match=r"'norm.weight' does not hold norm"):
        check.compare({"qk", "norm"}, source)


def test_rows_that_are_not_finite_say_nothing_and_hide_nothing() -> None:
    model = Model(Packing(stale=True), torch.float32)
    check = LoadingCheck(model, LAYOUT)
    source = make_source(0)
    source["q"][1, 2] = float("nan")
    load(model, check, source)
    other = make_source(1)
    other["q"][1, 2] = float("nan")
    with pytest.raises(WrongCopy):
        load(model, check, other)


def test_outside_an_update_nothing_is_watched() -> None:
    model = Model(Packing(), torch.float32)
    LoadingCheck(model, LAYOUT)
    model.load(make_source(0), swapped=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("box", [(slice(None), slice(None)), (slice(1, 5), slice(1, 6))])
def test_bits_are_compared_in_every_alignment(dtype: torch.dtype, box: tuple[slice, slice]) -> None:
    left = torch.randn(6, 8).to(dtype)
    left[2, 3] = float("nan")
    right = left.clone()
    assert same_bits(left[box], right[box])
    width = torch.int16 if dtype == torch.bfloat16 else torch.int32
    for row in range(1, 5):
        for column in range(1, 6):
            changed = right.clone()
            changed.view(width)[row, column] ^= 1
            assert not same_bits(left[box], changed[box])
    zeros = torch.zeros(2, 8, dtype=dtype)
    assert not same_bits(zeros, -zeros)


def test_weights_packed_in_place_are_compared_with_a_packing_of_the_source() -> None:
    def pack(loaded: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(loaded, (0, 1)).flip(0)

    model = torch.nn.Module()
    model.qk = torch.nn.Module()
    source = make_source(0)
    plain = torch.cat([source["q"], source["k"]])
    model.qk.weight = torch.nn.Parameter(pack(plain), requires_grad=False)
    check = LoadingCheck(model, LAYOUT, lambda _, name: pack if name == "weight" else None)
    check.compare({"qk"}, source)
    changed = source | {"k": source["k"].clone()}
    changed["k"].view(torch.int32)[1, 3] ^= 1
    with pytest.raises(WrongCopy, match=r"packed 'qk.weight' is not of what was published"):
        check.compare({"qk"}, changed)
    model.qk.weight = torch.nn.Parameter(plain, requires_grad=False)
    with pytest.raises(WrongCopy, match=r"packed 'qk.weight'"):
        check.compare({"qk"}, source)
