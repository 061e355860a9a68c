"""Messages and tool calls <-> token ids, through the model's own tokenizer and chat template."""
