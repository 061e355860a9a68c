"""Chains of versions with any bits in any dtype, and histories of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import numpy as np
import pytest
import torch

from shared.weights import deltas, keyframes
from shared.weights.bits import bits_dtype, dtype_of, from_bits, to_bits
from shared.weights.digests import num_bytes, sha256_of, specs, version_digest
from shared.weights.errors import MissingVersion
from shared.weights.history import WeightHistory
from shared.weights.spool import Spool
from shared.wire.base import Array
from shared.wire.weights import Canary, Manifest

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> dtype code, shape."""

SHAPES: Shapes = {
    "a": ("F32", (20, 8)),
    "b": ("BF16", (7, 5)),
    "c": ("F16", ()),
    "d": ("F64", (9,)),
    "e": ("F8_E5M2", (0, 3)),
}
CANARY = Canary(token_ids=Array.of([[0, 0]], "i4"), logprobs=Array.of([[0]], "f4"), tolerance=0.0)


def random_state(seed: int, shapes: Shapes = SHAPES) -> State:
    """Any bits: NaN payloads, infinities, negative zeros."""
    rng = np.random.default_rng(seed)
    state: State = {}
    for name, (code, shape) in shapes.items():
        width = dtype_of(code).itemsize
        raw = rng.integers(0, 256, int(np.prod(shape)) * width, dtype=np.uint8)
        state[name] = from_bits(raw.view(bits_dtype(width)), code, shape)
    return state


def bits_of(state: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: to_bits(tensor).tobytes() for name, tensor in state.items()}


class Chain:
    """Versions 0, 1, ...: each is some elements away from the one before."""

    def __init__(
        self,
        num_versions: int,
        *,
        seed: int = 0,
        share: float | None = 0.1,
        has_sha256: bool = False,
        shapes: Shapes = SHAPES,
    ) -> None:
        """`share` of all elements change per version; None: a random share, now and then none."""
        rng = np.random.default_rng(seed)
        self.states = [random_state(seed, shapes)]
        self.manifests: list[Manifest] = []
        self.deltas = [b""]
        for version in range(num_versions):
            if version:
                self.states.append(self._stepped(self.states[-1], rng, share))
            self.manifests.append(manifest_of(version, self.states[version], has_sha256))
            if version:
                known = self.manifests[version - 1].tensors
                self.deltas.append(deltas.encode(*self.states[-2:], tensors=known))
        self.bits = [bits_of(state) for state in self.states]
        self.size = num_bytes(self.states[0])
        self.spools: list[Spool] = []

    @staticmethod
    def _stepped(state: State, rng: np.random.Generator, share: float | None) -> State:
        share = float(rng.choice([0.0, 0.01, 0.1, 1.0])) if share is None else share
        new = {name: tensor.clone() for name, tensor in state.items()}
        for tensor in new.values():
            bits = to_bits(tensor)
            picked = rng.random(len(bits)) < share
            bits[picked] += rng.integers(1, 250, picked.sum()).astype(bits.dtype)
        return new

    def spool(self, data: bytes | int, spool: Spool | None = None) -> Spool:
        spool = spool or Spool()
        spool.write(self.deltas[data] if isinstance(data, int) else data)
        self.spools.append(spool)
        return spool

    async def keyframe(self, version: int, piece_bytes: int = 100) -> AsyncIterator[bytes]:
        data = keyframes.encode(self.states[version])
        for start in range(0, len(data), piece_bytes):
            await asyncio.sleep(0)
            yield data[start : start + piece_bytes]

    async def history(self, versions: int = 0, **options: object) -> WeightHistory:
        """A history of versions 0 .. `versions` - 1, the first one from a keyframe."""
        history = WeightHistory(**options)  # type: ignore[arg-type]
        if versions:
            await history.load_keyframe(self.manifests[0], self.keyframe(0))
        for version in range(1, versions):
            await self.apply(history, version)
        return history

    async def apply(self, history: WeightHistory, version: int, spool: Spool | None = None) -> None:
        given = self.spool(version) if spool is None else spool
        await history.apply_delta(self.manifests[version], version - 1, given)

    async def must_hold(self, history: WeightHistory, *versions: int) -> None:
        """These, exactly these, and every bit of them."""
        assert history.versions == tuple(sorted(versions))
        for version in versions:
            async with history.at(version) as state:
                assert bits_of(state) == self.bits[version]
                assert history.manifest(version) == self.manifests[version]
        for version in set(range(len(self.states))) - set(versions):
            with pytest.raises(MissingVersion):
                async with history.at(version):
                    pytest.fail("lent a version that is not held")
            with pytest.raises(MissingVersion):
                history.manifest(version)

    @property
    def open_spools(self) -> int:
        return sum(spool.size > 0 for spool in self.spools)


def manifest_of(version: int, state: State, has_sha256: bool = False) -> Manifest:
    tensors = specs(state)
    return Manifest(
        version=version,
        parent=version - 1 if version else None,
        upload_id=f"u{version}",
        delta=None,
        keyframe=None,
        tensors=tensors,
        digest=version_digest(tensors),
        sha256=sha256_of(state) if has_sha256 else None,
        canary=CANARY,
        published_at=0.0,
        producer="t",
    )


def changed_and_unchanged(old: State, new: State) -> tuple[int, int]:
    """Return the index of one element of `a` of each kind."""
    differs = to_bits(old["a"]) != to_bits(new["a"])
    return int(np.flatnonzero(differs)[0]), int(np.flatnonzero(~differs)[0])


def flip(history: WeightHistory, name: str, index: int) -> None:
    to_bits(history._replica.state[name])[index] ^= 1


async def soon() -> None:
    """Let all other tasks run as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)
