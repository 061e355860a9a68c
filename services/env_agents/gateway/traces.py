"""What was asked and sampled, on disk as it happens: it outlives whatever crashes.

One JSON-lines file per episode: `begin` with the task, then `request` and `answer` in turns (ids,
the sampler's log-probs, version stamps), then `end` with the reward or `fail` with the reason; a
file without either ended with its process.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from services.env_agents.answer import Answer
from services.env_agents.gateway.sessions import Exchange
from shared.wire.messages import TaskRef


class Trace:
    """One episode's file; nothing is written without a folder.

    Args:
        folder: made if it does not exist.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def begin(self, key: str, task: TaskRef) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        # Named after the key without telling it.
        name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        self._file = (self._folder / f"{name}.jsonl").open("a", encoding="utf-8")
        self._write("begin", task=task.model_dump(mode="json"))

    def request(self, exchange: Exchange) -> None:
        observation = exchange.asked.observation
        self._write(
            "request",
            number=exchange.number,
            messages=list(observation.messages),
            tools=list(observation.tools or ()),
            text=observation.text,
            token_ids=observation.token_ids,
            ignored=exchange.asked.ignored,
        )

    def answer(self, exchange: Exchange, answer: Answer) -> None:
        self._write(
            "answer",
            number=exchange.number,
            text=answer.text,
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
            spans=[[span.version, span.start, span.stop] for span in answer.spans],
            finish=answer.finish,
        )

    def end(self, rewards: Mapping[str, float]) -> None:
        self._write("end", rewards=dict(rewards))

    def fail(self, error: BaseException) -> None:
        self._write("fail", error=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: str, **content: Any) -> None:
        if self._file is None:
            return
        line = {"event": event, "at": round(time.time(), 3), **content}
        self._file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        self._file.flush()
