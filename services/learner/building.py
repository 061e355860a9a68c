"""What a learner is made of, from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import cast

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
from shared.backends.building import BackendSpec
from shared.backends.expert_layers import replayed
from shared.backends.rank_commands import RanksFailed
from shared.backends.ranks import Ranks, open_ranks
from shared.runtime.context import Context
from shared.runtime.errors import ConfigError, Fatal


def meet_ranks(config: LearnerConfig) -> Ranks:
    """Meet the other ranks, of which this process is the first.

    Raises:
        ConfigError: another number of processes was started, or a device is missing.
        Fatal: the others did not come.
    """
    model = config.model
    try:
        return open_ranks(
            config.learner.ranks,
            key="learner.ranks",
            device=model.device,
            timeout_s=model.rank_timeout_s,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except RanksFailed as error:
        raise Fatal(f"{error} (model.rank_timeout_s)") from error


def load_backend(config: LearnerConfig, ranks: Ranks, *, trains: bool = True) -> Backend:
    """Build the backend on all ranks and load the model directory; False: one that only scores.

    Raises:
        ConfigError: one line that names what is wrong with the directory.
        RanksFailed: a rank was lost.
    """
    optimizer = config.learner.optimizer
    adamw = AdamWSettings(betas=optimizer.betas, weight_decay=optimizer.weight_decay)
    try:
        backend = ranks.build(BackendSpec.of(config.model, adamw if trains else None))
        replayed(backend, config.model.routing)  # or it refuses now, in one line
        return backend
    except (ValueError, OSError) as error:
        text = str(error)
        raise ConfigError(text if text.startswith("model.") else f"model.source: {text}") from error


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
    context: Context,
    config: LearnerConfig,
    backend: Backend,
    positions: Positions,
    make_scorer: Callable[[], Backend],
) -> StepInputs:
    """Build the configured old-logit route, its shadows and the reference model.

    Args:
        context: of the process.
        config: of the run.
        backend: the weights being trained.
        positions: how far the logs have been read.
        make_scorer: makes further models of the same architecture, from the model directory.

    Raises:
        ConfigError: no such route.
    """
    section = config.old_logprobs
    at = RouteContext(
        backend=backend,
        make_scorer=make_scorer,
        bus=context.bus,
        log=context.log,
        weights=config.weights,
        section=section,
        temperature=config.sampling.temperature,
        pack_tokens=config.learner.optimizer.micro_batch_tokens,
        max_staleness=config.admission.max_staleness,
        replays=config.model.routing == "replay",
    )
    of_anchor = section.model_copy(update={"route": section.anchor, "fallback": ""})
    return StepInputs(
        _make_route(section.route, at),
        make_shadows(context, config, at),
        _make_reference(config, make_scorer),
        ScoreStore(context, backend, section.layout),
        positions,
        _make_route(section.anchor, replace(at, section=of_anchor)) if section.anchor else None,
    )


def make_shadows(context: Context, config: LearnerConfig, of_route: RouteContext) -> Shadows:
    """Build the routes that look on, each with its defaults and bounds of its own."""
    own = {
        "ewma": None,
        "fallback": "",
        "version_timeout_s": config.old_logprobs.shadow_timeout_s,
    }
    routes: list[OldLogprobRoute] = []
    for name in config.old_logprobs.shadow:
        section = config.old_logprobs.model_copy(update={**own, "route": name})
        at = replace(of_route, section=section)
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


def _make_reference(config: LearnerConfig, make: Callable[[], Backend]) -> Reference | None:
    """Return the reference model of the KL term, None where it is off."""
    if not config.learner.algo.kl.coefficient:
        return None
    return Reference(
        make,
        temperature=config.sampling.temperature,
        pack_tokens=config.learner.optimizer.micro_batch_tokens,
    )
