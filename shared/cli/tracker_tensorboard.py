"""TensorBoard event files: one scalar per name, steps are versions."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.cli.tracked_points import Point, flat

_CONFIG_TAG = "config"


class TensorboardEvents:
    """A folder of event files; every process writes one of its own, TensorBoard reads them all."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Open a file; the first one in the folder also gets the configuration as text."""
        from torch.utils.tensorboard import SummaryWriter

        first = not any(folder.glob("events.out.tfevents.*"))
        self._writer: Any = SummaryWriter(str(folder))
        if first:
            lines = [f"    {name}: {json.dumps(value)}" for name, value in flat(config)]
            self._writer.add_text(_CONFIG_TAG, "\n".join(lines), 0)
            self._writer.flush()

    def write(self, point: Point, number: int) -> None:
        """Append the scalars and flush them."""
        del number  # versions order the points
        for name, value in point.scalars.items():
            self._writer.add_scalar(name, value, point.version, walltime=point.at)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
