"""vLLM's scheduler, but a turn with `limit` tokens gets no further until the limit is raised.

Runs in the engine's process; the limit lies in a file that the test writes to.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from tests.rollout.vllm.gate import VARIABLE


class HeldScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with open(os.environ[VARIABLE], "rb") as file:
            self._limit = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        (limit,) = struct.unpack("q", self._limit[:8])
        running = [r for r in self.running if r.num_output_tokens >= limit]
        waiting = [r for r in self.waiting if r.num_output_tokens >= limit]
        self.running = [r for r in self.running if r not in running]
        self.waiting.remove_requests(waiting)
        output = super().schedule(*args, **kwargs)
        self.running = running + self.running
        for request in reversed(waiting):
            self.waiting.prepend_request(request)
        if not output.total_num_scheduled_tokens:
            time.sleep(0.001)
        return output
