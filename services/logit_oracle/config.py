"""Configuration of the logit oracle."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.runtime.sections import CommonConfig, Section


class LogitOracleSection(Section):
    """One oracle process: how it packs, how long it lets work wait, how it retries."""

    layout: Literal["packed", "single"] = "packed"
    """packed: prefixes laid end to end. single: one whole sequence per forward, the canonical
    layout in which the numbers can be compared bit for bit."""
    pack_tokens: int = Field(default=4096, gt=0)
    """Token budget of one forward; a longer prefix gets a forward of its own."""
    max_wait_s: float = Field(default=0.25, gt=0)
    """How long a part waits for company before its version is due."""
    max_in_flight: int = Field(default=512, gt=0)
    """Trajectories held at once."""
    fetch_batch: int = Field(default=64, gt=0)
    """Trajectories taken from the queue at once."""
    fetch_timeout_s: float = Field(default=1.0, gt=0)
    """One wait for trajectories; also the longest delay before a stop is seen."""
    fetch_linger_s: float = Field(default=0.02, ge=0)
    """Pause between fetches, so that trajectories that finish together share one."""
    ack_wait_s: float = Field(default=10.0, gt=0)
    """A trajectory whose oracle says nothing for so long is delivered to another."""
    max_ack_pending: int = Field(default=16384, gt=0)
    """Trajectories held over all oracles; at least the admission bound."""
    store_concurrency: int = Field(default=16, gt=0)
    """Scores on their way to the log at once; each waits for one acknowledgement."""
    canary_retries: int = Field(default=2, ge=0)
    """How often a version whose canary disagrees is fetched afresh before its tokens are
    reported unverified."""
    ensure_timeout_s: float = Field(default=10.0, gt=0)
    """One attempt to bring back a version that is not held."""
    ask_retry_s: float = Field(default=1.0, gt=0)
    """Pause before a version is asked for again after the bus did not answer."""
    absent_after_s: float = Field(default=30.0, gt=0)
    """How long a version newer than the newest published one is waited for."""
    control_poll_s: float = Field(default=1.0, gt=0)
    """How often the control document is read."""
    streams_timeout_s: float = Field(default=60.0, gt=0)
    """How long to wait at start until the learner has created the streams."""
    ranks: int = Field(default=1, gt=0)
    """Processes of one oracle that hold the model together, started by torchrun; the first one
    owns the bus."""
    drain_s: float = Field(default=10.0, gt=0)
    """At a stop: for scoring and storing what is held, before the rest is handed back."""


class LogitOracleConfig(CommonConfig):
    """What a logit oracle reads."""

    logit_oracle: LogitOracleSection = LogitOracleSection()

    @model_validator(mode="after")
    def _divides(self) -> Self:
        self.model.check_ranks(self.logit_oracle.ranks, "logit_oracle.ranks")
        return self
