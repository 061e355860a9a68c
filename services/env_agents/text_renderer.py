"""Plain text <-> ids with a Hugging Face fast tokenizer, without a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from shared.runtime.errors import ConfigError


class TextRenderer:
    """Observations are encoded as they are, one after another. Satisfies `Renderer`.

    Args:
        model_dir: Hugging Face directory with tokenizer.json. `eos_token_id` of its
            generation_config.json ends an answer; without one, the newline does.
        options: none are known, and any are left alone.

    Raises:
        ConfigError: the tokenizer is missing or unreadable, or nothing can end an answer.
    """

    def __init__(self, model_dir: str, options: Mapping[str, Any]) -> None:
        del options
        path = Path(model_dir) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"model.source {model_dir}: has no tokenizer.json; point it at a Hugging Face "
                "model directory (for the demo: make base)"
            )
        try:
            self._tokenizer = cast(Any, Tokenizer).from_file(str(path))
        except Exception as error:
            raise ConfigError(f"{path}: not a tokenizer: {error}") from error
        self.stop_ids = _stop_ids(Path(model_dir), self._tokenizer)
        # A map is shared by the episodes of a group and positions by all of them.
        self._encode = lru_cache(maxsize=4096)(self._encode_once)
        self._decode = lru_cache(maxsize=4096)(self._decode_once)

    def prompt(self, text: str) -> list[int]:
        """Ids of the first observation.

        Raises:
            ValueError: the text has characters that the tokenizer does not know.
        """
        return list(self._encode(text))

    def observation(self, text: str) -> list[int]:
        """Ids appended after an answer.

        Raises:
            ValueError: the text has characters that the tokenizer does not know.
        """
        return list(self._encode(text))

    def decode(self, ids: list[int]) -> str:
        """Text of an answer, special tokens included."""
        return self._decode(tuple(ids))

    def _encode_once(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:
            raise ValueError(f"cannot be tokenised: {text[:80]!r}: {error}") from error

    def _decode_once(self, ids: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _stop_ids(model_dir: Path, tokenizer: Any) -> tuple[int, ...]:
    path = model_dir / "generation_config.json"
    declared: object = None
    if path.is_file():
        try:
            declared = json.loads(path.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: not a JSON object: {error}") from error
    match declared:
        case int():
            return (declared,)
        case list() if declared and all(isinstance(i, int) for i in declared):
            return tuple(cast("list[int]", declared))
        case _:
            newline = tokenizer.token_to_id("\n")
    if newline is None:
        raise ConfigError(
            f"model.source {model_dir}: nothing ends an answer: generation_config.json has no "
            "eos_token_id and the tokenizer no newline token"
        )
    return (int(newline),)
