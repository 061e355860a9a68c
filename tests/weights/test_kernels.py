from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.weights.errors import Corrupt
from shared.weights.kernels.base import FORMS, Coded, Kernels, stream_limits
from shared.weights.kernels.choice import COMPILED_BYTES, compiled_kernels, kernels_for
from shared.weights.kernels.reference import ReferenceKernels, contributions

_REFERENCE = ReferenceKernels()
_WIDTHS = [1, 2, 4, 8]


@pytest.fixture(params=["reference", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return _REFERENCE if request.param == "reference" else compiled_kernels()


def _pair(seed: int, length: int, width: int, share: float, reach: int):
    """Random bits, a share of them moved by up to `reach` units."""
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, length * width, dtype=np.uint8).view(f"<u{width}")
    steps = rng.integers(-reach, reach + 1, length).astype(np.int64).astype(old.dtype)
    return old, np.where(rng.random(length) < share, old + steps, old)


_PAIRS = st.builds(
    _pair,
    st.integers(0, 2**32 - 1),
    # Cache lines of 8 to 64 elements, strips of 1024 to 8192 and what is left over.
    st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 4097, 8191, 8200, 70_000, 200_001])),
    st.sampled_from(_WIDTHS),
    st.sampled_from([0.00005, 0.001, 0.003, 0.01, 0.1, 0.24, 0.26, 1.0]),
    st.sampled_from([1, 3, 2**15, 2**62]),
)


def _streams(coded: Coded) -> list[bytes]:
    return [stream.tobytes() for stream in coded.streams]


@settings(max_examples=150, deadline=None)
@given(_PAIRS, st.sampled_from([0, 1, 2**40]))
def test_compiled_and_reference_agree_bit_for_bit(pair, offset: int) -> None:
    old, new = pair
    fast = compiled_kernels()
    coded, again = _REFERENCE.encode(old, new, offset), fast.encode(old, new, offset)
    assert fast.digest(old, offset) == _REFERENCE.digest(old, offset)
    if coded is None or again is None:
        assert coded is again is None
        assert np.array_equal(old, new)
        return
    assert (coded.form, coded.count) == (again.form, again.count)
    assert coded.digest_change == again.digest_change
    assert _streams(coded) == _streams(again)
    for kernels in (_REFERENCE, fast):
        state = old.copy()
        assert kernels.apply(state, coded, offset, reverse=False) == coded.digest_change
        assert np.array_equal(state, new)
        back = kernels.apply(state, coded, offset, reverse=True)
        assert np.array_equal(state, old)
        assert (back + coded.digest_change) % 2**64 == 0
        positions, steps = kernels.steps(coded, len(old), old.itemsize)
        assert np.array_equal(positions, np.flatnonzero(old != new))
        assert np.array_equal(steps, (new - old)[positions])
        assert positions.dtype == np.int64
        assert steps.dtype == old.dtype


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize(
    ("length", "gaps"),
    [
        (100_000, [0, 0, 254, 255, 256, 509, 510, 511, 0, 1] + [200] * 400),
        (200_000, [65534, 65535, 65536, 0, 1]),
        (131_072, [131_071]),
    ],
)
def test_gaps_around_the_highest_digit_survive(
    kernels: Kernels, width: int, length: int, gaps: list[int]
) -> None:
    old = np.zeros(length, f"<u{width}")
    new = old.copy()
    positions = np.cumsum(np.array(gaps) + 1) - 1
    new[positions] = 1
    coded = kernels.encode(old, new, 0)
    assert coded is not None
    found, steps = kernels.steps(coded, length, width)
    assert found.tolist() == positions.tolist()
    assert steps.tolist() == [1] * len(gaps)


