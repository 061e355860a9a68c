"""`python -m services.env_agents.verifiers.maths_helper TIMEOUT_S MEMORY_MB`, for `maths.py`.

A line in: `[wanted, given]`; a line out: `{"equal": bool}`, `{"malformed": true}` or
`{"fault": text}`. It ends by itself, without an answer, when a question takes too long.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any


def main(argv: list[str]) -> int:
    """Judge lines until the other side hangs up."""
    timeout_s, memory_mb = float(argv[0]), int(argv[1])
    import math_verify  # type: ignore[import-not-found]  # an optional extra, slow to import

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        wanted, given = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # its default action ends the process
        try:
            judged = judge(math_verify, wanted, given)
        except MemoryError:
            return 1
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        answers.write(json.dumps(judged) + "\n")
        answers.flush()
    return 0


def judge(math_verify: Any, wanted: str, given: str) -> dict[str, Any]:
    """Compare; the library's own timeouts are off, because ours ends the process."""
    gold = math_verify.parse(_as_latex(wanted), parsing_timeout=None)
    if not gold:
        return {"fault": "math-verify finds no expression in it"}
    answer = math_verify.parse(given, parsing_timeout=None)
    if not answer:
        answer = math_verify.parse(_as_latex(given), parsing_timeout=None)
    if not answer:
        return {"malformed": True}
    return {"equal": bool(math_verify.verify(gold, answer, timeout_seconds=None))}


def _as_latex(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text}$"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
