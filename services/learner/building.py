"""What a learner is made of, from its configuration."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import cast

import torch

from services.learner.config import LearnerConfig
from services.learner.reference import Reference
from services.learner.routes.base import OldLogprobRoute, RouteContext
from services.learner.routes.registry import ROUTES
from services.learner.task_source import TaskSource
from shared.backends.adamw import AdamWSettings
from shared.backends.torch_backend import TorchBackend
from shared.runtime.context import Context
from shared.runtime.errors import ConfigError


def load_backend(config: LearnerConfig) -> TorchBackend:
    """Build the backend and load the model directory.

    Raises:
        ConfigError: one line that names what is wrong with the directory.
    """
    optimizer = config.learner.optimizer
    backend = TorchBackend(
        getattr(torch, config.model.dtype),
        optimizer=AdamWSettings(betas=optimizer.betas, weight_decay=optimizer.weight_decay),
    )
    try:
        backend.load_hf(Path(config.model.source))
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.source: {error}") from error
    return backend


def load_task_source(config: LearnerConfig) -> TaskSource:
    """Import the task source named by `task.source`.

    Raises:
        ConfigError: it cannot be imported.
    """
    module_name, _, class_name = config.task.source.partition(":")
    try:
        cls = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"task.source: {config.task.source!r}: {error}") from error
    return cast("TaskSource", cls(config.task, config.run.seed))


def make_route(context: Context, config: LearnerConfig, backend: TorchBackend) -> OldLogprobRoute:
    """Build the configured old-logit route around the weights being trained.

    Raises:
        ConfigError: no such route.
    """
    name = config.old_logprobs.route
    if name not in ROUTES:
        raise ConfigError(f"old_logprobs.route: {name!r} is none of {', '.join(ROUTES)}")
    return ROUTES[name](
        RouteContext(
            backend=backend,
            make_scorer=lambda: load_backend(config),
            bus=context.bus,
            log=context.log,
            weights=config.weights,
            section=config.old_logprobs,
            temperature=config.sampling.temperature,
            pack_tokens=config.learner.optimizer.micro_batch_tokens,
            max_staleness=config.admission.max_staleness,
        )
    )


def make_reference(config: LearnerConfig) -> Reference | None:
    """Return the reference model of the KL term, None where it is off."""
    if not config.learner.algo.kl.coefficient:
        return None
    return Reference(
        lambda: load_backend(config),
        temperature=config.sampling.temperature,
        pack_tokens=config.learner.optimizer.micro_batch_tokens,
    )
