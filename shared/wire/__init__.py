"""The wire contract: messages, subjects, codec. No NATS, torch or asyncio."""
