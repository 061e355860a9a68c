"""Section `trackers`: where a run's figures go beside Prometheus. The recorder writes them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorboardTracker(_Strict):
    """Event files; needs the extra `tensorboard`."""

    dir: str = ""
    """Folder of the event files; empty: `<run.dir>/tensorboard`."""


class WandbTracker(_Strict):
    """A Weights & Biases run; needs the extra `wandb`. The key comes as WANDB_API_KEY."""

    project: str = Field(min_length=1)
    mode: Literal["offline", "online"] = "offline"
    """offline: files below `<run.dir>/wandb`, without a network; `wandb sync` uploads them."""
    entity: str = ""
    """Team or user; empty: the key's default."""
    group: str = ""
    tags: tuple[str, ...] = ()


class TrackersSection(_Strict):
    """Where the figures of steps and evaluations go beside Prometheus, by version."""

    tensorboard: TensorboardTracker | None = None
    """`{}` switches it on."""
    wandb: WandbTracker | None = None
    timeout_s: float = Field(default=30.0, gt=0)
    """A tracker that has not written a point for so long is reported as hanging."""