@pytest.mark.parametrize("width", _WIDTHS)
def test_the_streams_of_a_few_changes_are_as_documented(kernels: Kernels, width: int) -> None:
    old = np.full(1000, 5, f"<u{width}")
    new = old.copy()
    new[[3, 4, 259, 999]] = [6, 4, 8, 0]
    coded = kernels.encode(old, new, 0)
    assert coded is not None
    assert (coded.form, coded.count) == ("sparse8", 4)
    nothing = [[]] * (width - 1)
    gaps = [3, 0, 254, 255, 255, 229]
    assert [s.tolist() for s in coded.streams] == [gaps, [0b1010], [0, 0, 2, 4], *nothing]
    rare = kernels.encode(old, np.concatenate([old[:-1], old[:1] - 2]), 0)
    assert rare is not None
    assert rare.form == "sparse16"
    gaps = [[999 & 255], [999 >> 8]]
    assert [s.tolist() for s in rare.streams] == [*gaps, [1], [1], *nothing]
    dense = kernels.encode(old[:3], np.array([5, 6, 3], old.dtype), 0)
    assert dense is not None
    assert dense.form == "dense"
    assert [s.tolist() for s in dense.streams] == [[0, 2, 3], *nothing]


@pytest.mark.parametrize("width", _WIDTHS)
def test_steps_wrap_around_at_both_ends(kernels: Kernels, width: int) -> None:
    top = 2 ** (8 * width) - 1
    half = 2 ** (8 * width - 1)
    old = np.array([0, top, 0, half, *[7] * 20], f"<u{width}")
    new = np.array([top, 0, half, 0, *[7] * 20], f"<u{width}")
    coded = kernels.encode(old, new, 0)
    assert coded is not None
    state = old.copy()
    kernels.apply(state, coded, 0, reverse=False)
    assert np.array_equal(state, new)
    assert coded.streams[1].tolist() == [0b1101], "half a turn counts as negative"


@pytest.mark.parametrize("width", _WIDTHS)
def test_digests_add_up_and_do_not_depend_on_alignment(kernels: Kernels, width: int) -> None:
    data = np.random.default_rng(width).integers(0, 256, 1001 * width + 1, dtype=np.uint8)
    bits = data[1:].view(f"<u{width}")
    whole = contributions(np.arange(1001) + 77, bits)
    assert kernels.digest(bits, 77) == whole
    parts = [
        kernels.digest(bits[a:b], 77 + a) for a, b in ((0, 64), (64, 64), (64, 700), (700, 1001))
    ]
    assert sum(parts) % 2**64 == whole


def test_states_that_are_read_only_or_not_aligned_are_compared_all_the_same(
    kernels: Kernels,
) -> None:
    data = np.arange(4001, dtype=np.uint8)
    odd = data[1:].view("<u4")
    odd.flags.writeable = False
    new = odd.copy()
    new[[5, 600]] += 1
    coded, expected = kernels.encode(odd, new, 0), _REFERENCE.encode(odd, new, 0)
    assert coded is not None
    assert expected is not None
    assert _streams(coded) == _streams(expected)


def _coded(form: str = "sparse8", width: int = 2) -> tuple[Coded, np.ndarray]:
    """Return a good block of 1000 elements, and its base."""
    old = np.arange(1000).astype(f"<u{width}")
    new = old.copy()
    if form == "dense":
        new += 300
    else:
        new[[10, 990] if form == "sparse16" else slice(3, 1000, 100)] += 300
    coded = _REFERENCE.encode(old, new, 0)
    assert coded is not None
    assert coded.form == form
    return coded, old


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [-1, 1])
def test_streams_of_another_size_are_refused_before_anything_is_written(
    kernels: Kernels, form: str, change: int
) -> None:
    coded, old = _coded(form)
    for i, stream in enumerate(coded.streams):
        other = stream[:-1] if change < 0 else np.append(stream, stream[-1:])
        streams = [*coded.streams[:i], other, *coded.streams[i + 1 :]]
        state = old.copy()
        with pytest.raises(Corrupt):
            kernels.apply(state, Coded(coded.form, coded.count, streams, 0), 0, reverse=False)
        assert np.array_equal(state, old)
    for streams in (coded.streams[:-1], [*coded.streams, coded.streams[-1]], []):
        with pytest.raises(Corrupt):
            kernels.steps(Coded(coded.form, coded.count, streams, 0), len(old), 2)


