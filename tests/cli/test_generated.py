"""Files that code writes for the chart are what the code would write now."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from shared.cli import nats_accounts, values_schema
from shared.cli.chart_values import ChartValues
from shared.cli.config_cmd import CONFIG_CLASSES
from shared.cli.generated import between, command, stale

ROOT = Path(__file__).parents[2]


def test_the_schema_is_fresh():
    path = ROOT / values_schema.FILE
    assert path.read_text() == values_schema.render(), (
        "run `python -m shared.cli.values_schema --write`"
    )


def test_the_accounts_are_fresh_in_chart_and_documentation(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert stale(nats_accounts.FILES) == [], "run `python -m shared.cli.nats_accounts --write`"


def test_a_stale_file_is_found_and_written_anew(tmp_path: Path, capsys):
    path = tmp_path / "generated.txt"
    path.write_text("old")
    files = {path: lambda _: "new"}
    assert command("some.module", files, ["--check"]) == 1
    assert "python -m some.module --write" in capsys.readouterr().err
    assert command("some.module", files, ["--write"]) == 0
    assert command("some.module", files, ["--check"]) == 0


def test_a_marked_part_is_renewed_and_the_rest_stays():
    render = between("<b>", "<e>", "body")
    once = render("# Title\n\ntext\n")
    assert once == "# Title\n\ntext\n\n<b>\n\nbody\n\n<e>\n"
    assert render(once) == once
    assert render(once.replace("body", "stale") + "\nafter\n").endswith("<e>\n\nafter\n")


def test_every_section_of_every_service_is_in_the_schema_and_closed():
    schema = json.loads((ROOT / values_schema.FILE).read_text())
    config = schema["properties"]["config"]
    assert set(CONFIG_CLASSES) <= config["properties"].keys()
    assert config["additionalProperties"] is False
    objects = [d for d in schema["$defs"].values() if d.get("type") == "object"]
    assert len(objects) > 25
    assert all(d["additionalProperties"] is False for d in objects)


def test_the_charts_defaults_satisfy_the_models_but_for_the_registry():
    values = yaml.safe_load((ROOT / "charts/lagwise/values.yaml").read_text())
    values.pop("config")
    values["image"]["registry"] = "registry.example.com"
    ChartValues.model_validate(values)


def test_every_key_of_the_models_stands_in_the_charts_defaults():
    """So that `helm show values` is complete; what must stay unset is a comment there."""
    values = yaml.safe_load((ROOT / "charts/lagwise/values.yaml").read_text())
    unset = {"replicas", "terminationGracePeriodSeconds", "extraEnv", "extraVolumes",
             "extraVolumeMounts"}  # fmt: skip
    for name, field in ChartValues.model_fields.items():
        assert name in values, name
        fields = getattr(field.annotation, "model_fields", {})
        missing = fields.keys() - values[name].keys() - unset if fields else set()
        assert not missing, (name, missing)
