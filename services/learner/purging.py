"""Dropping what no retained checkpoint needs, as far as the recorder has archived it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgpack

from shared.runtime.bus import StreamName
from shared.runtime.context import Context
from shared.runtime.errors import BusError
from shared.weights.publisher import Publisher

LOGS: tuple[StreamName, ...] = ("terminals", "scores")


class Purging:
    """Consumes the recorder's positions; what cannot be purged now is purged the next time."""

    def __init__(self, context: Context, publisher: Publisher, *, archive: bool = True) -> None:
        """Purge versions through `publisher`; with `archive`, nothing that no recorder has kept."""
        self._archive = archive
        self._context = context
        self._bus = context.bus
        self._publisher = publisher

    async def purge(self, low_water_mark: int, floors: Mapping[str, int]) -> None:
        """Purge versions and logs, each for itself: one that fails does not keep the others.

        Args:
            low_water_mark: oldest version that anything may still ask for.
            floors: log -> first sequence that a retained checkpoint may read again.
        """
        positions = await self._positions() if self._archive else None
        if positions is None and self._archive:
            return
        low = low_water_mark
        if positions is not None:
            low = min(low, positions.get("versions", -1))
        if low >= 0:
            try:
                await self._publisher.purge_below(low)
            except BusError as error:
                self._failed("versions", error)
        for name in LOGS:
            floor = floors.get(name, 0)
            if positions is not None:
                floor = min(floor, positions.get(name, 0) + 1)
            if floor > 1:
                try:
                    await self._bus.purge(name, floor)
                except BusError as error:
                    self._failed(name, error)

    async def _positions(self) -> dict[str, int] | None:
        """Return what the recorder has archived, None before it said so."""
        archived = await self._bus.get_control("archived")
        return None if archived is None else cast("dict[str, int]", msgpack.unpackb(archived))

    def _failed(self, what: str, error: BusError) -> None:
        self._context.count("purges_failed")
        self._context.log.warning("purge_failed", what=what, reason=str(error))
