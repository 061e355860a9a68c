import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.backends.hf_files import HfFiles, write_hf, write_tensors
from shared.backends.hf_model import load_empty
from shared.backends.hf_names import owners, published_places, stream
from shared.backends.torch_backend import TorchBackend

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3), "c": torch.zeros(4, 4)}


@pytest.mark.parametrize(("shard_bytes", "num_files"), [(1 << 20, 1), (40, 2), (1, 3)])
def test_tensors_come_back_from_one_file_or_many(tmp_path: Path, shard_bytes: int, num_files: int):
    write_tensors(tmp_path, iter(TENSORS.items()), shard_bytes=shard_bytes)
    files = HfFiles(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_files
    assert (tmp_path / "model.safetensors.index.json").exists() == (num_files > 1)
    assert files.names == TENSORS.keys()
    assert all(torch.equal(files.read(name), TENSORS[name]) for name in TENSORS)
    assert files.shapes == {name: tuple(t.shape) for name, t in TENSORS.items()}


def test_written_files_are_for_whom_new_files_are(tmp_path: Path):
    """An export is read by others: an inference server with another user, say."""
    (tmp_path / "plain").touch()
    write_tensors(tmp_path, iter(TENSORS.items()), shard_bytes=40)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_what_a_directory_lacks_or_has_too_much_of_is_named(tmp_path: Path):
    write_tensors(tmp_path, iter(TENSORS.items()))
    files = HfFiles(tmp_path)
    files.check({name: tuple(t.shape) for name, t in TENSORS.items()})
    with pytest.raises(ValueError, match="missing tensors: d"):
        files.check({**files.shapes, "d": (1,)})
    with pytest.raises(ValueError, match="unexpected tensors: b"):
        files.check({"a": (2, 3), "c": (4, 4)})
    files.check({"a": (2, 3), "c": (4, 4)}, ignored=["b"])
    with pytest.raises(ValueError, match=r"c has shape \(4, 4\), its config says \(4, 5\)"):
        files.check({**files.shapes, "c": (4, 5)})


def test_an_index_that_names_an_absent_file_is_refused(tmp_path: Path):
    write_tensors(tmp_path, iter(TENSORS.items()), shard_bytes=1)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    files = HfFiles(tmp_path)
    with pytest.raises(ValueError, match="model-00002-of-00003"):
        files.read("b")


def test_an_export_that_fails_leaves_the_old_one(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"dtype": "bfloat16"}')

    def broken():
        yield "a", TENSORS["a"]
        raise OSError("disk full")

    write_hf(tmp_path / "out", source, iter(TENSORS.items()), dtype=torch.float32)
    with pytest.raises(OSError, match="disk full"):
        write_hf(tmp_path / "out", source, broken(), dtype=torch.float32)
    assert HfFiles(tmp_path / "out").names == TENSORS.keys()
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"dtype": "float32"}


def write_moe(path: Path) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_experts=3,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mlp_only_layers=[0],
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


def test_experts_are_published_one_by_one_as_views_under_the_names_of_the_files(tmp_path: Path):
    backend = TorchBackend()
    backend.load_hf(write_moe(tmp_path / "moe"))
    files, state = HfFiles(tmp_path / "moe"), backend.state()
    assert state.keys() == files.names
    assert all(torch.equal(state[name], files.read(name)) for name in files.names)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    state[name].add_(1.0)
    assert torch.equal(backend.state()[name], files.read(name) + 1.0)
    backend.export_hf(tmp_path / "export")
    again = TorchBackend()
    again.load_hf(tmp_path / "export")
    assert all(torch.equal(again.state()[n], backend.state()[n]) for n in files.names)


def test_a_model_whose_files_have_names_of_their_own_is_refused(tmp_path: Path):
    path = write_moe(tmp_path / "moe")
    config = json.loads((path / "config.json").read_text())
    files = HfFiles(path)
    renamed = {name.replace("experts.2.", "experts.9."): t for name, t in files.tensors()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="experts"):
        TorchBackend().load_hf(path)


def test_an_empty_model_has_the_names_and_buffers_of_a_loaded_one(tmp_path: Path):
    path = write_moe(tmp_path / "moe")
    empty, backend = load_empty(path, dtype=torch.float32), TorchBackend()
    backend.load_hf(path)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert published_places(empty).keys() == backend.state().keys()
    rotary = empty.model.rotary_emb.inv_freq
    assert torch.equal(rotary, backend._at.model.model.rotary_emb.inv_freq)
    assert owners(empty).keys() == owners(backend._at.model).keys()
    assert dict(stream(backend._at.model, published_places(backend._at.model))).keys()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"metadata": {}}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of tensors"):
        HfFiles(tmp_path)
