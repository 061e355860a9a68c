"""A learner's rank above 0: performs what rank 0 says on its part of the model."""

from __future__ import annotations

from services.learner.config import LearnerConfig
from shared.backends.rank_follower import follow as follow_leader
from shared.runtime.errors import ConfigError


def follow(config: LearnerConfig) -> None:
    """Follow rank 0 until it ends.

    Raises:
        ConfigError: another number of processes was started, or a device is missing.
    """
    model = config.model
    try:
        follow_leader(
            config.learner.ranks,
            key="learner.ranks",
            device=model.device,
            timeout_s=model.rank_timeout_s,
            name="learner",
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
