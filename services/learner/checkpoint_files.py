"""What a checkpoint says of itself, and the digests that tell a whole one from a damaged one.

`learner.json` in a checkpoint's folder:
`{"facts": {...}, "files": {relative path: sha256}, "sha256": of both}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from shared.runtime.disk import sync

FACTS_FILE = "learner.json"


@dataclass(frozen=True)
class Facts:
    """Where the learner stood."""

    run: str
    """Identity of the run: incarnation of the process that began it."""
    version: int
    digest: str
    """Of the policy version it holds; checked after loading."""
    optimizer_steps: int
    floors: dict[str, int]
    """Stream -> lowest sequence that a replay from here may still need."""
    skips_in_a_row: int = 0
    """Optimizer steps since the last one that was applied."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    facts: Facts
    files: Mapping[str, str]
    """Path in the folder -> sha256."""

    @property
    def version(self) -> int:
        return self.facts.version

    def check(self) -> None:
        """Read every file and compare.

        Raises:
            ValueError: a file is missing, unreadable or not the one that was written; one line.
        """
        for name, digest in self.files.items():
            try:
                found = _sha256(self.path / name)
            except OSError as error:
                raise ValueError(f"{name}: {error.strerror or error}") from error
            if found != digest:
                raise ValueError(f"{name}: its content is not what was written")


def seal(folder: Path, facts: Facts) -> Checkpoint:
    """Write the facts beside everything that lies in `folder`, and flush all of it to the disk."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    files = {name: _sha256(folder / name) for name in names}
    content: dict[str, Any] = {"facts": asdict(facts), "files": files}
    path = folder / FACTS_FILE
    path.write_text(json.dumps({**content, "sha256": _own_digest(content)}, indent=1) + "\n")
    for name in (*names, FACTS_FILE):
        sync(folder / name)
    for inner in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(inner)
    return Checkpoint(folder, facts, files)


def read(folder: Path) -> Checkpoint:
    """Read what a checkpoint says of itself; its files are not looked at.

    Raises:
        ValueError: the facts are missing or damaged; one line.
    """
    try:
        content = cast("dict[str, Any]", json.loads((folder / FACTS_FILE).read_text()))
        own = content.pop("sha256")
        if own != _own_digest(content):
            raise ValueError("its content is not what was written")
        return Checkpoint(folder, Facts(**content["facts"]), dict(content["files"]))
    except OSError as error:
        raise ValueError(f"{FACTS_FILE}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{FACTS_FILE}: {' '.join(str(error).split())}") from error


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
