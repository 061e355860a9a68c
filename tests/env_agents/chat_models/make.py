"""Make the small tokenizers of the chat fixtures; the templates beside them are written by hand.

    python tests/env_agents/chat_models/make.py

qwen3 and llama3: byte-level BPE with the pre-tokenizers of their families. mistral: BPE with
metaspaces and byte fallback, as converted from SentencePiece: a decoder that strips blanks and an
encoder that adds them is where careless re-tokenisation drifts.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
CORPUS = [
    "You may call one or more functions to assist with the user query. Return a json object with "
    "function name and arguments within XML tags. You are provided with function signatures.",
    '{"type": "function", "function": {"name": "get_order", "description": "Look an order up", '
    '"parameters": {"type": "object", "properties": {"order_id": {"type": "string"}}}}}',
    "Hello, I would like to return the second item of my order, please. What is the weather in "
    "Paris today? It is cloudy, 21 degrees. Is there anything else that I can help you with?",
    "Let me think about this step by step. First I need the order, then the price.\n\n",
] * 4
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def special(text: str) -> AddedToken:
    """A token that no merge crosses."""
    return AddedToken(text, special=True, normalized=False)


def byte_level(pattern: str, tokens: list[AddedToken]) -> Tokenizer:
    """256 bytes and some merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=8,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(tokens)
    return made


def metaspace(tokens: list[str]) -> Tokenizer:
    """Control tokens first, then bytes, then pieces, in the order of a SentencePiece model."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, max_token_length=8)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", *tokens, *(f"<0x{b:02X}>" for b in range(256)), *model["vocab"]]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(merge) for merge in model["merges"]]
    made = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([special(token) for token in tokens])
    return made


def save(folder: str, made: Tokenizer, bos: str | None, eos: str, stops: list[str]) -> None:
    """Write what a model directory has beside its weights."""
    path = HERE / folder
    made.save(str(path / "tokenizer.json"))
    stop_ids = [made.token_to_id(token) for token in stops]
    described = {"bos_token": bos, "eos_token": eos, "clean_up_tokenization_spaces": False}
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **described},
        "generation_config.json": {"eos_token_id": stop_ids},
        "config.json": {"vocab_size": made.get_vocab_size()},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    plain = [
        AddedToken(text, special=False, normalized=False)
        for text in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
                     "<think>", "</think>")
    ]  # fmt: skip
    chatml = [special(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    qwen = byte_level(QWEN, [*chatml, *plain])
    save("qwen3", qwen, None, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"])
    headers = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
               "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")  # fmt: skip
    llama = byte_level(LLAMA, [special(t) for t in headers])
    save("llama3", llama, headers[0], "<|eot_id|>", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    brackets = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]  # fmt: skip
    save("mistral", metaspace(brackets), "<s>", "</s>", ["</s>"])
