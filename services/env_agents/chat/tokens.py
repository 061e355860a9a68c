"""The model's tokenizer: ids of template text, text of sampled ids, the tokens that end answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from shared.runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a stop token stands in a text."""

    start: int
    stop: int
    token_id: int


class ChatTokenizer:
    """A Hugging Face fast tokenizer and the model's stop ids.

    Args:
        model_dir: has tokenizer.json; config.json and generation_config.json are held against it.

    Raises:
        ConfigError: a file is missing or unreadable, nothing ends an answer, or the tokenizer's
            ids are not the model's.
    """

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"model.source {model_dir}: has no tokenizer.json; point it at a Hugging Face "
                "model directory with a fast tokenizer"
            )
        try:
            self._tokenizer = cast(Any, Tokenizer).from_file(str(path))
        except Exception as error:
            raise ConfigError(f"{path}: not a tokenizer: {error}") from error
        self._check_vocabulary(model_dir)
        self.stop_ids = self._declared_stops(model_dir)
        self._stops = [(self._text_of(token_id), token_id) for token_id in self.stop_ids]
        self._special: list[str] = [
            str(added.content)
            for added in self._tokenizer.get_added_tokens_decoder().values()
            if added.special
        ]
        # Prompts are shared by the members of a group, glue by all episodes.
        self.encode_cached = lru_cache(maxsize=4096)(self._encode)

    def encode(self, text: str) -> list[int]:
        """Return ids of a text in which the template has written every special token.

        Raises:
            ValueError: it has characters that the tokenizer does not know.
        """
        return list(self.encode_cached(text))

    def encode_after_stop(self, end: Stop, text: str, *, with_stop: bool) -> list[int]:
        """Return ids of text that follows a stop token, tokenised as that token's neighbour.

        Args:
            end: the token as the template writes it.
            text: what follows it.
            with_stop: whether the stop token itself is still to be appended.
        """
        whole = self.encode_cached(self._text_of(end.token_id) + text)
        assert whole[0] == end.token_id, "a stop token is one token whatever follows"
        return list(whole if with_stop else whole[1:])

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens included."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def first_stop(self, text: str) -> Stop | None:
        """Return where the first stop token of a text stands."""
        found = [
            Stop(at, at + len(written), token_id)
            for written, token_id in self._stops
            if (at := text.find(written)) >= 0
        ]
        return min(found, key=lambda s: (s.start, -s.stop), default=None)

    def has_special(self, text: str) -> bool:
        """Whether a text holds a token that only templates write."""
        return any(token in text for token in self._special)

    def token(self, token_id: int) -> str:
        """Return one token as the vocabulary spells it."""
        return str(self._tokenizer.id_to_token(token_id))

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:
            raise ValueError(f"cannot be tokenised: {text[:80]!r}: {error}") from error

    def _text_of(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def _declared_stops(self, model_dir: Path) -> tuple[int, ...]:
        path = model_dir / "generation_config.json"
        declared = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = [declared] if isinstance(declared, int) else declared
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise ConfigError(
                f"{path}: nothing ends an answer: it needs an eos_token_id, the id (or ids) of "
                "the token that the chat template writes after an answer"
            )
        stop_ids = tuple(cast("list[int]", ids))
        for token_id in stop_ids:
            spelt = self._tokenizer.id_to_token(token_id)
            if spelt is None:
                raise ConfigError(
                    f"{path}: eos_token_id {token_id} is no token of {model_dir / 'tokenizer.json'}"
                    ": the tokenizer is not this model's"
                )
            ids = self._tokenizer.encode(self._text_of(token_id), add_special_tokens=False).ids
            if ids != [token_id]:
                raise ConfigError(
                    f"{model_dir / 'tokenizer.json'}: the text of eos_token_id {token_id} "
                    f"({spelt!r}) is read back as {ids}; the stop token must be an added token"
                )
        return stop_ids

    def _check_vocabulary(self, model_dir: Path) -> None:
        path = model_dir / "config.json"
        if not path.is_file():
            return
        rows = read_json(path).get("vocab_size")
        if not isinstance(rows, int):
            return
        spelt, highest = max(
            self._tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]
        )
        if highest >= rows:
            raise ConfigError(
                f"{model_dir / 'tokenizer.json'}: token {spelt!r} has the id {highest}, but "
                f"config.json has vocab_size {rows}: the tokenizer is not this model's"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return cast("dict[str, Any]", found)
