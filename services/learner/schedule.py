"""The learning rate as a function of the version a step starts from. Pure."""

from __future__ import annotations

import math

from services.learner.config import OptimizerSection


def learning_rate(section: OptimizerSection, version: int, num_versions: int) -> float:
    """Return the learning rate of the step from `version`, of `num_versions` steps in all."""
    if version < section.warmup_versions:
        return section.lr * (version + 1) / (section.warmup_versions + 1)
    if section.schedule == "constant":
        return section.lr
    span = max(1, num_versions - section.warmup_versions)
    progress = (version - section.warmup_versions) / span
    if section.schedule == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2
    return section.lr * (1.0 - (1.0 - section.final_ratio) * progress)
