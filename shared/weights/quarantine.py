"""Artefacts that failed, closed for a while. Pure: the clock is an argument."""

from __future__ import annotations

MAX_PAUSE_S = 60.0


class Quarantine:
    """Closes an upload id after a failure, twice as long after each further one."""

    def __init__(self, first_pause_s: float) -> None:
        self._first_pause_s = first_pause_s
        self._entries: dict[str, tuple[float, float]] = {}
        """upload id -> (open again at, pause)."""

    def add(self, upload_id: str, now: float) -> None:
        """Record a failure."""
        last = self._entries.get(upload_id)
        pause = self._first_pause_s if last is None else min(MAX_PAUSE_S, 2 * last[1])
        self._entries[upload_id] = (now + pause, pause)

    def closed(self, now: float) -> frozenset[str]:
        """Return the ids that must not be tried now."""
        return frozenset(name for name, (until, _) in self._entries.items() if now < until)
