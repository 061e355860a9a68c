"""`lagwise config check|show`, and the plan of processes that a values file asks for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from shared.cli.model_check import check_model
from shared.cli.trackers import check_installed
from shared.runtime.config import ROLES, load, read_values, resolve
from shared.runtime.errors import ConfigError
from shared.runtime.sections import CommonConfig
from shared.wire.subjects import Subjects

CONFIG_CLASSES: dict[str, str] = {
    "learner": "LearnerConfig",
    "rollout": "RolloutConfig",
    "env_agents": "EnvAgentsConfig",
    "logit_oracle": "LogitOracleConfig",
}
"""Class in `services/<role>/config.py` that validates what the role reads."""

_DEFAULT_REPLICAS = 1
_RANKED = ("learner", "logit_oracle")
"""Roles that may be several processes over `model.layout`."""
_ROLE_SECTIONS = set(ROLES)


@dataclass(frozen=True)
class Values:
    """A values file after overrides."""

    path: Path
    tree: dict[str, Any]
    """The whole file, `config:` resolved."""

    @property
    def config(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self.tree["config"])

    @property
    def replicas(self) -> dict[str, int]:
        """Processes per role."""
        counts: dict[str, int] = {}
        for role in ROLES:
            section = self.tree.get(role) or {}
            given = section.get("replicas")
            counts[role] = _DEFAULT_REPLICAS if given is None else given
        return counts

    def with_config(self, section: str, **settings: Any) -> Values:
        """Return a copy with settings of one section of `config:` replaced."""
        merged = {**(self.config.get(section) or {}), **settings}
        config = {**self.config, section: merged}
        return Values(self.path, {**self.tree, "config": config})

    def with_replicas(self, role: str, count: int) -> Values:
        """Return a copy with another number of processes of a role."""
        section = {**(self.tree.get(role) or {}), "replicas": count}
        return Values(self.path, {**self.tree, role: section})

    def with_ranks_of_gpus(self) -> Values:
        """Return a copy in which roles of several GPUs are as many processes, as the chart does."""
        values = self
        for role in _RANKED:
            section = self.tree.get(role) or {}
            gpus = (section.get("nodes") or 1) * ((section.get("gpu") or {}).get("count") or 0)
            if gpus and (self.config.get(role) or {}).get("ranks") is None:
                values = values.with_config(role, ranks=gpus)
        return values

    def common(self) -> CommonConfig:
        """Return what every service reads, validated."""
        shared = {k: v for k, v in self.config.items() if k not in _ROLE_SECTIONS}
        return load(CommonConfig, shared, origin=str(self.path))


def read(path: Path, overrides: Iterable[str] = ()) -> Values:
    """Read and resolve a values file; services' sections are not validated yet.

    Overrides are settings of `config:`, and `<role>.replicas`, which stands beside it.

    Raises:
        ConfigError: one line naming file and key.
    """
    tree = read_values(path)
    replicas, settings = _split(overrides)
    for role, count in replicas.items():
        section = tree.get(role) or {}
        if isinstance(section, dict):
            tree[role] = {**section, "replicas": count}
    for key in tree:
        near = difflib.get_close_matches(str(key), (*ROLES, "config"), n=1, cutoff=0.75)
        if near and key not in (*ROLES, "config"):
            raise ConfigError(f"config file {path}: `{key}` is not a known key; meant {near[0]}?")
    for role in ROLES:
        _check_role(path, role, tree.get(role))
    return Values(path, {**tree, "config": resolve(tree["config"], settings)})


def validate(values: Values) -> dict[str, CommonConfig]:
    """Validate every service's section and what spans sections; return the models by role.

    Where the model lies on this machine, its `config.json` is asked, too.

    Raises:
        ConfigError: one line naming file and key.
    """
    models: dict[str, CommonConfig] = {}
    for role, class_name in CONFIG_CLASSES.items():
        module = importlib.import_module(f"services.{role}.config")
        model = cast("type[CommonConfig]", getattr(module, class_name))
        if role == "logit_oracle" and not values.replicas[role]:
            values = _without_oracle(values)
        models[role] = load(model, values.config, origin=f"config file {values.path}")
    try:
        Subjects(models["learner"].run.name)
    except ValueError as error:
        raise ConfigError(f"config file {values.path}: `run.name`: {error}") from error
    if "oracle" in models["learner"].old_logprobs.shadow and not values.replicas["logit_oracle"]:
        raise ConfigError(
            f"config file {values.path}: `old_logprobs.shadow`: oracle looks on only where one "
            "runs: set logit_oracle.replicas to 1 or more, or use snapshot_old"
        )
    ranks = {r: int(getattr(models[r], r).ranks) for r in _RANKED if values.replicas[r]}
    sampling = cast("Any", models["rollout"]).rollout
    engine_ranks = sampling.vllm.tensor_parallel_size if sampling.engine == "vllm" else 1
    try:
        check_model(models["learner"].model, ranks, engine_ranks=engine_ranks)
    except ValueError as error:
        raise ConfigError(f"config file {values.path}: {error}") from error
    return models


def _without_oracle(values: Values) -> Values:
    """Return values whose oracle, which nobody starts, is laid out as the learner is."""
    ranks = {role: (values.config.get(role) or {}).get("ranks") for role in _RANKED}
    if ranks["logit_oracle"] is None and ranks["learner"] is not None:
        return values.with_config("logit_oracle", ranks=ranks["learner"])
    return values


def effective(values: Values) -> dict[str, Any]:
    """Return the `config:` tree with every default filled in, all services together."""
    tree: dict[str, Any] = {}
    for model in validate(values).values():
        tree.update(model.model_dump(mode="json"))
    return tree


def check_model_directory(values: Values) -> None:
    """Refuse to start processes without their model, archive or trackers' packages.

    Raises:
        ConfigError: naming the folder or the key.
    """
    common = values.common()
    if "://" in common.model.source:
        raise ConfigError(
            f"config file {values.path}: `model.source`: {common.model.source} is for a cluster; "
            "here fetch it (python -m shared.runtime.model_source SOURCE FOLDER), name the folder"
        )
    if not common.run.archive:
        raise ConfigError(
            f"config file {values.path}: `run.archive`: must be true here: report and audit of "
            "`lagwise up` read the archive (--set run.archive=true)"
        )
    try:
        check_installed(common)
    except ConfigError as error:
        raise ConfigError(f"config file {values.path}: {error}") from error
    source = Path(common.model.source)
    if not (source / "config.json").is_file():
        what = "has no config.json" if source.is_dir() else "does not exist"
        raise ConfigError(
            f"config file {values.path}: `model.source`: {source} {what}; "
            "it must be a Hugging Face model directory"
        )


def _split(overrides: Iterable[str]) -> tuple[dict[str, object], list[str]]:
    """Return the numbers of processes by role, and the overrides that are none."""
    replicas: dict[str, object] = {}
    settings: list[str] = []
    for override in overrides:
        key, given, value = override.partition("=")
        role, _, rest = key.partition(".")
        if given and rest == "replicas" and role in ROLES:
            replicas[role] = yaml.safe_load(value)
        else:
            settings.append(override)
    return replicas, settings


def _check_role(path: Path, role: str, section: object) -> None:
    if section is None:
        return
    if not isinstance(section, Mapping):
        raise ConfigError(f"config file {path}: `{role}` must be a mapping with `replicas`")
    replicas = cast("Mapping[str, object]", section).get("replicas")
    if replicas is None:  # unset: somebody else decides on a cluster, one process here
        return
    if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 0:
        raise ConfigError(
            f"config file {path}: `{role}.replicas`: a whole number >= 0 (got {replicas!r})"
        )
    if role == "learner" and replicas != 1:
        raise ConfigError(f"config file {path}: `learner.replicas`: must be 1 (got {replicas})")
