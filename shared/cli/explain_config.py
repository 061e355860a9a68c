"""The configuration that one step of a run was trained with, from the run's own archive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.learner.config import LearnerConfig
from shared.cli.records import RunRecords
from shared.runtime.config import load
from shared.runtime.errors import ConfigError
from shared.wire.journal import Batch, RunStarted


def configuration(
    records: RunRecords, batch: Batch | None
) -> tuple[LearnerConfig | None, list[str]]:
    """Return the learner's configuration that a step ran with, and what to know about it.

    The journal carries it, every default filled in; `resolved.yaml` stands in where the journal's
    is missing or of another release.
    """
    journalled: Mapping[str, Any] = {}
    for body in records.bodies:
        if isinstance(body, RunStarted):
            journalled = body.config
        elif body is batch:
            break
    problems: list[str] = []
    for tree, origin in ((journalled, "journal"), (records.config, "resolved.yaml")):
        if not tree:
            continue
        try:
            config = load(LearnerConfig, tree, origin=origin)
        except ConfigError as error:
            problems.append(str(error))
            continue
        stand_in = [f"configuration: {origin}'s, the other is of another release"] * bool(problems)
        return config, stand_in
    why = problems or ["the run holds no configuration"]
    return None, [*why, "without its configuration no mask, clip or gradient can be given"]


def route_of(records: RunRecords, config: LearnerConfig | None) -> str:
    """Return the configured route, also where the rest cannot be read."""
    named = records.setting("old_logprobs.route", "oracle")
    return config.old_logprobs.route if config else str(named)
