"""Bad configuration is one clear line that names file and key."""

import json
import re
from pathlib import Path

import pytest
import yaml

from shared.cli.config_cmd import (
    CONFIG_CLASSES,
    check_model_directory,
    effective,
    read,
    validate,
)
from shared.runtime.errors import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/frozen_lake/values.yaml"


def write(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"config": {"learner": {"versons": 3}}}, "`learner.versons` is not a known key"),
        ({"config": {"rollout": {"dtype": "int3"}}}, "`rollout.dtype`"),
        ({"config": {"admision": {}}}, "`admision` is not a known key"),
        ({"config": {"admission": {"max_staleness": -1}}}, "`admission.max_staleness`"),
        ({"config": {"run": {"name": "Not A Name"}}}, "`run.name`"),
        ({"config": {}, "rolout": {"replicas": 2}}, "`rolout` is not a known key; meant rollout?"),
        ({"config": {}, "rollout": {"replicas": "two"}}, "`rollout.replicas`"),
        ({"config": {}, "rollout": 3}, "`rollout` must be a mapping"),
        ({"config": {}, "learner": {"replicas": 2}}, "`learner.replicas`: must be 1"),
        (
            {
                "config": {"old_logprobs": {"route": "ewma_prox", "shadow": ["oracle"]}},
                "logit_oracle": {"replicas": 0},
            },
            "`old_logprobs.shadow`: oracle looks on only where one runs",
        ),
        ({"confg": {}}, "needs a top-level mapping `config:`"),
    ],
)
def test_one_line_names_file_and_key(tmp_path: Path, tree: object, said: str) -> None:
    path = write(tmp_path, tree)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        validate(read(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_role_has_a_configuration_model_with_its_section() -> None:
    models = validate(read(EXAMPLE))
    assert set(models) == set(CONFIG_CLASSES)
    assert all(role in type(model).model_fields for role, model in models.items())


def test_the_shipped_example_is_valid_and_asks_for_six_processes() -> None:
    values = read(EXAMPLE)
    assert values.replicas == {"learner": 1, "rollout": 2, "env_agents": 2, "logit_oracle": 1}
    assert values.common().admission.max_staleness == 4


def test_overrides_reach_the_resolved_tree_and_defaults_are_filled_in() -> None:
    values = read(EXAMPLE, ["learner.versions=7", "run.seed=3"])
    shown = effective(values)
    assert shown["learner"]["versions"] == 7
    assert shown["run"]["seed"] == 3
    assert shown["telemetry"]["lease_interval_s"] == 2.0


def test_processes_of_a_role_are_overridden_like_a_setting() -> None:
    values = read(EXAMPLE, ["logit_oracle.replicas=0", "old_logprobs.route=snapshot_old"])
    assert values.replicas == {"learner": 1, "rollout": 2, "env_agents": 2, "logit_oracle": 0}
    validate(values)
    for wrong in ("rollout.replicas=two", "rollout.replicas=-1", "learner.replicas=2"):
        with pytest.raises(ConfigError, match=r"`(rollout|learner)\.replicas`"):
            read(EXAMPLE, [wrong])


def test_keys_of_the_chart_pass_unread(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": {"tag": "x"}, "nats": {"enabled": True}, "config": {}})
    validate(read(path))


def test_a_missing_model_directory_is_named(tmp_path: Path) -> None:
    values = read(EXAMPLE, [f"model.source={tmp_path / 'nowhere'}"])
    with pytest.raises(ConfigError, match=r"model\.source.*nowhere does not exist"):
        check_model_directory(values)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_model_directory(read(EXAMPLE, [f"model.source={tmp_path}"]))


def test_a_copy_with_other_settings_leaves_the_original() -> None:
    values = read(EXAMPLE)
    other = values.with_config("bus", url="nats://x:1").with_replicas("rollout", 5)
    assert (other.config["bus"]["url"], other.replicas["rollout"]) == ("nats://x:1", 5)
    assert "bus" not in values.config
    assert values.replicas["rollout"] == 2


def test_what_only_a_cluster_can_do_is_refused_here_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"`model\.source`: hf://a/b@c is for a cluster"):
        check_model_directory(read(EXAMPLE, ["model.source=hf://a/b@c"]))
    with pytest.raises(ConfigError, match=r"`run\.archive`: must be true here"):
        check_model_directory(read(EXAMPLE, ["run.archive=false"]))


def test_a_number_of_pods_left_to_the_cluster_is_one_process_here(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text("rollout: {replicas: null}\nenv_agents: {gpu: {count: 0}}\nconfig: {}\n")
    assert read(path).replicas == {
        "learner": 1, "rollout": 1, "env_agents": 1, "logit_oracle": 1,
    }  # fmt: skip


def mixture(folder: Path, **more: object) -> str:
    """Return a folder that says it holds a mixture of 6 experts."""
    folder.mkdir()
    dense = json.loads((EXAMPLE.parent / "base/config.json").read_text())
    own = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2,
           "moe_intermediate_size": 8}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(dense | own | more))
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.layout.tp=2", "model.layout.sp=true"], ""),
        (["model.layout.tp=2"], "experts with tp 2 need sp: set it to true"),
        (["model.layout.ep=4"], "ep 4 does not divide num_experts 6"),
        (["model.layout.pp=4"], "pp 4 does not divide num_hidden_layers 2"),
        (["logit_oracle.ranks=3", "model.layout.ep=2"], "ep 2 does not divide the 3 ranks"),
    ],
)
def test_a_layout_that_the_model_here_cannot_have_is_refused(
    tmp_path: Path, settings: list[str], said: str
) -> None:
    source = f"model.source={mixture(tmp_path / 'moe')}"
    ranks = ["learner.ranks=4", "logit_oracle.ranks=4"]
    values = read(EXAMPLE, [source, "model.backend=megatron", *ranks, *settings])
    if not said:
        validate(values)
        return
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        validate(values)
    assert "\n" not in str(caught.value)


