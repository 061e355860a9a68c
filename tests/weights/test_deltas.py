from __future__ import annotations

import hashlib
import itertools
import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.weights import blocks, deltas, keyframes
from shared.weights.bits import dtype_of, from_bits, same_bits
from shared.weights.blocks import BLOCK, PREFIX, TRAILER
from shared.weights.deltas import BytesSource, DeltaReader, DeltaWriter
from shared.weights.digests import specs, version_digest
from shared.weights.errors import Corrupt, WrongBase
from shared.weights.kernels import choice

_CODES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "F8_E4M3", "F8_E5M2"]


def _same(a, b) -> bool:
    return set(a) == set(b) and all(same_bits(a[n], b[n]) for n in a)


def _clone(state):
    return {name: t.clone() for name, t in state.items()}


def _apply(state, delta: bytes, **options):
    options.setdefault("tensors", specs(state))
    return deltas.apply(state, DeltaReader(BytesSource(delta)), **options)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of 16 elements, so that small tensors have many."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16)
    return 16


@st.composite
def chains(draw):
    """A few versions of random bits (NaN payloads and negative zeros included)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layout = draw(
        st.lists(
            st.tuples(
                st.sampled_from(_CODES),
                st.sampled_from([(), (0,), (1,), (3, 5), (0, 2), (64,), (2, 3, 4), (600,)]),
            ),
            min_size=1,
            max_size=4,
        )
    )
    widths = [dtype_of(code).itemsize for code, _ in layout]
    versions = []
    bits = [
        rng.integers(0, 256, width * int(np.prod(shape, dtype=int)), dtype=np.uint8)
        for width, (_, shape) in zip(widths, layout, strict=True)
    ]
    for _ in range(draw(st.integers(2, 6))):
        versions.append(
            {
                f"t{i}": from_bits(b.copy().view(f"<u{width}"), code, shape)
                for i, (b, width, (code, shape)) in enumerate(
                    zip(bits, widths, layout, strict=True)
                )
            }
        )
        share = draw(st.sampled_from([0.0, 0.002, 0.02, 0.5, 1.0]))
        bits = [
            np.where(rng.random(len(b)) < share, rng.integers(0, 256, len(b), dtype=np.uint8), b)
            for b in bits
        ]
    return versions


@settings(max_examples=100, deadline=None)
@given(chains(), st.sampled_from([7, 16, 1 << 20]), st.sampled_from([32 << 20, -1]))
def test_chains_are_bit_exact_forward_and_backward(
    versions, block_elements: int, compiled_above: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
        patch.setattr(choice, "COMPILED_BYTES", compiled_above)
        state, described, trail = _clone(versions[0]), specs(versions[0]), []
        for old, new in itertools.pairwise(versions):
            trail.append(deltas.encode(old, new))
            applied = _apply(state, trail[-1], tensors=described)
            described = applied.tensors
            assert _same(state, new)
            assert described == specs(new)
            assert applied.digest == version_digest(specs(new))
            assert applied.changed == {n for n in new if not same_bits(old[n], new[n])}
        for old, delta in zip(reversed(versions[:-1]), reversed(trail), strict=True):
            described = _apply(state, delta, tensors=described, reverse=True).tensors
            assert _same(state, old)
            assert described == specs(old)


def test_the_undo_of_a_delta_is_the_same_bytes_and_so_is_the_redo(make_state, mutate) -> None:
    old = make_state(0)
    new = mutate(old, 1)
    delta, state = deltas.encode(old, new), _clone(old)
    for _ in range(3):
        _apply(state, delta)
        assert _same(state, new)
        _apply(state, delta, reverse=True)
        assert _same(state, old)


def test_few_changes_are_sparse_and_many_are_dense() -> None:
    old = {"w": torch.zeros(10_000, dtype=torch.bfloat16)}

    def forms(share: float) -> list[str]:
        new = _clone(old)
        new["w"][: int(share * 10_000)] = 1.0
        return [b.form for b in DeltaReader(BytesSource(deltas.encode(old, new))).blocks()]

    assert forms(0.0) == []
    assert forms(0.001) == ["sparse16"]
    assert forms(0.01) == ["sparse8"]
    assert forms(0.2) == ["sparse8"]
    assert forms(0.9) == ["dense"]


def test_steps_of_one_unit_cost_little_more_than_a_byte() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 15, 1 << 20, dtype=np.uint16)
    moved = bits + np.where(rng.random(1 << 20) < 0.0092, rng.choice([1, -1], 1 << 20), 0).astype(
        np.uint16
    )
    old, new = ({"w": from_bits(b, "BF16", (1 << 20,))} for b in (bits, moved))
    assert len(deltas.encode(old, new)) < 0.0065 * bits.nbytes


@pytest.mark.parametrize("code", ["F32", "BF16"])
def test_a_change_of_everything_costs_no_more_than_the_values(code: str) -> None:
    width = dtype_of(code).itemsize
    rng = np.random.default_rng(0)
    old, new = (
        {"w": from_bits(rng.integers(0, 256, width * 9999, np.uint8).view(f"<u{width}"), code, s)}
        for s in [(9999,)] * 2
    )
    assert len(deltas.encode(old, new)) < width * 9999 + 300


@pytest.mark.parametrize("share", [0.003, 0.1, 1.0])
def test_any_number_of_threads_gives_the_same_bytes_and_the_same_state(
    small_blocks: int, share: float
) -> None:
    g = torch.Generator().manual_seed(0)
    old = {f"t{i}": torch.randn(500 + i, generator=g) for i in range(4)}
    new = {
        n: torch.where(torch.rand(t.shape, generator=g) < share, t + 1, t) for n, t in old.items()
    }
    encoded = [deltas.encode(old, new, threads=threads) for threads in (1, 2, 5)]
    assert len(set(encoded)) == 1
    for threads in (1, 2, 5):
        state = _clone(old)
        assert _apply(state, encoded[0], threads=threads).tensors == specs(new)
        assert _same(state, new)


def test_a_writer_counts_what_changed_and_describes_the_new_state(make_state, mutate) -> None:
    old = make_state(0)
    new = mutate(old, 1)
    writer = DeltaWriter(old, new, tensors=specs(old))
    delta = b"".join(writer.pieces())
    assert writer.tensors == specs(new)
    assert writer.elements == sum(t.numel() for t in old.values())
    assert writer.changed == sum(int((old[n] != new[n]).sum()) for n in old) > 0
    assert DeltaReader(BytesSource(delta)).num_changed == writer.changed


def test_a_writer_holds_no_more_than_a_few_blocks(small_blocks: int) -> None:
    old, new = {"w": torch.zeros(1600)}, {"w": torch.ones(1600)}
    pieces = list(DeltaWriter(old, new, tensors=specs(old)).pieces())
    assert len(pieces) == 100 + 2
    assert max(map(len, pieces)) < 200


def test_the_bytes_of_a_small_delta_do_not_change() -> None:
    old = {
        "bf16": torch.arange(600, dtype=torch.bfloat16),
        "f32": torch.tensor([0.0, -0.0, 1.0]),
        "none": torch.zeros(0, 2),
        "same": torch.ones(4, dtype=torch.float64),
    }
    new = _clone(old)
    new["bf16"][[2, 3, 599]] = 7.0
    new["f32"][:] = torch.tensor([-0.0, 0.0, 1.5])
    delta = deltas.encode(old, new)
    head_bytes = PREFIX.unpack_from(delta)[1]
    assert delta[: PREFIX.size] == b"LWB1" + head_bytes.to_bytes(4, "little")
    body = delta[PREFIX.size + head_bytes : -TRAILER.size]
    assert body.hex() == "".join(_GOLDEN_BLOCKS)
    assert delta[-TRAILER.size :] == b"LWBT" + version_digest(specs(new)).encode()
    assert hashlib.sha256(delta).hexdigest() == _GOLDEN_SHA256


_GOLDEN_BLOCKS = (
    # tensor, start, elements, changed, form, length of the body; the body's streams
    "00000000000000000000000058020000030000000020000000",
    "00050000000200ffff55",  # gaps 2, 0, 255 + 255 + 85
    "000100000004",  # 2 -> 7 and 3 -> 7 go up, 599 -> 7 down
    "0003000000df9f35",  # by 224, 160 and 822, less one
    "0003000000000003",
    "01000000000000000000000003000000030000000220000000",
    "0003000000ffff00",  # 0.0 and -0.0 are 2^31 apart, zigzag 2^32 - 1; 1.5 is 2^22 up
    "0003000000ffff00",
    "0003000000ffff80",
    "0003000000ffff00",
)
_GOLDEN_SHA256 = "c0bf51155653eb4fed6ce4db0914f0742a9e038e28cc2ce70a68aadda700d328"


def test_tied_tensors_stay_equal_under_both_names() -> None:
    shared, moved = torch.randn(4, 4), torch.randn(4, 4)
    old, new = {"embed": shared, "head": shared}, {"embed": moved, "head": moved}
    state = {name: t.clone() for name, t in old.items()}
    _apply(state, deltas.encode(old, new))
    assert _same(state, new)


def test_memory_that_two_names_share_is_refused_before_it_is_written_twice() -> None:
    shared = torch.zeros(8)
    old = {"a": shared[:5], "b": shared[4:]}
    new = {"a": torch.ones(5), "b": torch.ones(4)}
    with pytest.raises(ValueError, match="'a' and 'b' share memory"):
        _apply(old, deltas.encode(old, new))
    assert not shared.any()


def test_a_tensor_that_is_not_contiguous_can_be_read_but_not_written() -> None:
    old = {"w": torch.zeros(4, 6)}
    new = {"w": torch.arange(24.0).reshape(6, 4).t()}
    delta, state = deltas.encode(old, new), _clone(old)
    _apply(state, delta)
    assert _same(state, new)
    with pytest.raises(ValueError, match="'w' is not contiguous"):
        _apply(new, delta, reverse=True)


def test_a_delta_for_another_base_is_refused_naming_both_digests(make_state, mutate) -> None:
    old, other = make_state(0), make_state(1)
    kept = _clone(other)
    delta = deltas.encode(old, mutate(old, 1))
    with pytest.raises(WrongBase) as caught:
        _apply(other, delta)
    assert version_digest(specs(old)) in str(caught.value)
    assert version_digest(specs(other)) in str(caught.value)
    assert _same(other, kept)


def test_a_delta_cannot_be_undone_where_it_was_not_applied(make_state, mutate) -> None:
    old = make_state(0)
    kept = _clone(old)
    with pytest.raises(WrongBase):
        _apply(old, deltas.encode(old, mutate(old, 1)), reverse=True)
    assert _same(old, kept)


def test_a_base_whose_memory_is_not_what_its_specs_say_is_found_out_and_left_alone(
    make_state, mutate
) -> None:
    old = make_state(0)
    new = mutate(old, 1, share=0.05)
    known, delta = specs(old), deltas.encode(old, new)
    (moved,) = torch.nonzero(old["wte.weight"].view(-1) != new["wte.weight"].view(-1))[:1]
    old["wte.weight"].view(-1)[moved] += 1.0
    kept = _clone(old)
    with pytest.raises(Corrupt, match="after the delta"):
        _apply(old, delta, tensors=known)
    assert _same(old, kept)


@pytest.mark.parametrize("kind", ["shape", "dtype", "name"])
def test_states_of_another_model_are_refused_naming_the_tensor_and_both_sides(
    make_state, mutate, kind: str
) -> None:
    old, new = make_state(0), make_state(0)
    if kind == "shape":
        new["wide"], shown = torch.zeros(8, dtype=torch.float64), r"F64\[9\].*F64\[8\]"
    elif kind == "dtype":
        new["wide"], shown = torch.zeros(9), r"F64\[9\].*F32\[9\]"
    else:
        new["wide.bias"], shown = new.pop("wide"), r"F64\[9\].*absent"
    with pytest.raises(WrongBase, match=f"'wide'.*{shown}"):
        deltas.encode(old, new)
    with pytest.raises(WrongBase, match=f"'wide'.*{shown}"):
        _apply(new, deltas.encode(old, mutate(old, 1)))


class _FailingSource(BytesSource):
    """Fails at the n-th read after `arm`, and only then."""

    left = -1

    def read(self, offset: int, num_bytes: int) -> memoryview:
        self.left -= 1
        if self.left == 0:
            raise OSError("disk")
        return super().read(offset, num_bytes)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_a_failing_apply_wrote_is_taken_back(
    small_blocks: int, threads: int, reverse: bool
) -> None:
    old = {"w": torch.zeros(160), "x": torch.zeros(160)}
    new = {"w": torch.arange(160.0) + 1, "x": torch.ones(160)}
    source = _FailingSource(deltas.encode(old, new))
    reader = DeltaReader(source)
    state = _clone(new if reverse else old)
    kept = _clone(state)
    for failing in (1, 7, 20):
        source.left = failing
        with pytest.raises(OSError, match="disk"):
            deltas.apply(state, reader, reverse=reverse, tensors=specs(state), threads=threads)
        assert _same(state, kept)
    deltas.apply(state, reader, reverse=reverse, tensors=specs(state), threads=threads)
    assert _same(state, old if reverse else new)


def _damaged_pair():
    g = torch.Generator().manual_seed(0)
    old = {
        "a": torch.arange(3000.0),
        "b": torch.zeros(300, dtype=torch.bfloat16),
        "c": torch.randn(50, generator=g),
    }
    new = {name: t.clone() for name, t in old.items()}
    new["a"][[7, 100, 2000]] = -1.0
    new["b"][torch.rand(300, generator=g) < 0.2] += 1.0
    new["c"] += 1e-6
    return old, new, deltas.encode(old, new)


def _refused_or_right(old, new, delta: bytes) -> bool:
    """Apply damaged bytes; whatever happens, the state is the old or the new one."""
    state = _clone(old)
    try:
        _apply(state, delta)
    except (Corrupt, WrongBase):
        assert _same(state, old)
        return True
    assert _same(state, new)
    return False


def test_every_flipped_bit_is_refused_or_harmless() -> None:
    old, new, delta = _damaged_pair()
    harmless = 0
    for bit in range(8 * len(delta)):
        flipped = bytearray(delta)
        flipped[bit // 8] ^= 1 << bit % 8
        harmless += not _refused_or_right(old, new, bytes(flipped))
    assert harmless <= 16, "bits without a meaning, in the frame heads of zstd"


def test_every_truncation_and_every_extension_is_refused() -> None:
    old, new, delta = _damaged_pair()
    for size in range(len(delta)):
        assert _refused_or_right(old, new, delta[:size])
    for extra in (b"\0", delta[-1:], delta, delta[-TRAILER.size :]):
        assert _refused_or_right(old, new, delta + extra)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 12), st.binary(max_size=12)),
        min_size=1,
        max_size=3,
    )
)
def test_spliced_bytes_are_refused_or_harmless(splices) -> None:
    old, new, delta = _damaged_pair()
    for at, cut, inserted in splices:
        where = at % (len(delta) + 1)
        delta = delta[:where] + inserted + delta[where + cut :]
    _refused_or_right(old, new, delta)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
@example(b"\x00" * 16, True)
@example(b"\x91" * 200, True)
def test_arbitrary_bytes_are_corrupt(data: bytes, with_prefix: bool) -> None:
    if with_prefix:
        data = PREFIX.pack(b"LWB1", len(data)) + data + TRAILER.pack(b"LWBT", b"0" * 32)
    with pytest.raises(Corrupt):
        DeltaReader(BytesSource(data))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2),
    st.integers(1, 300),
    st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=40)), max_size=5),
    st.sampled_from([32 << 20, -1]),
)
def test_arbitrary_bodies_are_refused_and_change_nothing(
    form: int, count: int, streams, compiled_above: int
) -> None:
    old, _, delta = _damaged_pair()
    body = b"".join(struct.pack("<BI", packing, len(data)) + data for packing, data in streams)
    first = PREFIX.size + PREFIX.unpack_from(delta)[1]
    record = BLOCK.pack(1, 0, 300, count, form, len(body)) + body
    data = delta[:first] + record + delta[-TRAILER.size :]
    state = _clone(old)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "COMPILED_BYTES", compiled_above)
        with pytest.raises((Corrupt, WrongBase)):
            _apply(state, data)
    assert _same(state, old)


def test_a_block_dropped_or_repeated_is_refused(small_blocks: int) -> None:
    old, new = {"w": torch.zeros(64)}, {"w": torch.ones(64)}
    pieces = list(DeltaWriter(old, new, tensors=specs(old)).pieces())
    assert len(pieces) == 6
    for damaged in (
        pieces[:2] + pieces[3:],
        pieces[:2] + pieces[1:],
        [pieces[0], pieces[2], pieces[1], *pieces[3:]],
    ):
        assert _refused_or_right(old, new, b"".join(damaged))


@pytest.mark.parametrize(
    ("field", "value"),
    [(0, 3), (1, 3000), (1, 2**64 - 1), (2, 3001), (2, 2), (3, 0), (3, 2**31), (4, 3)],
)
def test_a_block_that_lies_outside_its_tensor_is_refused(field: int, value: int) -> None:
    _, _, delta = _damaged_pair()
    first = PREFIX.size + PREFIX.unpack_from(delta)[1]
    head = list(BLOCK.unpack_from(delta, first))
    head[field] = value
    with pytest.raises(Corrupt):
        DeltaReader(BytesSource(delta[:first] + BLOCK.pack(*head) + delta[first + BLOCK.size :]))


def test_bytes_that_are_no_safetensors_file_are_refused() -> None:
    for data in (b"", b"junk" * 10, keyframes.encode({"a": torch.zeros(3)})[:-4]):
        with pytest.raises(Corrupt, match="safetensors"):
            keyframes.decode(data)


def test_keyframes_are_bit_exact_for_every_kind_of_tensor(make_state) -> None:
    state = make_state(3)
    state["nan"] = torch.tensor([0x7FC00001, -(2**31)], dtype=torch.int32).view(torch.float32)
    assert _same(keyframes.decode(keyframes.encode(state)), state)
    assert keyframes.encode(state) == keyframes.encode(dict(reversed(state.items())))
