"""Token ids as text, and text as something a terminal can show."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any, cast

from shared.cli.records import RunRecords


def decoder(records: RunRecords) -> Callable[[int], str]:
    """Return id -> text by the model's tokenizer, or the id in brackets without one."""
    try:
        from tokenizers import Tokenizer

        tokenizer = cast(Any, Tokenizer).from_file(str(records.model_dir() / "tokenizer.json"))
    except Exception:  # noqa: BLE001 - not installed, or a file it cannot read: it raises no less
        return lambda token_id: f"[{token_id}]"

    def text(token_id: int) -> str:
        decoded = str(tokenizer.decode([token_id], skip_special_tokens=False))
        return decoded or str(tokenizer.id_to_token(token_id) or f"[{token_id}]")

    return text


def shown(text: str) -> str:
    """Make white space visible and control characters harmless."""
    named = {" ": "·", "\n": "⏎", "\t": "→"}
    return "".join(named.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def width(text: str) -> int:
    """Return the columns a terminal needs for it."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def fit(text: str, columns: int) -> str:
    """Cut or pad to exactly so many columns."""
    if width(text) > columns:
        while text and width(text) > columns - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - width(text))
