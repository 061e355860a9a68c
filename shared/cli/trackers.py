"""Trackers: TensorBoard and Weights & Biases behind one Protocol, made from section `trackers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from shared.cli.tracked_points import Point
from shared.runtime.errors import ConfigError
from shared.runtime.sections import CommonConfig


class Tracker(Protocol):
    """One destination. Called from one thread; may raise anything, and may hang."""

    def write(self, point: Point, number: int) -> None:
        """Write a point and hand it to the disk or the network.

        Args:
            point: scalars of a version.
            number: of the point in this run, ascending over restarts.
        """
        ...

    def close(self) -> None:
        """Finish; nothing is written after it."""
        ...


Open = Callable[[], Tracker]
"""Opens a tracker for writing; called in its thread."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tracker that the configuration asks for."""

    name: str
    open: Open


def wanted(common: CommonConfig, config: Mapping[str, Any]) -> list[Wanted]:
    """Return the trackers to write, not opened yet.

    Args:
        common: of the run.
        config: the whole resolved `config:`, which trackers show beside the figures.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    section, run = common.trackers, common.run
    check_installed(common)
    found: list[Wanted] = []
    if (tensorboard := section.tensorboard) is not None:

        def open_tensorboard() -> Tracker:
            from shared.cli.tracker_tensorboard import TensorboardEvents

            folder = Path(tensorboard.dir or Path(run.dir) / "tensorboard")
            return TensorboardEvents(folder, config)

        found.append(Wanted("tensorboard", open_tensorboard))
    if (wandb := section.wandb) is not None:

        def open_wandb() -> Tracker:
            from shared.cli.tracker_wandb import WandbRun

            return WandbRun(wandb, run.name, Path(run.dir), config)

        found.append(Wanted("wandb", open_wandb))
    return found


def check_installed(common: CommonConfig) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        ConfigError: naming the key and the extra.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(common.trackers, name) is not None and find_spec(name) is None:
            raise ConfigError(
                f"`trackers.{name}`: the package {name} is not installed: "
                f"pip install 'lagwise[{name}]', or take trackers.{name} out"
            )
