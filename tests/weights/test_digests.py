from __future__ import annotations

import hashlib
import itertools
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights.bits import to_bits
from shared.weights.digests import (
    combined,
    contributions,
    sha256_of,
    spec,
    specs,
    specs_bytes,
    tensor_digest,
    updated,
    version_digest,
)
from shared.weights.kernels import choice

_M = (1 << 64) - 1


def _by_hand(bits: list[int], offset: int = 0) -> int:
    total = 0
    for i, b in enumerate(bits):
        key = ((offset + i + 1) * 0x9E3779B97F4A7C15) & _M
        key ^= key >> 29
        key = ((key + b) * 0xBF58476D1CE4E5B9) & _M
        key ^= key >> 32
        key = (key * 0x94D049BB133111EB) & _M
        total += key ^ (key >> 29)
    return total & _M


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_digest_is_the_sum_written_out_element_by_element(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 7).to(dtype)
    assert tensor_digest(tensor) == _by_hand([int(b) for b in to_bits(tensor)])
    assert tensor_digest(tensor, offset=9) == _by_hand([int(b) for b in to_bits(tensor)], 9)


def test_blocks_do_not_show_in_the_digest() -> None:
    tensor = torch.arange(40_000, dtype=torch.int32)
    assert tensor_digest(tensor) == _by_hand(list(range(40_000)))


def test_any_single_flipped_bit_changes_the_digest() -> None:
    values = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    digests = {tensor_digest(torch.from_numpy(values))}
    for element in range(64):
        for bit in range(32):
            flipped = values.copy()
            flipped.view(np.uint32)[element] ^= np.uint32(1 << bit)
            digests.add(tensor_digest(torch.from_numpy(flipped)))
    assert len(digests) == 1 + 64 * 32


def test_swapping_two_different_elements_changes_the_digest() -> None:
    tensor = torch.randn(100)
    for i, j in ((0, 1), (0, 99), (41, 42)):
        swapped = tensor.clone()
        swapped[i], swapped[j] = tensor[j], tensor[i]
        assert tensor_digest(swapped) != tensor_digest(tensor)


def test_negative_zero_and_nan_payloads_are_bits_like_any_other() -> None:
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))
    quiet = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert tensor_digest(quiet) != tensor_digest(other)
    assert tensor_digest(quiet) == tensor_digest(quiet.clone())


def test_a_view_and_its_contiguous_copy_have_the_same_digest() -> None:
    tensor = torch.randn(6, 4)
    assert tensor_digest(tensor.t()) == tensor_digest(tensor.t().contiguous())
    assert tensor_digest(tensor.t()) != tensor_digest(tensor)


@given(st.integers(0, 60), st.lists(st.integers(0, 60), max_size=4))
def test_shards_add_up_to_the_whole(size: int, cuts: list[int]) -> None:
    tensor = torch.arange(size, dtype=torch.float32).sin()
    edges = sorted({0, size, *(min(c, size) for c in cuts)})
    shards = [tensor_digest(tensor[a:b], offset=a) for a, b in itertools.pairwise(edges)]
    assert combined(shards) == tensor_digest(tensor)


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_updating_from_a_patch_equals_hashing_the_new_tensor(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 2**16, size).astype(np.uint16)
    positions = np.sort(rng.choice(size, rng.integers(0, size + 1), replace=False)).astype("u4")
    new = old.copy()
    new[positions] = rng.integers(0, 2**16, len(positions)).astype(np.uint16)
    before = tensor_digest(torch.from_numpy(old.view(np.int16)))
    after = updated(before, positions, old[positions], new[positions])
    assert after == tensor_digest(torch.from_numpy(new.view(np.int16)))


def test_large_states_have_the_same_digests(make_state, monkeypatch) -> None:
    state = make_state(0) | {"long": torch.randn(1001).to(torch.bfloat16)}
    small, one = specs(state), tensor_digest(state["long"], offset=3)
    monkeypatch.setattr(choice, "COMPILED_BYTES", -1)
    assert specs(state) == small
    assert tensor_digest(state["long"], offset=3) == one


def test_contributions_of_all_elements_are_the_digest() -> None:
    tensor = torch.randn(20_000)
    everything = contributions(np.arange(20_000, dtype=np.uint32), to_bits(tensor))
    assert everything == tensor_digest(tensor)


def test_empty_and_scalar_tensors_have_digests() -> None:
    assert tensor_digest(torch.zeros(0, 5)) == 0
    assert tensor_digest(torch.tensor(1.5)) == tensor_digest(torch.tensor([1.5])) != 0


def test_version_digest_sees_name_dtype_shape_and_bits_but_not_order() -> None:
    a, b = torch.randn(2, 3), torch.randn(3)
    base = version_digest(specs({"a": a, "b": b}))
    assert version_digest(specs({"b": b, "a": a})) == base
    assert version_digest(reversed(specs({"a": a, "b": b}))) == base
    assert version_digest(specs({"a": a, "c": b})) != base
    assert version_digest(specs({"a": a.reshape(3, 2), "b": b})) != base
    assert version_digest(specs({"a": a.view(torch.int32), "b": b})) != base
    assert version_digest(specs({"a": b.expand(2, 3), "b": b})) != base


def test_sha256_is_over_the_documented_canonical_bytes() -> None:
    state = {"b": torch.tensor(-0.0), "a": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)}
    canonical = b"a I16 2,2\n" + struct.pack("<4h", 1, 2, 3, 4) + b"b F32 \n" + b"\0\0\0\x80"
    assert sha256_of(state) == hashlib.sha256(canonical).hexdigest()


def test_unpublishable_dtypes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="complex64"):
        spec("x", torch.zeros(1, dtype=torch.complex64))


def test_specs_know_the_size_of_the_version(make_state) -> None:
    state = make_state(0)
    assert specs_bytes(specs(state)) == sum(t.numel() * t.element_size() for t in state.values())
