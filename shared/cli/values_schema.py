"""`python -m shared.cli.values_schema --check|--write`: the chart's schema, from the models.

`config:` comes from the services' own configuration models, the rest from `chart_values`. What
spans several values and can be said in JSON schema is added here, so that `helm lint` refuses it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from shared.cli.chart_values import ChartValues
from shared.cli.config_cmd import CONFIG_CLASSES
from shared.cli.generated import Render, command

FILE = Path("charts/lagwise/values.schema.json")
ELASTIC = ("rollout", "env_agents", "logit_oracle")
"""Roles with more than one pod."""

Schema = dict[str, Any]


def schema() -> Schema:
    """Return the schema of a values file."""
    root = ChartValues.model_json_schema()
    definitions = cast(Schema, root.pop("$defs", {}))
    config: Schema = {"type": "object", "additionalProperties": False, "properties": {}}
    for role, class_name in CONFIG_CLASSES.items():
        module = importlib.import_module(f"services.{role}.config")
        of_role = cast("type[BaseModel]", getattr(module, class_name)).model_json_schema()
        definitions |= cast(Schema, of_role.pop("$defs", {}))
        config["properties"] |= of_role["properties"]
    config["description"] = "The run: what `lagwise up` reads on a laptop."
    root["properties"] |= {
        "config": config,
        "global": {"type": "object", "description": "Helm's own, when this is a subchart."},
    }
    root["required"] = ["config"]
    root["allOf"] = _rules()
    cleaned = cast(Schema, _cleaned({**root, "$defs": definitions}))
    return {"$schema": "http://json-schema.org/draft-07/schema#", **cleaned}


def render() -> str:
    """Return the file's content."""
    return json.dumps(schema(), indent=1, sort_keys=True) + "\n"


def _rules() -> list[Schema]:
    """What one value means for another."""
    return [
        _when(("autoscaling", "mode"), ["external", "hpa", "keda"],
              *(((role, "replicas"), {"type": "null"}) for role in ELASTIC)),
        _when(("autoscaling", "mode"), ["hpa", "keda"],
              (("monitoring", "prometheusRule", "enabled"), {"const": True})),
        _when(("autoscaling", "mode"), ["keda"],
              (("autoscaling", "prometheusAddress"), {"minLength": 1})),
        _when(("huggingface", "offline"), [True], (("modelCache", "claim"), {"minLength": 1})),
        _when(("learner", "nodes"), {"minimum": 2},
              (("learner", "storage", "existingClaim"), {"minLength": 1})),
        _when(("nats", "enabled"), [False], (("nats", "external", "url"), {"minLength": 1})),
        _when(("nats", "enabled"), [True], (("nats", "external", "url"), {"maxLength": 0})),
        _when(("nats", "external", "auth"), ["password", "creds"],
              (("nats", "external", "secretName"), {"minLength": 1}),
              also=(("nats", "enabled"), [False])),
    ]  # fmt: skip


def _when(
    path: tuple[str, ...],
    is_so: list[Any] | Schema,
    *then: tuple[tuple[str, ...], Schema],
    also: tuple[tuple[str, ...], list[Any]] | None = None,
) -> Schema:
    rule = {"enum": is_so} if isinstance(is_so, list) else is_so
    conditions = [_at(path, rule, required=True)]
    if also is not None:
        conditions.append(_at(also[0], {"enum": also[1]}, required=True))
    return {"if": {"allOf": conditions}, "then": {"allOf": [_at(p, rule) for p, rule in then]}}


def _at(path: tuple[str, ...], rule: Schema, *, required: bool = False) -> Schema:
    for part in reversed(path):
        rule = {"properties": {part: rule}}
        if required:
            rule["required"] = [part]
    return rule


def _cleaned(node: Any) -> Any:
    """Drop what only clutters, and say tuples the way draft 7 does."""
    if isinstance(node, list):
        return [_cleaned(item) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    kept: Schema = {}
    for key, value in cast(Schema, node).items():
        if key in ("default", "discriminator") or (key == "title" and isinstance(value, str)):
            continue
        if key in ("properties", "$defs"):
            kept[key] = {name: _cleaned(child) for name, child in value.items()}
        elif key == "prefixItems":
            kept["items"], kept["additionalItems"] = _cleaned(value), False
        elif key in ("const", "enum"):
            kept[key] = value
        else:
            kept[key] = _cleaned(value)
    return kept


FILES: dict[Path, Render] = {FILE: lambda _: render()}

if __name__ == "__main__":
    sys.exit(command("shared.cli.values_schema", FILES))
