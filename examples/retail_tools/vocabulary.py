"""The demo's tokenizer: phrases of the reduced task, pairs of digits, characters for the rest.

Words that the policy says or calls with are one token each, so that nearly every sampled token
decides something; ids are pairs of digits, copied from what was read.
"""

from __future__ import annotations

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from services.env_agents.tasks.retail_tools.people import FIRST, LAST, STREETS
from services.env_agents.tasks.retail_tools.retail import PRODUCTS

STOP = "<|im_end|>"
SPECIAL = (STOP, "<|user|>", "<|assistant|>", "<|tool|>")

SAID = (
    "Could you tell me the user id, please?", "Could you tell me the order, please?",
    "Could you tell me the reason, please?", "Could you tell me the refund, please?",
    "I will take care of it. Shall I go ahead?", "It is done. Is there anything else?",
    "It is ", ". Is there anything else?",
)  # fmt: skip
"""By the policy."""

CALLED = (
    '<tool_call>{"name": "get_order", "arguments": {"order_id": "#W',
    '<tool_call>{"name": "cancel_order", "arguments": {"order_id": "#W',
    '<tool_call>{"name": "return_items", "arguments": {"order_id": "#W',
    '<tool_call>{"name": "transfer_to_human", "arguments": {"reason": "policy"}}</tool_call>',
    '<tool_call>{"name": "transfer_to_human", "arguments": {"reason": "other"}}</tool_call>',
    '"}}</tool_call>', '", "reason": "no_longer_needed"}}</tool_call>',
    '", "reason": "mistake"}}</tool_call>', '", "item_ids": ["i',
    '"], "refund_to": "original_payment"}}</tool_call>',
    '"], "refund_to": "gift_card"}}</tool_call>',
)  # fmt: skip
"""By the policy: heads of calls up to their first id, and what stands between ids."""

HEARD = (
    "I want to cancel an order.", "I want to return the ", " of an order, nothing else.",
    "I need to know the total of an order.", "My user id is ", "It is order #W",
    "The reason: I no longer need it.", "The reason: I ordered by mistake.",
    "Refund it to the original payment.", "Refund it to the gift card.", "Yes, please.",
    "I have told you everything. Please help me.",
)  # fmt: skip
"""From the user."""

READ = (
    '{"user_id": "', '", "status": "', "pending", "delivered", "cancelled", "return requested",
    '", "address": "', '", "items": [{"item_id": "i', '", "product": "', '", "price": ',
    '}, {"item_id": "i', '}], "total": ', "transferred", "Error: ", "order #W",
    "malformed tool call", " is ", ", not ",
)  # fmt: skip
"""From tools."""


def phrases() -> list[str]:
    """Return every token that is longer than a character, in the order of their ids."""
    names = [name.lower() for name in (*FIRST, *LAST)]
    pairs = [f"{number:02d}" for number in range(100)]
    return list(dict.fromkeys((*SAID, *CALLED, *HEARD, *READ, *PRODUCTS, *names, *STREETS, *pairs)))


def make_tokenizer() -> Tokenizer:
    """Longest phrase first, then characters; what is no ASCII becomes <|unk|>."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    words = ["<|unk|>", *characters, *phrases()]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unk|>"))
    longest_first = sorted(phrases(), key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return made
