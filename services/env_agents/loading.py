"""The user's classes, by import path, checked at start rather than in the first episode."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, cast

from services.env_agents.environment import Environment
from services.env_agents.renderer import ConversationRenderer, Renderer
from shared.runtime.errors import ConfigError

ENVIRONMENT_METHODS = {"reset": True, "step": True, "task_digest": False, "close": True}
"""Name -> is it `async def`."""

RENDERER_METHODS = {"prompt": False, "observation": False, "decode": False}
"""Of a renderer that does not look back; one that does has `conversation` instead."""


def environment_class(path: str, options: Mapping[str, Any]) -> type[Environment]:
    """Import an Environment and try it on `options`.

    Raises:
        ConfigError: it cannot be imported, lacks a method, or refuses the options.
    """
    found = _load("task.environment", path, ENVIRONMENT_METHODS)
    try:
        found(options)
    except Exception as error:
        raise ConfigError(
            f"task.environment {path}: refuses task.options: {type(error).__name__}: {error}"
        ) from error
    return cast("type[Environment]", found)


def renderer(
    path: str, model_dir: str, options: Mapping[str, Any]
) -> Renderer | ConversationRenderer:
    """Import a renderer and make it for the model in `model_dir`.

    Args:
        path: `task.renderer`.
        model_dir: `model.source`.
        options: `task.renderer_options`.

    Raises:
        ConfigError: it cannot be imported, lacks a method, or cannot be made.
    """
    found = _load("task.renderer", path, {})
    if not callable(getattr(found, "conversation", None)):
        _check_methods("task.renderer", path, found, RENDERER_METHODS)
    try:
        made = found(model_dir, options)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"task.renderer {path}: cannot be made for model.source {model_dir}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(getattr(made, "stop_ids", None), tuple):
        raise ConfigError(f"task.renderer {path}: has no tuple `stop_ids`")
    return cast("Renderer | ConversationRenderer", made)


def _load(key: str, path: str, methods: Mapping[str, bool]) -> Any:
    module_name, separator, class_name = path.partition(":")
    if not separator or not module_name or not class_name:
        raise ConfigError(f"{key} {path}: write it as package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{key} {path}: importing {module_name} failed: {type(error).__name__}: {error} "
            "(is its folder on PYTHONPATH?)"
        ) from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        raise ConfigError(f"{key} {path}: {module_name} has no class {class_name}")
    _check_methods(key, path, found, methods)
    return found


def _check_methods(key: str, path: str, found: type, methods: Mapping[str, bool]) -> None:
    for name, is_async in methods.items():
        method = getattr(found, name, None)
        if not callable(method):
            raise ConfigError(f"{key} {path}: has no method `{name}`")
        if is_async and not inspect.iscoroutinefunction(method):
            raise ConfigError(f"{key} {path}: `{name}` must be `async def`")
