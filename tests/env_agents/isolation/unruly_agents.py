"""An agent with its own loop (openai SDK) that misbehaves on request after its first answer."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from typing import Any

import openai


def unruly(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    asked: Any = [{"role": "user", "content": "What is 2 + 3?"}]
    completion = client.chat.completions.create(model="m", messages=asked)
    match task["payload"].get("do", ""):
        case "hang":
            time.sleep(3600)
        case "hang for ever in threads":
            for _ in range(3):
                threading.Thread(target=time.sleep, args=(3600,)).start()
            threading.Event().wait()
        case "raise":
            raise ZeroDivisionError("as asked")
        case "exit":
            raise SystemExit(3)
        case "die":
            os._exit(7)
        case "fork":
            for _ in range(100):
                subprocess.Popen(["sleep", "3600"])
            time.sleep(3600)
        case "leak":
            blocks: list[bytearray] = []
            while True:
                blocks.append(bytearray(16 << 20))
        case "no reward":
            return None  # type: ignore[return-value]
        case _:
            pass
    return float("5" in (completion.choices[0].message.content or ""))
