"""Telling a follower's owner what it holds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from shared.runtime.logs import Log
from shared.weights.errors import MissingVersion
from shared.weights.history import WeightHistory
from shared.weights.materialiser import Materialiser
from shared.wire.weights import Manifest

OnHead = Callable[[Manifest, frozenset[str] | None], Awaitable[None]]
"""(manifest, names of tensors that differ from the last head shown, None = all)."""
OnVersion = Callable[[Manifest], Awaitable[None]]


class Showing:
    """Calls back, and remembers which head was shown last."""

    def __init__(self, history: WeightHistory, materialiser: Materialiser, log: Log) -> None:
        self._history = history
        self._materialiser = materialiser
        self._log = log
        self._shown: Manifest | None = None
        self.heads_shown = 0

    @property
    def version(self) -> int:
        """Newest version shown, -1 when none was."""
        return -1 if self._shown is None else self._shown.version

    def forget(self) -> None:
        """What was shown was wrong: show the head again, and all of its tensors."""
        self._shown = None

    async def tell(self, version: int, on_version: OnVersion | None) -> None:
        """Call `on_version` for a version that is held."""
        if on_version is not None:
            manifest = self._history.manifest(version)
            await self._call(version, lambda: on_version(manifest))

    async def show_head(self, on_head: OnHead, *, newest_known: int) -> None:
        """Call `on_head` for the newest version held, unless it was shown."""
        newest = self._history.newest
        if newest <= self.version:
            return
        manifest = self._history.manifest(newest)
        changed = changed_names(self._shown, manifest)
        if await self._call(newest, lambda: on_head(manifest, changed)):
            self._shown = manifest
            self.heads_shown += 1
            self._log.info("head_shown", version=newest, lag=newest_known - newest)

    async def _call(self, version: int, call: Callable[[], Awaitable[None]]) -> bool:
        """Call; False: the version turned out wrong when it was about to be used."""
        try:
            await call()
        except MissingVersion as error:
            if error.version != version or version in self._history.versions:
                raise
            self._materialiser.resync(version, "copy", str(error))
            return False
        return True


def changed_names(old: Manifest | None, new: Manifest) -> frozenset[str] | None:
    """Return the tensors that differ between two versions, None when all must be assumed to."""
    if old is None:
        return None
    before = {t.name: t for t in old.tensors}
    if set(before) != {t.name for t in new.tensors}:
        return None
    return frozenset(t.name for t in new.tensors if before[t.name] != t)
