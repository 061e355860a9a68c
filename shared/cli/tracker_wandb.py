"""Weights & Biases: one run per training run, offline or online; the x axis is the version."""

# pyright: reportMissingImports=false
from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.cli.tracked_points import Point
from shared.runtime.trackers_section import WandbTracker

_RUN_ID = "run_id"


class WandbRun:
    """A run whose id outlives the process: it is kept in `<run dir>/wandb/run_id`."""

    def __init__(
        self, section: WandbTracker, name: str, run_dir: Path, config: Mapping[str, Any]
    ) -> None:
        """Begin or rejoin the run; online this asks the server."""
        import wandb

        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=section.project,
            entity=section.entity or None,
            group=section.group or None,
            tags=list(section.tags) or None,
            name=name,
            id=_run_id(folder / _RUN_ID),
            resume="allow" if section.mode == "online" else None,
            mode=section.mode,
            dir=str(run_dir),
            config=dict(config),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
            ),
        )
        self._run.define_metric("version")
        self._run.define_metric("*", step_metric="version")

    def write(self, point: Point, number: int) -> None:
        """Log the scalars; `number` is W&B's own step, which may only grow."""
        self._run.log({**point.scalars, "version": point.version}, step=number, commit=True)

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()
