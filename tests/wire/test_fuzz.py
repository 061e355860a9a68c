"""Whatever the bytes, `decode` returns a message or raises WireError."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from pathlib import Path
from typing import Any

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

import shared.wire
from shared.wire.base import Message
from shared.wire.codec import decode, encode
from shared.wire.errors import WireError

GOLDEN = Path(__file__).with_name("golden.json")
SEEDS = [bytes.fromhex(text) for text in json.loads(GOLDEN.read_text()).values()]

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1)
    | st.floats(width=64) | st.text(max_size=8) | st.binary(max_size=16)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


for module in pkgutil.iter_modules(shared.wire.__path__, "shared.wire."):
    importlib.import_module(module.name)
TYPES = tuple(Message.__subclasses__())


def test_the_fuzzed_decoder_knows_every_type_of_the_seeds():
    for seed in SEEDS:
        decode(seed, *TYPES)


def readable_or_refused(payload: bytes) -> None:
    try:
        message = decode(payload, *TYPES)
    except WireError:
        return
    assert decode(encode(message), type(message)) is not None


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, key))
    return found


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(payload):
    readable_or_refused(payload)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_real_messages_with_bytes_changed_cut_or_inserted(seed, data):
    at = data.draw(st.integers(0, len(seed) - 1))
    until = data.draw(st.integers(at, min(len(seed), at + 8)))
    readable_or_refused(seed[:at] + data.draw(st.binary(max_size=8)) + seed[until:])


@settings(max_examples=800, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_real_messages_with_any_one_value_replaced(seed, data):
    envelope = msgpack.unpackb(seed)
    path = data.draw(st.sampled_from(places(envelope)[1:]))
    node = envelope
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = data.draw(VALUES)
    readable_or_refused(msgpack.packb(envelope))


SHAPES = st.sampled_from([[], [0], [1], [2], [1, 1], [2, 1], [0, 2**62], [-1], [2**62]])
ITEM_BYTES = {"u1": 1, "i4": 4, "i8": 8, "u8": 8, "f4": 4, "f8": 8, "O": 8, "i4,i4": 8}


@settings(max_examples=600, deadline=None)
@given(st.sampled_from([seed for seed in SEEDS if b"dtype" in seed]), st.data())
def test_arrays_of_any_shape_and_type_whose_bytes_fit_or_not(seed, data):
    envelope = msgpack.unpackb(seed)
    arrays = [
        path
        for path in places(envelope)
        if isinstance(found := at_path(envelope, path), dict) and "shape" in found
    ]
    array = at_path(envelope, data.draw(st.sampled_from(arrays)))
    shape, dtype = data.draw(SHAPES), data.draw(st.sampled_from(list(ITEM_BYTES)))
    num_bytes = abs(math.prod(shape)) * ITEM_BYTES[dtype]
    if num_bytes > 64 or data.draw(st.integers(0, 4)) == 0:
        num_bytes = data.draw(st.integers(0, 9))
    array.update(shape=shape, dtype=dtype, data=bytes(num_bytes))
    readable_or_refused(msgpack.packb(envelope))


def at_path(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value
