"""The shell: terminals in, one score per training trajectory out.

Intake: consumes terminals; waits for a free place; unblocked by a stored score; produces parts.
Forward: consumes the elevator's moves and packs; waits for nobody; produces log-probs.
Store: consumes settled trajectories; waits for the log; produces scores, then acknowledges.
Follower: consumes manifests and chunks; produces versions. Control: follows the low-water mark.
Every decision is the elevator's; a version is scored by its own bytes or not at all.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import torch

from services.logit_oracle.bench import Bench
from services.logit_oracle.config import LogitOracleConfig
from services.logit_oracle.oracle import Oracle
from shared.backends.layer_options import LayerOptions
from shared.backends.torch_backend import TorchBackend
from shared.runtime.context import Context
from shared.runtime.errors import ConfigError
from shared.weights.assembly import make_follower, make_history

QUEUE = "logit_oracle"
"""Durable name of the work queue's consumer; oracles share it."""

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


async def serve(context: Context, config: LogitOracleConfig) -> None:
    """Score trajectories until the context is stopped.

    Raises:
        ConfigError: the model directory cannot be used.
        BusUnavailable: the bus did not answer within its bounds.
        Fatal: the published weights do not fit the model.
    """
    section = config.logit_oracle
    source = Path(config.model.source)
    backend = TorchBackend(
        DTYPES[config.model.dtype], options=LayerOptions(compile=config.model.compile)
    )
    context.health.set_unready("loading the model")
    try:
        await asyncio.to_thread(backend.load_hf, source)
        num_vocab = vocabulary(source)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not await context.streams_exist(section.streams_timeout_s):
        return
    queue = await context.bus.work_queue(
        "terminals", QUEUE, ack_wait_s=section.ack_wait_s, max_ack_pending=section.max_ack_pending
    )
    history = make_history(config.weights, keep_past=True)
    bench = Bench(backend, history, section.layout, pack_tokens=section.pack_tokens)
    oracle = Oracle(
        context,
        config,
        bench=bench,
        history=history,
        follower=make_follower(config.weights, context.bus, history, context.log),
        num_vocab=num_vocab,
    )
    context.log.info("serving", model=str(source), layout=bench.layout.model_dump())
    try:
        await oracle.run(queue)
    finally:
        bench.close()
        await queue.close()
        context.log.info("stopped", **context.counters)


def vocabulary(source: Path) -> int:
    """Return the vocabulary size that a Hugging Face directory declares.

    Raises:
        ValueError: its config.json has none.
    """
    config = cast("dict[str, Any]", json.loads((source / "config.json").read_text()))
    for part in (config, config.get("text_config", {})):
        if isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    raise ValueError(f"model {source}: config.json has no vocab_size")
