"""One configuration story: the `config:` subtree of a Helm values file, laptop to cluster.

Precedence: `--set a.b=c` over `LAGWISE_A__B` over `--config FILE` over defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ValidationError

from shared.runtime.errors import ConfigError
from shared.runtime.sections import CommonConfig

SERVICE_SECTIONS = ("learner", "rollout", "env_agents", "logit_oracle")
"""Sections that belong to one service each; the others pass them by unread."""

ROLES = SERVICE_SECTIONS
"""Top-level keys beside `config:` in a values file, holding `replicas`."""

C = TypeVar("C", bound=CommonConfig)


def read_values(path: Path) -> dict[str, Any]:
    """Read a values file.

    Raises:
        ConfigError: unreadable, not YAML, or without a `config:` mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"config file {path}: not YAML: {problem}") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("config"), dict):
        raise ConfigError(f"config file {path}: needs a top-level mapping `config:`")
    return cast("dict[str, Any]", loaded)


def resolve(
    tree: Mapping[str, Any], overrides: Iterable[str], environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Lay environment variables and `--set` overrides over a `config:` tree.

    Raises:
        ConfigError: an override without `=`, or one that descends into a scalar.
    """
    resolved = cast("dict[str, Any]", yaml.safe_load(yaml.safe_dump(dict(tree))))
    for name, value in sorted((os.environ if environ is None else environ).items()):
        if name.startswith("LAGWISE_") and "__" in name:
            path = name.removeprefix("LAGWISE_").lower().split("__")
            _assign(resolved, path, value, origin=name)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override}: write it as a.b=value")
        _assign(resolved, key.strip().split("."), value, origin=f"--set {override}")
    return resolved


def load(model: type[C], tree: Mapping[str, Any], *, origin: str = "config") -> C:
    """Validate a resolved tree for one service.

    Other services' sections are left to them; anything else unknown is refused.

    Raises:
        ConfigError: one line that names every offending key.
    """
    foreign = set(SERVICE_SECTIONS) - set(model.model_fields)
    own = {key: value for key, value in tree.items() if key not in foreign}
    try:
        return model.model_validate(own)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """Return one line naming every offending key of a validation error."""
    problems: list[str] = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems.append(f"`{where}` is not a known key")
        elif problem["type"] == "union_tag_invalid":
            context = problem.get("ctx", {})
            names = str(context.get("expected_tags")).replace("'", "")
            problems.append(f"`{where}`: kind {context.get('tag')!r} is none of {names}")
        else:
            message = str(problem["msg"]).removeprefix("Value error, ")
            shown = problem["input"]
            given = f" (got {shown!r})" if isinstance(shown, str | int | float) else ""
            problems.append(f"`{where}`: {message}{given}" if where else message)
    return "; ".join(problems)


def _assign(tree: dict[str, Any], path: list[str], value: str, *, origin: str) -> None:
    node = tree
    for part in path[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{origin}: `{part}` is a value, not a section")
        node = cast("dict[str, Any]", child)
    try:
        node[path[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        node[path[-1]] = value
