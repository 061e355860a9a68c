"""Versions coming in from the bus, in order and on demand."""

from __future__ import annotations

from collections.abc import Callable

from services.logit_oracle.config import LogitOracleSection
from services.logit_oracle.orders import Ask, AskFailed, CaughtUp, Event, Gone, Held
from shared.runtime.context import Context
from shared.runtime.errors import BusUnavailable
from shared.weights.errors import MissingVersion
from shared.weights.follower import Follower
from shared.weights.history import WeightHistory
from shared.weights.manifest_log import read_head
from shared.wire.errors import WireError
from shared.wire.weights import Manifest


class Versions:
    """Tells the elevator which versions are held and which are gone for good."""

    def __init__(
        self,
        context: Context,
        section: LogitOracleSection,
        history: WeightHistory,
        follower: Follower,
        tell: Callable[[Event], None],
    ) -> None:
        self._context = context
        self._section = section
        self._history = history
        self._follower = follower
        self._tell = tell

    async def follow(self) -> None:
        """Materialise every version from the low-water mark on, until cancelled."""
        await self._follower.run(self._on_head, start="oldest_needed", on_version=self._on_version)

    async def ask(self, ask: Ask) -> None:
        """Try once, within a bound, to bring a version back; tell how it went."""
        version = ask.version
        if ask.afresh and version in self._history.versions:
            self._history.clear()  # every version is reached from the one copy that is doubted
        try:
            await self._follower.ensure(version, self._section.ensure_timeout_s)
        except MissingVersion as error:
            self._context.log.warning("version_gone", version=version, reason=str(error))
            self._tell(Gone(version))
        except (TimeoutError, BusUnavailable) as error:
            gone = await self._never_published(version)
            self._context.log.warning(
                "version_not_available", version=version, reason=repr(error), gone=gone
            )
            self._tell(Gone(version) if gone else AskFailed(version))
        else:
            self._tell(Held(version))

    async def _on_version(self, manifest: Manifest) -> None:
        self._tell(Held(manifest.version))

    async def _on_head(self, manifest: Manifest, changed: frozenset[str] | None) -> None:
        self._context.set_version(manifest.version)
        self._tell(CaughtUp())

    async def _never_published(self, version: int) -> bool:
        try:
            head = await read_head(self._context.bus)
        except (WireError, BusUnavailable):
            return False
        return head is None or head.manifest.version < version
