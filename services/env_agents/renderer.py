"""Text <-> token ids, once: ids are never re-tokenised and a history only grows."""

from __future__ import annotations

from typing import Protocol


class Renderer(Protocol):
    """Turns what the environment says into token ids and the policy's ids into text."""

    stop_ids: tuple[int, ...]
    """Ids that end an answer."""

    def prompt(self, text: str) -> list[int]:
        """Ids of the first observation."""
        ...

    def observation(self, text: str) -> list[int]:
        """Ids appended after an answer."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of an answer."""
        ...