@pytest.mark.parametrize("form", ["sparse8", "sparse16"])
@pytest.mark.parametrize("damage", ["outside", "unfinished", "another sign"])
def test_gaps_that_lead_outside_or_nowhere_are_refused_before_anything_is_written(
    kernels: Kernels, form: str, damage: str
) -> None:
    coded, old = _coded(form)
    streams = [stream.copy() for stream in coded.streams]
    num_gaps = len(streams) - 3
    if damage == "outside":
        streams[num_gaps - 1][-1] += 100
    elif damage == "unfinished":
        for stream in streams[:num_gaps]:
            stream[-1] = 255
    else:
        streams[num_gaps][-1] |= 128
    state = old.copy()
    with pytest.raises(Corrupt):
        kernels.apply(state, Coded(coded.form, coded.count, streams, 0), 0, reverse=False)
    assert np.array_equal(state, old)


def test_a_dense_block_with_another_number_of_changes_is_refused(kernels: Kernels) -> None:
    coded, old = _coded("dense")
    state = old.copy()
    with pytest.raises(Corrupt, match="999 changes"):
        kernels.apply(state, Coded("dense", 999, coded.streams, 0), 0, reverse=False)
    assert np.array_equal(state, old)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(FORMS), st.integers(1, 60), st.integers(60, 300))
def test_both_kernels_refuse_the_same_streams(data, form, count: int, length: int) -> None:
    limits = stream_limits(form, 2, count, length)
    streams = [
        np.frombuffer(data.draw(st.binary(min_size=n if i else 0, max_size=n)), np.uint8)
        for i, n in enumerate(limits)
    ]
    coded = Coded(form, count, streams, 0)
    results = []
    for kernels in (_REFERENCE, compiled_kernels()):
        state = np.arange(length).astype("<u2")
        try:
            kernels.apply(state, coded, 0, reverse=False)
        except Corrupt:
            assert np.array_equal(state, np.arange(length))
            results.append(None)
        else:
            results.append(state.tolist())
    assert results[0] == results[1]


def test_threads_do_not_share_scratch_memory() -> None:
    fast = compiled_kernels()
    pairs = [_pair(seed, 20_000, 2, 0.01 * (seed + 1), 3) for seed in range(4)]
    expected = [_streams(coded) for p in pairs if (coded := _REFERENCE.encode(*p, 0))]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            coded = fast.encode(*pairs[i], 0)
            if coded is None or _streams(coded) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_small_models_do_not_load_the_compiler() -> None:
    code = (
        "import sys, shared.weights.deltas as d;"
        "from shared.weights.kernels.choice import COMPILED_BYTES, kernels_for;"
        "kernels_for(COMPILED_BYTES); assert 'numba' not in sys.modules;"
        "kernels_for(COMPILED_BYTES + 1); assert 'numba' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert kernels_for(COMPILED_BYTES) is not kernels_for(COMPILED_BYTES + 1)


def test_kernels_work_where_machine_code_cannot_be_kept(tmp_path) -> None:
    # As on a read-only root file system: neither beside the source nor below the home directory.
    code = (
        "import tempfile, numpy as np\n"
        "def refuse(*a, **k): raise OSError('read-only')\n"
        "tempfile.TemporaryFile = refuse\n"
        "from shared.weights.kernels.choice import compiled_kernels\n"
        "from shared.weights.kernels import loops\n"
        "assert type(loops.digest._cache).__name__ == 'NullCache'\n"
        "assert compiled_kernels().digest(np.zeros(3, np.uint16), 0) != 0\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path / "none"), "NUMBA_CACHE_DIR": ""}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
