"""Model sources: read in three forms, fetched once, refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shared.runtime import model_source
from shared.runtime.errors import ConfigError
from shared.runtime.model_source import (
    MARKER,
    ClaimSource,
    FolderSource,
    HubSource,
    fetch,
    main,
    parse,
)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://org/name@abc123", HubSource("org/name", "abc123")),
        ("hf://Org-1/na.me_2@refs/pr/1", HubSource("Org-1/na.me_2", "refs/pr/1")),
        ("pvc://models/qwen/4b", ClaimSource("models", "qwen/4b")),
        ("pvc://models", ClaimSource("models", "")),
        ("/models/here", FolderSource("/models/here")),
        ("examples/frozen_lake/base", FolderSource("examples/frozen_lake/base")),
    ],
)
def test_three_forms_are_read(source: str, expected: object):
    assert parse(source) == expected


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "empty"),
        ("hf://name@abc", "hf://org/name@revision"),
        ("hf://org/name", "name a revision"),
        ("hf://org/na me@x", "hf://org/name@revision"),
        ("pvc:///path", "pvc://claim/path"),
        ("pvc://models/../etc", "pvc://claim/path"),
        ("s3://bucket/model", "s3:// is not known"),
    ],
)
def test_anything_else_is_refused_with_an_example(source: str, said: str):
    with pytest.raises(ConfigError, match=r"model\.source") as caught:
        parse(source)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


class Hub:
    """Stands where huggingface_hub's download would be; writes what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        self.calls: list[dict] = []
        self.error: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self)

    def __call__(self, repository: str, **options) -> None:
        self.calls.append({"repository": repository, **options})
        if self.error is not None:
            raise self.error
        options["local_dir"].joinpath("config.json").write_text("{}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_a_model_is_fetched_once(hub: Hub, tmp_path: Path):
    source = HubSource("org/name", "abc")
    assert fetch(source, tmp_path, "all")
    assert not fetch(source, tmp_path, "all")
    assert not fetch(source, tmp_path, "config"), "all includes it"
    assert len(hub.calls) == 1
    assert hub.calls[0]["revision"] == "abc"
    assert "*.safetensors" in hub.calls[0]["allow_patterns"]


def test_small_files_alone_do_not_stand_for_the_whole(hub: Hub, tmp_path: Path):
    source = HubSource("org/name", "abc")
    assert fetch(source, tmp_path, "config")
    assert not any("safetensors" in p for p in hub.calls[0]["allow_patterns"])
    assert fetch(source, tmp_path, "all")
    assert fetch(HubSource("org/name", "def"), tmp_path, "all"), "another revision"


def test_half_a_download_is_none(hub: Hub, tmp_path: Path):
    hub.error = OSError("connection reset")
    with pytest.raises(ConfigError, match=r"org/name@abc: connection reset .*pvc://"):
        fetch(HubSource("org/name", "abc"), tmp_path, "all")
    assert not (tmp_path / MARKER).exists()
    hub.error = None
    assert fetch(HubSource("org/name", "abc"), tmp_path, "all")


def test_offline_and_not_cached_is_one_line_and_code_2(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = main(["hf://org/name@abc", str(tmp_path / "m"), "--files", "config"])
    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    assert "hf://org/name@abc" in said


def test_only_the_hub_is_fetched_from(tmp_path: Path, capsys):
    assert main(["/models/x", str(tmp_path)]) == 2
    assert "only hf://" in capsys.readouterr().err


def test_the_module_imports_without_the_hubs_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert model_source.parse("hf://a/b@c") == HubSource("a/b", "c")
