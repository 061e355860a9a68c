"""Reading `task.options`: a typo is named."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, cast


def checked(kind: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options over their defaults; `...` as a default: it must be given.

    Raises:
        ValueError: an unknown option, or one that is missing.
    """
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; {kind} has {', '.join(known)}")
    merged = {**known, **options}
    missing = [name for name, value in merged.items() if value is ...]
    if missing:
        raise ValueError(f"{kind} needs the option {missing[0]}")
    return merged


def installed(module: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        ValueError: it is not there; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} cannot be imported: pip install 'lagwise[{extra}]'") from error


def function(path: str) -> Callable[..., Any]:
    """Return the function at `package.module:name`.

    Raises:
        ValueError: there is none.
    """
    module_name, _, name = path.partition(":")
    try:
        found: object = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from error
    if not callable(found):
        raise ValueError(f"{path}: no such function; write package.module:name")
    return cast("Callable[..., Any]", found)
