from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights import deltas, keyframes
from shared.weights.bits import from_bits, same_bits
from shared.weights.digests import specs, version_digest
from shared.weights.errors import Corrupt, WrongBase
from shared.weights.patches import apply_patch, diff

_WIDTH = {"F32": 4, "F64": 8, "BF16": 2, "F16": 2}


def _same(a, b) -> bool:
    return set(a) == set(b) and all(same_bits(a[n], b[n]) for n in a)


@st.composite
def chains(draw):
    """A few versions of random bits (NaN payloads and negative zeros included)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layout = draw(
        st.lists(
            st.tuples(
                st.sampled_from(sorted(_WIDTH)),
                st.sampled_from([(), (0,), (1,), (3, 5), (0, 2), (64,), (2, 3, 4)]),
            ),
            min_size=1,
            max_size=4,
        )
    )
    versions = []
    bits = [
        rng.integers(0, 256, _WIDTH[code] * int(np.prod(shape, dtype=int)), dtype=np.uint8)
        for code, shape in layout
    ]
    for _ in range(draw(st.integers(2, 6))):
        versions.append(
            {
                f"t{i}": from_bits(b.copy().view(f"<u{_WIDTH[code]}"), code, shape)
                for i, (b, (code, shape)) in enumerate(zip(bits, layout, strict=True))
            }
        )
        share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
        bits = [
            np.where(rng.random(len(b)) < share, rng.integers(0, 256, len(b), dtype=np.uint8), b)
            for b in bits
        ]
    return versions


@settings(max_examples=60, deadline=None)
@given(chains())
def test_chains_are_bit_exact_forward_and_backward(versions) -> None:
    state = versions[0]
    undos = []
    for old, new in itertools.pairwise(versions):
        applied = deltas.apply(state, deltas.encode(old, new))
        assert _same(applied.state, new)
        assert applied.tensors == specs(new)
        assert applied.changed == {n for n in new if not same_bits(old[n], new[n])}
        undos.append(applied.undo)
        state = applied.state
    for old, undo in zip(reversed(versions[:-1]), reversed(undos), strict=True):
        back = apply_patch(state, deltas.from_bytes(deltas.to_bytes(undo)))
        assert _same(back.state, old)
        redo = apply_patch(back.state, back.undo)
        assert _same(redo.state, state)
        state = back.state


def test_few_changes_are_sparse_and_many_are_dense() -> None:
    old = {"w": torch.zeros(1000, dtype=torch.bfloat16)}
    few = {"w": old["w"].clone()}
    few["w"][[3, 500]] = 1.0
    many = {"w": torch.ones(1000, dtype=torch.bfloat16)}
    (sparse,) = diff(old, few).tensors
    (dense,) = diff(old, many).tensors
    assert sparse.positions.tolist() == [3, 500]
    assert dense.positions is None
    assert len(deltas.encode(old, few)) < 200
    assert len(deltas.encode(old, old)) < 100
    assert 2000 < len(deltas.encode(old, many)) < 2200


def test_applying_leaves_the_base_untouched_and_shares_what_did_not_change(
    make_state, mutate
) -> None:
    old = make_state(0)
    kept = {name: t.clone() for name, t in old.items()}
    new = mutate(old, 1)
    applied = deltas.apply(old, deltas.encode(old, new))
    assert _same(old, kept)
    assert applied.state["steps"] is old["steps"]
    for name in applied.changed:
        applied.state[name].view(-1)[:] = 0
    assert _same(old, kept)


def test_tied_tensors_stay_equal_under_both_names() -> None:
    shared = torch.randn(4, 4)
    old = {"embed": shared, "head": shared}
    moved = shared + 1
    new = {"embed": moved, "head": moved}
    assert _same(deltas.apply(old, deltas.encode(old, new)).state, new)
    assert _same(keyframes.decode(keyframes.encode(new)), new)


def test_keyframes_are_bit_exact_for_every_kind_of_tensor(make_state) -> None:
    state = make_state(3)
    state["nan"] = torch.tensor([0x7FC00001, -(2**31)], dtype=torch.int32).view(torch.float32)
    assert _same(keyframes.decode(keyframes.encode(state)), state)
    assert keyframes.encode(state) == keyframes.encode(dict(reversed(state.items())))


def test_a_delta_for_another_base_is_refused_naming_both_digests(make_state, mutate) -> None:
    old, other = make_state(0), make_state(1)
    delta = deltas.encode(old, mutate(old, 1))
    with pytest.raises(WrongBase) as caught:
        deltas.apply(other, delta)
    assert version_digest(specs(old)) in str(caught.value)
    assert version_digest(specs(other)) in str(caught.value)


def test_a_base_whose_memory_is_not_what_its_specs_say_yields_another_digest(
    make_state, mutate
) -> None:
    old = make_state(0)
    new = mutate(old, 1, share=0.05)
    known = specs(old)
    delta = deltas.encode(old, new)
    applied = deltas.apply(old, delta, tensors=known)
    assert applied.digest == version_digest(specs(new))
    piece = next(p for p in deltas.from_bytes(delta).tensors if p.name == "wte.weight")
    old["wte.weight"].view(-1)[int(piece.positions[0])] += 1.0
    assert deltas.apply(old, delta, tensors=known).digest != version_digest(specs(new))


@pytest.mark.parametrize("kind", ["shape", "dtype", "name"])
def test_states_of_another_model_are_refused_naming_the_tensor(make_state, kind: str) -> None:
    old, new = make_state(0), make_state(0)
    if kind == "shape":
        new["wide"] = torch.zeros(8, dtype=torch.float64)
    elif kind == "dtype":
        new["wide"] = torch.zeros(9)
    else:
        new["wide.bias"] = new.pop("wide")
    with pytest.raises(WrongBase, match="wide"):
        deltas.encode(old, new)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_deltas_are_refused_or_change_the_digest(data) -> None:
    old = {"a": torch.arange(50.0), "b": torch.zeros(3, dtype=torch.bfloat16)}
    new = {"a": old["a"].clone(), "b": torch.ones(3, dtype=torch.bfloat16)}
    new["a"][7] = -1.0
    delta = bytearray(deltas.encode(old, new))
    damage = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    where = data.draw(st.integers(0, len(delta) - 1))
    if damage == "flip":
        delta[where] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "cut":
        del delta[where:]
    else:
        delta += b"\0" * (where + 1)
    try:
        applied = deltas.apply(old, bytes(delta))
    except (Corrupt, WrongBase):
        return
    # Padding is the only place where a flipped bit changes nothing.
    assert applied.digest != version_digest(specs(new)) or _same(applied.state, new)


def test_positions_out_of_range_or_repeated_are_refused(make_state) -> None:
    old = {"a": torch.zeros(100)}
    new = {"a": old["a"].clone()}
    new["a"][[5, 6]] = 1.0
    patch = diff(old, new)
    (piece,) = patch.tensors
    for positions in ([5, 100], [5, 5], [6, 5]):
        bad = type(piece)(
            piece.name, piece.dtype, piece.shape, np.array(positions, "u4"), piece.values
        )
        with pytest.raises(Corrupt, match="'a'"):
            apply_patch(old, type(patch)(patch.base, (bad,)))


def test_bytes_that_are_no_safetensors_file_are_refused() -> None:
    for data in (b"", b"junk" * 10, keyframes.encode({"a": torch.zeros(3)})[:-4]):
        with pytest.raises(Corrupt, match="safetensors"):
            keyframes.decode(data)
