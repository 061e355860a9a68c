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

from services.logit_oracle.bench import Bench
from services.logit_oracle.config import LogitOracleConfig
from services.logit_oracle.oracle import Oracle
from shared.backends.building import BackendSpec
from shared.backends.expert_layers import replayed
from shared.backends.rank_commands import RanksFailed
from shared.backends.rank_follower import follow as follow_leader
from shared.backends.ranks import Ranks, open_ranks
from shared.runtime.context import Context
from shared.runtime.errors import ConfigError, Fatal
from shared.runtime.peers import unless_lost
from shared.weights.assembly import make_follower, make_history

QUEUE = "logit_oracle"
"""Durable name of the work queue's consumer; oracles share it."""

RANKS = "logit_oracle.ranks"
"""Where the configuration says how many processes an oracle is."""


async def serve(context: Context, config: LogitOracleConfig) -> None:
    """Score trajectories until the context is stopped.

    Raises:
        ConfigError: the model directory cannot be used.
        BusUnavailable: the bus did not answer within its bounds.
        Fatal: the published weights do not fit the model, or a rank of this oracle was lost.
    """
    context.health.set_unready("loading the model")
    try:
        ranks = await asyncio.to_thread(
            open_ranks,
            config.logit_oracle.ranks,
            key=RANKS,
            device=config.model.device,
            timeout_s=config.model.rank_timeout_s,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except RanksFailed as error:
        raise Fatal(f"{error} (model.rank_timeout_s)") from error
    try:
        await unless_lost(ranks, _serve_on(context, config, ranks), "starting again")
    finally:
        ranks.close()


def follow(config: LogitOracleConfig) -> None:
    """Follow rank 0 until it ends: what a rank above 0 does.

    Raises:
        ConfigError: another number of processes was started, or a device is missing.
    """
    try:
        follow_leader(
            config.logit_oracle.ranks,
            key=RANKS,
            device=config.model.device,
            timeout_s=config.model.rank_timeout_s,
            name="logit_oracle",
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


async def _serve_on(context: Context, config: LogitOracleConfig, ranks: Ranks) -> None:
    section = config.logit_oracle
    source = Path(config.model.source)
    try:
        backend = await asyncio.to_thread(ranks.build, BackendSpec.of(config.model))
        num_vocab = vocabulary(source)
        experts = replayed(backend, config.model.routing)
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
        experts=experts,
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
