"""What a learner is made of, from its configuration."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import cast

import torch

from services.learner.config import LearnerConfig
from services.learner.positions import Positions
from services.learner.reference import Reference
from services.learner.routes.base import OldLogprobRoute, RouteContext
from services.learner.routes.registry import ROUTES
from services.learner.routes.stored import StoredScores
from services.learner.score_store import ScoreStore
from services.learner.shadows import Shadows
from services.learner.step_inputs import StepInputs
from services.learner.task_source import TaskSource
from shared.backends.adamw import AdamWSettings
from shared.backends.base import Backend
from shared.backends.layer_options import LayerOptions
from shared.backends.torch_backend import TorchBackend
from shared.runtime.context import Context
from shared.runtime.errors import ConfigError


def load_backend(config: LearnerConfig) -> Backend:
    """Build the backend and load the model directory.

    Raises:
        ConfigError: one line that names what is wrong with the directory.
    """
    optimizer = config.learner.optimizer
    backend = TorchBackend(
        getattr(torch, config.model.dtype),
        optimizer=AdamWSettings(betas=optimizer.betas, weight_decay=optimizer.weight_decay),
        options=LayerOptions(recompute=config.model.recompute, compile=config.model.compile),
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


def make_inputs(
    context: Context, config: LearnerConfig, backend: Backend, positions: Positions
) -> StepInputs:
    """Build the configured old-logit route, its shadows and the reference model.

    Raises:
        ConfigError: no such route.
    """
    section, at = config.old_logprobs, _route_context(context, config, backend)
    of_anchor = section.model_copy(update={"route": section.anchor, "fallback": ""})
    return StepInputs(
        _make_route(section.route, at),
        make_shadows(context, config, backend),
        _make_reference(config),
        ScoreStore(context, backend, section.layout),
        positions,
        _make_route(section.anchor, replace(at, section=of_anchor)) if section.anchor else None,
    )


def make_shadows(context: Context, config: LearnerConfig, backend: Backend) -> Shadows:
    """Build the routes that look on, each with its defaults and bounds of its own."""
    own = {
        "ewma": None,
        "fallback": "",
        "version_timeout_s": config.old_logprobs.shadow_timeout_s,
    }
    routes: list[OldLogprobRoute] = []
    for name in config.old_logprobs.shadow:
        section = config.old_logprobs.model_copy(update={**own, "route": name})
        at = replace(_route_context(context, config, backend), section=section)
        routes.append(StoredScores(at) if name == "oracle" else _make_route(name, at))
    return Shadows(
        context,
        routes,
        seed=config.run.seed,
        share=config.old_logprobs.shadow_share,
        every=config.learner.shadow_every,
    )


def _make_route(name: str, context: RouteContext) -> OldLogprobRoute:
    if name not in ROUTES:
        raise ConfigError(f"old_logprobs.route: {name!r} is none of {', '.join(ROUTES)}")
    return ROUTES[name](context)


def _route_context(context: Context, config: LearnerConfig, backend: Backend) -> RouteContext:
    return RouteContext(
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


def _make_reference(config: LearnerConfig) -> Reference | None:
    """Return the reference model of the KL term, None where it is off."""
    if not config.learner.algo.kl.coefficient:
        return None
    return Reference(
        lambda: load_backend(config),
        temperature=config.sampling.temperature,
        pack_tokens=config.learner.optimizer.micro_batch_tokens,
    )
