"""Files that code writes: what all of their `--check|--write` commands have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Render = Callable[[str], str]
"""Present content of the file (empty when there is none) -> wanted content."""


def between(begin: str, end: str, body: str) -> Render:
    """Return a renderer that renews one marked part of a document, appended where there is none."""

    def merged(document: str) -> str:
        head, _, rest = document.partition(begin)
        tail = rest.partition(end)[2]
        return f"{head.rstrip()}\n\n{begin}\n\n{body.strip()}\n\n{end}{tail.rstrip()}\n"

    return merged


def stale(files: Mapping[Path, Render]) -> list[Path]:
    """Return the files whose content is not what the code would write."""
    return [path for path, render in files.items() if render(_read(path)) != _read(path)]


def command(module: str, files: Mapping[Path, Render], argv: Sequence[str] | None = None) -> int:
    """Check (exit 1 when stale) or write."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="fail when a file is stale")
    mode.add_argument("--write", action="store_true", help="renew the files")
    if parser.parse_args(argv).write:
        for path, render in files.items():
            content = render(_read(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return 0
    old = stale(files)
    for path in old:
        sys.stderr.write(f"{path} is stale: run `python -m {module} --write`\n")
    return 1 if old else 0


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
