"""The reference model of the KL term: the weights that the run began with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from services.learner.routes.forwards import Logprobs, forward_members
from services.learner.staging import Scored
from shared.backends.base import Backend


class Reference:
    """A second copy of the model directory's weights, never trained."""

    def __init__(
        self, make: Callable[[], Backend], *, temperature: float, pack_tokens: int
    ) -> None:
        self._make = make
        self._temperature = temperature
        self._pack_tokens = pack_tokens
        self._backend: Backend | None = None

    async def logprobs(self, members: Sequence[Scored]) -> dict[str, Logprobs]:
        """Return log-probs of the sampled tokens by ticket id; the first call loads the model."""
        if self._backend is None:
            self._backend = await asyncio.to_thread(self._make)
        found, _ = await asyncio.to_thread(
            forward_members,
            self._backend,
            members,
            temperature=self._temperature,
            pack_tokens=self._pack_tokens,
            replay=False,  # another model's router is not the sampler's
        )
        return found
