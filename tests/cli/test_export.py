import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from shared.cli.main import main

TENSORS = {"model.embed_tokens.weight": torch.arange(12.0).reshape(4, 3), "b": torch.ones(3)}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    tied = {**TENSORS, "lm_head.weight": TENSORS["model.embed_tokens.weight"].clone()}
    save_file(tied, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "qwen3", "dtype": "bfloat16"}')
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    versions = tmp_path / "run/archive/versions"
    versions.mkdir(parents=True)
    for version in (0, 3):
        trained = {name: tensor + version for name, tensor in TENSORS.items()}
        save_file(trained, versions / f"{version:06d}.safetensors")
    resolved = {"config": {"model": {"source": str(source)}}}
    (tmp_path / "run/resolved.yaml").write_text(yaml.safe_dump(resolved))
    return tmp_path / "run"


@pytest.mark.parametrize(("arguments", "version"), [([], 3), (["--version", "0"], 0)])
def test_a_version_is_exported_with_the_sources_other_files(
    run_dir: Path, tmp_path: Path, arguments: list[str], version: int
):
    out = tmp_path / "new/out"
    assert main(["export", str(run_dir), str(out), *arguments]) == 0
    written = load_file(out / "model.safetensors")
    assert written.keys() == TENSORS.keys()
    assert all(torch.equal(written[n], TENSORS[n] + version) for n in TENSORS)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": 3}'


def test_bad_requests_are_one_line_and_write_nothing(run_dir: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    cases = [
        ([str(run_dir), str(out), "--version", "2"], "version 2 is not archived"),
        ([str(run_dir), str(run_dir)], "exists"),
        ([str(run_dir), str(out), "--source", str(tmp_path)], "no Hugging Face directory"),
        ([str(tmp_path / "nothing"), str(out)], "no run folder"),
    ]
    for arguments, words in cases:
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    other = {**TENSORS, "b": torch.ones(4)}
    save_file(other, tmp_path / "source/model.safetensors")
    assert main(["export", str(run_dir), str(out)]) == 2
    assert "b has shape" in capsys.readouterr().err
    assert not out.exists()
