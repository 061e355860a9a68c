"""The lowest version that may be sampled now, and whether it is published yet.

Only under the `interrupt` route: before the learner leaves a version it raises the floor above it
(a new *generation* of the control document), and requests wait until the next one is published.
"""

from __future__ import annotations

import asyncio

from shared.wire.messages import SampleRequest
from shared.wire.weights import Control


class Gate:
    """What the control document says to requests; generations and heads only grow."""

    def __init__(self) -> None:
        self.generation = 0
        self.min_version = 0
        self.head_version = 0
        self._changed = asyncio.Event()
        """Replaced by every document heard."""

    @property
    def is_open(self) -> bool:
        return self.min_version <= self.head_version

    def hear(self, control: Control) -> bool:
        """Take a document in, late and repeated ones too; True when its generation is new."""
        is_new = control.generation > self.generation
        if is_new:
            self.generation, self.min_version = control.generation, control.min_version
        self.head_version = max(self.head_version, control.head_version)
        self._changed.set()
        self._changed = asyncio.Event()
        return is_new

    async def opened(self) -> None:
        """Wait until the floor is published."""
        while not self.is_open:
            await self._changed.wait()

    def raised(self, request: SampleRequest) -> SampleRequest:
        """Return the request with the present floor."""
        if request.min_version >= self.min_version:
            return request
        return request.model_copy(update={"min_version": self.min_version})
