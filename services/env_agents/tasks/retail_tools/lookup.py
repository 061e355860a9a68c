"""Finding things in a domain's database, the way its tools say that they are not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.env_agents.tools import ToolFault


def entry(table: Mapping[str, Any], kind: str, key: str) -> Any:
    """Return what stands under a key.

    Raises:
        ToolFault: nothing does; names kind and key.
    """
    if key not in table:
        raise ToolFault(f"no {kind} {key}")
    return table[key]


def id_by_email(table: Mapping[str, Any], kind: str, email: str) -> str:
    """Return the id of the person with an email address.

    Raises:
        ToolFault: nobody has it.
    """
    for key, person in table.items():
        if person["email"] == email:
            return key
    raise ToolFault(f"no {kind} with email {email}")
