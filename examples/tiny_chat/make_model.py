"""Make a chat model that knows nothing, in a second: to see that an agent of yours fits.

    python examples/tiny_chat/make_model.py --out runs/tiny-chat [--seed N]

A Qwen3 of 0.1 M parameters with random weights, a byte-level tokenizer that reads any text, and a
ChatML template with tools. It answers noise. What a run with it shows is that your environment,
tools, tasks and reward work with the services; then name a real model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
STOP = "<|im_end|>"
CORPUS = [
    '{"type": "function", "function": {"name": "get_order", "description": "Look an order up", '
    '"parameters": {"type": "object", "properties": {"order_id": {"type": "string"}}, "required": '
    '["order_id"]}}}',
    "Hello, how many are there in stock? I can help you with that. Is there anything else?",
] * 4


def make_tokenizer() -> Tokenizer:
    """256 bytes, some merges, and the tokens of ChatML."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", STOP)]
    )
    made.add_tokens(
        [AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>")]
    )
    return made


def make_policy(vocabulary: int, stop_id: int) -> Qwen3ForCausalLM:
    """Qwen3 with random weights, in float32."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.12,
        bos_token_id=None,
        eos_token_id=[stop_id],
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def make(folder: Path, seed: int = 0) -> None:
    """Write a Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    stop_id = tokenizer.token_to_id(STOP)
    torch.manual_seed(seed)
    policy = make_policy(tokenizer.get_vocab_size(), stop_id)
    policy.generation_config.eos_token_id = [stop_id]
    policy.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP}
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    shutil.copyfile(HERE / "chat_template.jinja", folder / "chat_template.jinja")
    print(f"saved to {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)
