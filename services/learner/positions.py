"""Where the learner stands in the streams it reads."""

from __future__ import annotations

from services.learner.desk import Desk
from shared.runtime.bus import Bus

STREAMS = ("terminals", "scores")


class Positions:
    """Next sequence to read, by stream."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.next: dict[str, int] = {"terminals": 1, "scores": 1}

    async def start_at_end(self) -> None:
        """Read on from the streams' present ends.

        Call it *before* looking up what is stored of open tickets: what arrives in between is
        then seen twice, which staging refuses, and never missed.
        """
        for name in STREAMS:
            self.next[name] = (await self._bus.stream_state(name)).last_seq + 1

    def floors(self, desk: Desk) -> dict[str, int]:
        """Return by stream the lowest sequence that is still needed."""
        return desk.floors(self.next["terminals"], self.next["scores"])
