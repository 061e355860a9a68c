"""Reward 1 for the very answer of the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.env_agents import answers
from services.env_agents.verifiers.verifier import TaskFault, Verdict


class ExactMatch:
    """Compares with `payload["answer"]`: a text, or a list of texts of which any will do.

    Args:
        options: `extract` (`tag`: between <answer> and </answer>, malformed without them; `all`,
            the default: everything but thinking), `ignore_case` (False). Runs of white space
            count as one blank.

    Raises:
        ValueError: an unknown option.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - {"extract", "ignore_case"})
        if unknown or options.get("extract", "all") not in ("all", "tag"):
            raise ValueError(
                f"exact has the options extract (all or tag) and ignore_case, not {dict(options)}"
            )
        self._tagged = options.get("extract", "all") == "tag"
        self._ignore_case = bool(options.get("ignore_case", False))

    async def verify(self, answer: str, payload: Mapping[str, Any]) -> Verdict:
        """Judge.

        Raises:
            TaskFault: the task has no `answer`.
        """
        wanted = payload.get("answer")
        accepted: list[Any] = wanted if isinstance(wanted, list) else [wanted]
        if not accepted or not all(isinstance(one, (str, int, float)) for one in accepted):
            raise TaskFault(f"the task's `answer` is no text or list of texts: {wanted!r}")
        given = answers.tagged(answer) if self._tagged else answers.without_thought(answer)
        if given is None:
            return Verdict(0.0, {"malformed": 1.0}, "no <answer>...</answer>")
        right = self._plain(given) in {self._plain(str(one)) for one in accepted}
        return Verdict(float(right))

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self._ignore_case else text
