"""The growing token sequence of an episode: ids, loss mask, version stamps, log-probs, routing.

T is the number of tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids

import numpy as np

from services.env_agents.routing_records import flaw, held, joined, lacking
from shared.wire.base import Array
from shared.wire.messages import RoutingHeld, SampledTokens
from shared.wire.trajectory import RoutingRecord, Sequence, Span, Turn


class SequenceBuilder:
    """Ids are only ever appended: what was sampled is never tokenised again.

    Args:
        capacity: most tokens it may hold.
    """

    def __init__(self, capacity: int) -> None:
        self._ids = np.zeros(capacity, dtype="<i4")
        self._mask = np.zeros(capacity, dtype="<u1")
        self._logprobs = np.zeros(capacity, dtype="<f4")
        self._spans: list[Span] = []
        self._mixed_kv: list[Span] = []
        self._routing: list[RoutingRecord] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return len(self._ids) - self._length

    @property
    def spans(self) -> Ids[Span]:
        """Version stamps so far."""
        return self._spans

    def token_ids(self) -> Array:
        """Everything so far, i4[T]."""
        return _wire("i4", self._ids[: self._length])

    def routing_held(self) -> RoutingHeld | None:
        """Return which routing an engine need not send again."""
        return held(self._routing)

    def routing_flaw(self, sampled: SampledTokens) -> str:
        """Return what makes the routing of an answer unusable, or nothing."""
        return flaw(sampled.routing, self._length + sampled.token_ids.shape[0], self._routing)

    def ids_from(self, start: int) -> list[int]:
        return self._ids[start : self._length].tolist()

    def append_context(self, ids: Ids[int]) -> None:
        """Append tokens that the policy did not sample; the caller has looked at `room`."""
        assert len(ids) <= self.room, "sequence over capacity"
        self._ids[self._length : self._length + len(ids)] = ids
        self._length += len(ids)

    def append_sampled(self, sampled: SampledTokens) -> None:
        """Append a (partial) answer with its stamps.

        The caller has looked at `room` and at `routing_flaw`.
        """
        count = sampled.token_ids.shape[0]
        assert count <= self.room, "sequence over capacity"
        start, stop = self._length, self._length + count
        self._ids[start:stop] = sampled.token_ids.numpy()
        self._logprobs[start:stop] = sampled.logprobs.numpy()
        self._mask[start:stop] = 1
        for span in sampled.spans:
            _append_merged(self._spans, span, start)
            if sampled.mixed_kv:
                _append_merged(self._mixed_kv, span, start)
        # An answer's routing counts from the first token of its prefix: everything so far.
        self._routing.extend(lacking(sampled.routing, self._routing))
        self._length = stop

    def sampled_from(self, start: int) -> SampledTokens:
        """Return the answer that begins at `start`, in which everything was sampled."""
        spans = [s for s in self._spans if s.stop > start]
        return SampledTokens(
            token_ids=_wire("i4", self._ids[start : self._length]),
            logprobs=_wire("f4", self._logprobs[start : self._length]),
            spans=tuple(
                Span(version=s.version, start=max(s.start, start) - start, stop=s.stop - start)
                for s in spans
            ),
        )

    def build(self, turns: Ids[Turn], parent: int | None = None) -> Sequence:
        """Return the wire form of everything so far."""
        length = self._length
        return Sequence(
            token_ids=self.token_ids(),
            loss_mask=_wire("u1", self._mask[:length]),
            spans=tuple(self._spans),
            arrays={"sampler_logprobs": _wire("f4", self._logprobs[:length])},
            turns=tuple(turns),
            mixed_kv=tuple(self._mixed_kv),
            routing=joined(self._routing),
            parent=parent,
        )


def _append_merged(spans: list[Span], span: Span, offset: int) -> None:
    start, stop = span.start + offset, span.stop + offset
    if spans and spans[-1].version == span.version and spans[-1].stop == start:
        start = spans.pop().start
    spans.append(Span(version=span.version, start=start, stop=stop))


def _wire(dtype: str, values: np.ndarray) -> Array:
    # The buffers are little-endian and contiguous by construction: no conversion to check for.
    return Array(dtype=dtype, shape=values.shape, data=values.tobytes())  # pyright: ignore[reportArgumentType]