def test_replay_of_routing_asks_for_a_model_with_experts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`model\.routing`: replay, but .*base has no experts"):
        validate(read(EXAMPLE, ["model.routing=replay"]))
    validate(read(EXAMPLE, ["model.routing=replay", f"model.source={mixture(tmp_path / 'moe')}"]))
    validate(read(EXAMPLE, ["model.routing=replay", "model.source=hf://a/b@c"]))  # not here


def test_an_engine_over_ranks_asks_for_heads_that_they_divide() -> None:
    settings = ["rollout.engine=vllm", "rollout.vllm.tensor_parallel_size=3"]
    said = "`rollout.vllm.tensor_parallel_size`: 3 does not divide num_attention_heads 4"
    with pytest.raises(ConfigError, match=re.escape(said)):
        validate(read(EXAMPLE, settings))
    validate(read(EXAMPLE, settings[1:]))  # another engine does not read it


def test_a_config_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"`model\.source`: .*config\.json"):
        validate(read(EXAMPLE, [f"model.source={tmp_path}"]))


def test_an_oracle_that_nobody_starts_needs_no_ranks_of_its_own(tmp_path: Path) -> None:
    source = f"model.source={mixture(tmp_path / 'moe')}"
    layout = ["model.backend=megatron", "model.layout.pp=2", "learner.ranks=2", source]
    with pytest.raises(ConfigError, match=r"logit_oracle\.ranks 1 is no multiple"):
        validate(read(EXAMPLE, layout))
    route = ["old_logprobs.route=snapshot_old", "logit_oracle.replicas=0"]
    validate(read(EXAMPLE, [*layout, *route]))


def test_gpus_of_a_role_are_its_ranks_as_in_the_chart(tmp_path: Path) -> None:
    model = {"backend": "megatron", "layout": {"tp": 2, "sp": True}, "source": "hf://a/b@c"}
    tree = {
        "learner": {"nodes": 2, "gpu": {"count": 4}},
        "logit_oracle": {"gpu": {"count": 2}},
        "config": {"model": model},
    }
    values = read(write(tmp_path, tree))
    with pytest.raises(ConfigError, match=r"learner\.ranks 1 is no multiple"):
        validate(values)  # processes here: as many as are said
    shown = effective(values.with_ranks_of_gpus())
    assert (shown["learner"]["ranks"], shown["logit_oracle"]["ranks"]) == (8, 2)
    said = read(write(tmp_path, tree), ["learner.ranks=6"]).with_ranks_of_gpus()
    assert effective(said)["learner"]["ranks"] == 6
