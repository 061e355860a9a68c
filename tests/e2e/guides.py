"""The files that docs/train_your_agent.md asks its reader to write."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "train_your_agent.md"


def files() -> dict[str, str]:
    """Return content by name: blocks whose first line is `# file: NAME`."""
    blocks = re.findall(r"^```\w+\n# file: (\S+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return dict(blocks)


def write(folder: Path) -> None:
    for name, content in files().items():
        (folder / name).write_text(content)
