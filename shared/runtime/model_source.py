"""Where a model comes from: `hf://org/name@revision`, `pvc://claim/path` or a path.

`python -m shared.runtime.model_source SOURCE FOLDER [--files all|config]` puts a model of the hub
into a folder, once: what an init container does before a service starts. The services themselves
read folders and nothing else.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.runtime.errors import ConfigError
from shared.runtime.signals import leave_at_sigterm

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Configuration and tokenizer: all that a service needs whose weights come over the bus."""
MARKER = ".lagwise-source"
"""Names the source a folder was filled from; written last, so that half a download is none."""

Files = Literal["all", "config"]


@dataclass(frozen=True, slots=True)
class HubSource:
    """A model of the Hugging Face hub."""

    repository: str
    revision: str


@dataclass(frozen=True, slots=True)
class ClaimSource:
    """A folder of a PersistentVolumeClaim, which the chart mounts."""

    claim: str
    folder: str


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder that is there already."""

    path: str


def parse(source: str) -> HubSource | ClaimSource | FolderSource:
    """Read `model.source`.

    Raises:
        ConfigError: neither of the three forms; one line with an example.
    """
    scheme, separator, rest = source.partition("://")
    if not separator:
        if not source:
            raise ConfigError(
                "model.source is empty: hf://org/name@revision, pvc://claim/path, /path"
            )
        return FolderSource(source)
    match scheme:
        case "hf":
            repository, _, revision = rest.partition("@")
            if not _HUB.fullmatch(repository):
                raise ConfigError(f"model.source {source}: write it as hf://org/name@revision")
            if not revision:
                raise ConfigError(
                    f"model.source {source}: name a revision, hf://{repository}@<commit>: a branch "
                    "that moves would give two pods two models"
                )
            return HubSource(repository, revision)
        case "pvc":
            claim, _, folder = rest.partition("/")
            if not _CLAIM.fullmatch(claim) or ".." in folder.split("/"):
                raise ConfigError(f"model.source {source}: write it as pvc://claim/path")
            return ClaimSource(claim, folder.strip("/"))
        case _:
            raise ConfigError(
                f"model.source {source}: {scheme}:// is not known; hf://org/name@revision, "
                "pvc://claim/path or a path"
            )


def fetch(source: HubSource, folder: Path, files: Files) -> bool:
    """Fill `folder` from the hub; False when it was filled from the same source before.

    Raises:
        ConfigError: the hub does not answer, refuses, or has no such model; offline and not cached.
    """
    wanted = f"{source.repository}@{source.revision} {files}\n"
    marker = folder / MARKER
    if marker.is_file() and marker.read_text() in (wanted, wanted.replace(" config\n", " all\n")):
        return False
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*SMALL_FILES, *(WEIGHTS if files == "all" else ())]
    try:
        snapshot_download(
            source.repository, revision=source.revision, local_dir=folder, allow_patterns=patterns
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.source hf://{source.repository}@{source.revision}: {problem} (token in "
            "HF_TOKEN? egress to the hub? or use pvc://claim/path)"
        ) from error
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.source hf://{source.repository}: has no config.json")
    marker.write_text(wanted)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch; exit code 2 with one line when that cannot be done."""
    parser = argparse.ArgumentParser(prog="model_source", description=__doc__)
    parser.add_argument("source", help="hf://org/name@revision")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", choices=("all", "config"), default="all")
    given = parser.parse_args(argv)
    leave_at_sigterm(143)  # half a download is none: whoever comes next begins anew
    try:
        source = parse(given.source)
        if not isinstance(source, HubSource):
            raise ConfigError(f"model.source {given.source}: only hf:// has to be fetched")
        given.folder.mkdir(parents=True, exist_ok=True)
        fetched = fetch(source, given.folder, given.files)
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"lagwise model_source: {error}\n")
        return 2
    sys.stderr.write(f"{given.folder}: {'fetched' if fetched else 'already there'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
