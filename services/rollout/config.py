"""Configuration of the rollout."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.runtime.sections import CommonConfig, Section


class RolloutSection(Section):
    """One rollout process: its engine, its limits, how long it waits for whom."""

    engine: Literal["torch"] = "torch"
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """In which the engine holds the weights and computes."""
    max_running: int = Field(default=128, gt=0)
    """Turns sampled at once."""
    kv_slots: int = Field(default=256, gt=0)
    """Running turns plus finished prefixes kept for the next turn of their episode."""
    step_tokens: int = Field(default=1024, gt=0)
    """Most tokens forwarded in one step."""
    max_concurrency: int = Field(default=512, gt=0)
    """Requests accepted at once, running and waiting; further ones are refused as retryable."""
    heartbeat_s: float = Field(default=1.0, gt=0)
    """How often a running request hears from its pod."""
    behind_wait_s: float = Field(default=0.2, ge=0)
    """How long a request waits for a version that is on its way before the answer is `behind`."""
    drain_s: float = Field(default=5.0, gt=0)
    """At a stop: for sending what was sampled so far."""
    chunk_timeout_s: float = Field(default=5.0, gt=0)
    """How long to ask for a piece of the weights that is not there yet."""
    follow_retry_s: float = Field(default=2.0, gt=0)
    """First wait before a version that could not be fetched is tried again."""
    streams_timeout_s: float = Field(default=60.0, gt=0)
    """How long to wait at start until the learner has created the streams."""

    @model_validator(mode="after")
    def _slots_for_running(self) -> Self:
        if self.kv_slots < self.max_running:
            raise ValueError(
                f"kv_slots {self.kv_slots} is below max_running {self.max_running}: every running "
                "turn needs a slot"
            )
        return self


class RolloutConfig(CommonConfig):
    """What a rollout reads."""

    rollout: RolloutSection = RolloutSection()
