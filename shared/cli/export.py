"""`lagwise export`: a published version of a run as a Hugging Face directory.

The archive holds every version's tensors under their Hugging Face names; what else a directory
needs (config, tokenizer, generation config) is the model's that the run began with. Tensors stream
from file to file: no model is built, and none has to fit into memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml

from shared.cli.archive import archive_dir
from shared.runtime.errors import ConfigError


def run(run_dir: Path, out: Path, *, version: int | None, source: Path | None = None) -> str:
    """Write `out`; return what was written, in one line.

    Args:
        run_dir: of the run.
        out: a new directory; one that exists is refused.
        version: None is the newest one.
        source: the directory that the run began with; None: as its configuration says.

    Raises:
        ConfigError: no such version, no such source, `out` exists, or the two do not belong
            together.
    """
    from shared.backends.hf_files import HfFiles, write_hf  # torch: only when it is needed

    found = versions(run_dir)
    if not found:
        raise ConfigError(f"{run_dir} has no archived versions")
    chosen = max(found) if version is None else version
    if chosen not in found:
        raise ConfigError(
            f"version {chosen} is not archived: {run_dir} has {min(found)} to {max(found)}"
        )
    if out.exists():
        raise ConfigError(f"{out} exists: name a new directory")
    origin = source or _source(run_dir)
    if not (origin / "config.json").is_file():
        raise ConfigError(f"{origin} is no Hugging Face directory: name the run's with --source")
    try:
        weights, theirs = HfFiles(found[chosen].parent, found[chosen].stem), HfFiles(origin)
        tied = [name for name in theirs.names if name not in weights.names]
        weights.check({name: theirs.shape(name) for name in theirs.names - set(tied)})
        dtype = weights.read(next(iter(weights.names))).dtype
        out.parent.mkdir(parents=True, exist_ok=True)
        write_hf(out, origin, weights.tensors(), dtype=dtype)
    except (ValueError, OSError) as error:
        raise ConfigError(f"export of version {chosen}: {error}") from error
    return f"{out}: version {chosen}, {len(weights.names)} tensors, {dtype}"


def versions(run_dir: Path) -> dict[int, Path]:
    """Return the archived versions' files."""
    folder = archive_dir(run_dir) / "versions"
    return {int(p.stem): p for p in folder.glob("*.safetensors") if p.stem.isdigit()}


def _source(run_dir: Path) -> Path:
    try:
        tree = cast("dict[str, Any]", yaml.safe_load((run_dir / "resolved.yaml").read_text()))
        return Path(str(tree.get("config", tree)["model"]["source"]))
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{run_dir}/resolved.yaml names no model.source: name it with --source"
        ) from error
