"""The public text of Qwen3's chat template, as TRL ships it, through the renderer."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from services.env_agents.chat.renderer import ChatRenderer
from tests.env_agents.chat import fidelity
from tests.env_agents.chat.conversations import DATE, MODELS, PARSERS

COUNT = 300

try:
    # Read from the installed package, which is not imported: its dependencies are not here.
    FILES = importlib.metadata.files("trl") or []
except importlib.metadata.PackageNotFoundError:
    pytest.skip("trl is not installed: run by make test-agents", allow_module_level=True)


def real_template() -> str:
    (found,) = [f for f in FILES if str(f) == "trl/chat_templates/qwen3.jinja"]
    return Path(str(found.locate())).read_text()


def test_conversations_through_the_public_template_are_those_of_the_fixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference stays the fixture, whose markers say what is the assistant's."""
    folder = tmp_path / "qwen3"
    shutil.copytree(MODELS / "qwen3", folder)
    (folder / "chat_template.jinja").write_text(real_template())
    real = ChatRenderer(str(folder), {"tool_parser": PARSERS["qwen3"], "date": DATE})
    monkeypatch.setattr(fidelity, "renderer", lambda family: real)
    counts = sum((fidelity.Check("qwen3", n).play() for n in range(COUNT)), fidelity.Counter())
    assert counts["conversations"] == COUNT
    assert counts["trained tokens"] > 10 * COUNT


def test_the_public_template_has_no_markers_so_that_masks_come_from_elsewhere() -> None:
    config = json.loads((MODELS / "qwen3/tokenizer_config.json").read_text())
    assert "generation" not in real_template().replace("add_generation_prompt", "")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(MODELS / "qwen3/tokenizer.json"),
        **{k: v for k, v in config.items() if k.endswith("_token") and v},
    )
    tokenizer.chat_template = real_template()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
