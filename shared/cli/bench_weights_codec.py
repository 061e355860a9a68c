"""The codec on one core, against a memcpy of the whole model, for `make bench-weights`.

Everything that is compared is timed in turn, in the same process, pinned to one core.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import zstandard

from shared.cli.bench_weights_cases import Case
from shared.cli.bench_weights_manifests import manifest_of
from shared.cli.bench_weights_models import Model, State, open_model
from shared.weights import deltas
from shared.weights.bits import to_bits
from shared.weights.digests import num_bytes, specs, version_digest
from shared.weights.history import WeightHistory
from shared.weights.keyframes import SafetensorsPieces
from shared.weights.spool import Spool
from shared.wire.weights import TensorSpec

HISTORY_VERSIONS = 5
PIECE_BYTES = 4 << 20
ZSTD_LEVEL = 1
ZSTD_ELEMENTS = 1 << 20
"""Compressed at a time: a frame per block and byte plane."""


def measure(case: Case, model: Model) -> dict[str, Any]:
    """Return the codec's fields of a case's row."""
    old = model.first()
    new = {name: tensor.clone() for name, tensor in old.items()}
    model.advance(new)
    tensors = specs(old)
    row: dict[str, Any] = {"model_bytes": num_bytes(old), "num_tensors": len(old)}
    row |= _speeds(old, new, tensors, case.repetitions)
    row["zstd_full_ratio"] = zstd_bytes(new) / row["model_bytes"]
    return row | asyncio.run(_history(old, new, tensors, model))


def pin_to_one_core() -> None:
    """Keep this process on one core, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def zstd_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Return the size of a state as zstd-compressed byte planes: a keyframe, were it compressed."""
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    total = 0
    for name in sorted(state):
        bits = to_bits(state[name])
        for start in range(0, len(bits), ZSTD_ELEMENTS):
            block = bits[start : start + ZSTD_ELEMENTS]
            planes = block.view(np.uint8).reshape(len(block), bits.itemsize)
            for index in range(bits.itemsize):
                total += len(compressor.compress(planes[:, index].tobytes()))
    return total


def _speeds(
    old: State, new: State, tensors: Sequence[TensorSpec], repetitions: int
) -> dict[str, Any]:
    """Time memcpy, encode, apply (which updates and checks digests) and taking it back, in turn."""
    writer = deltas.DeltaWriter(old, new, tensors=tensors)
    delta = b"".join(writer.pieces())  # also compiles the kernels
    reader = deltas.DeltaReader(deltas.BytesSource(delta))
    copy = {name: tensor.clone() for name, tensor in old.items()}
    pairs = [(to_bits(copy[name]), to_bits(old[name])) for name in old]

    def encode() -> None:
        for _ in deltas.DeltaWriter(old, new, tensors=tensors).pieces():
            pass

    def apply() -> None:
        # The delta stays with whoever applied it: it is its own undo patch.
        applied = deltas.apply(copy, reader, tensors=tensors)
        assert version_digest(applied.tensors) == reader.target

    def take_back() -> None:
        applied = deltas.apply(copy, reader, reverse=True, tensors=writer.tensors)
        assert version_digest(applied.tensors) == reader.base

    def memcpy() -> None:
        for into, source in pairs:
            np.copyto(into, source)

    # One array of the model's size is copied faster than its tensors one by one: both are told.
    size = sum(source.nbytes for _, source in pairs)
    one, other = np.ones(size, np.uint8), np.ones(size, np.uint8)

    def memcpy_one_array() -> None:
        np.copyto(one, other)

    works = [memcpy, encode, apply, take_back, memcpy_one_array]
    memcpy_s, encode_s, apply_s, take_back_s, one_s = map(median, _in_turn(works, repetitions))
    return {
        "memcpy_s": memcpy_s,
        "encode_s": encode_s,
        "apply_s": apply_s,
        "encode_over_memcpy": memcpy_s / encode_s,
        "apply_over_memcpy": memcpy_s / apply_s,
        "undo_over_memcpy": memcpy_s / take_back_s,
        "memcpy_one_array_s": one_s,
        "encode_over_memcpy_one_array": one_s / encode_s,
        "apply_over_memcpy_one_array": one_s / apply_s,
    }


def _in_turn(works: Sequence[Callable[[], None]], repetitions: int) -> list[list[float]]:
    """Return the seconds of each work, `repetitions` rounds after one that does not count."""
    times: list[list[float]] = [[] for _ in works]
    for repetition in range(repetitions + 1):
        for work, seconds in zip(works, times, strict=True):
            started = time.perf_counter()
            work()
            if repetition:
                seconds.append(time.perf_counter() - started)
    return times


async def _history(
    old: State, new: State, tensors: Sequence[TensorSpec], model: Model
) -> dict[str, Any]:
    """Fill a history with five versions; return its size and the mean size of its deltas.

    `new` is version 1 and is moved on.
    """
    history = WeightHistory()
    await history.load_keyframe(
        manifest_of(0, tensors), _pieces(SafetensorsPieces(old, PIECE_BYTES))
    )
    num_delta_bytes: list[int] = []
    changed: list[float] = []
    for version in range(1, HISTORY_VERSIONS):
        if version > 1:
            model.advance(new)
        writer = deltas.DeltaWriter(old, new, tensors=tensors)
        spool = Spool()
        for piece in writer.pieces():
            spool.write(piece)
        num_delta_bytes.append(spool.size)
        changed.append(writer.changed / writer.elements)
        tensors = writer.tensors
        await history.apply_delta(manifest_of(version, tensors), version - 1, spool)
        for name, tensor in old.items():
            tensor.copy_(new[name])
    assert history.versions == tuple(range(HISTORY_VERSIONS))
    size = num_bytes(old)
    held = history.bytes_held + history.bytes_spilled
    return {
        "changed_ratio": sum(changed) / len(changed),
        "delta_ratio": sum(num_delta_bytes) / len(num_delta_bytes) / size,
        "history5_over_copy": held / size,
    }


async def _pieces(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def main(argument: str) -> None:
    """Measure for a JSON job and print the fields as a JSON object."""
    pin_to_one_core()
    job = json.loads(argument)
    case = Case(**job["case"])
    print(json.dumps(measure(case, open_model(case, Path(job["folder"])))))


if __name__ == "__main__":
    main(sys.argv[1])
