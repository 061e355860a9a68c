"""From a policy's raw text to what it answered."""

from __future__ import annotations

import re
from collections.abc import Sequence

STOPS: tuple[str, ...] = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>", "\n",
)  # fmt: skip
"""Stop tokens' texts, as they end the answers of common model families."""

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCED = re.compile(r"```(?:[\w+-]*)[ \t]*\n(.*?)```", re.DOTALL)


def without_stop(answer: str, stops: Sequence[str] = STOPS) -> str:
    """The answer without stop tokens at its end."""
    before = None
    while before != answer:
        before = answer
        for stop in stops:
            answer = answer.removesuffix(stop)
    return answer


def without_thought(answer: str) -> str:
    """The answer without its thinking; a thought that was never closed leaves nothing."""
    spoken = _THOUGHT.sub("", answer)
    return spoken.partition("<think>")[0]


def tagged(answer: str) -> str | None:
    """What stands between the last <answer> and </answer>; None without them."""
    found = _TAGGED.findall(without_thought(answer))
    return found[-1].strip() if found else None


def code(answer: str) -> str:
    """The last fenced block, or the whole answer when it has none."""
    spoken = without_thought(answer)
    found = _FENCED.findall(spoken)
    return found[-1] if found else spoken
