"""A tiny run for tests: a supervisor over fake children, as a process of its own.

`python fake_run.py RUN_DIR CHILD...`, each child `pod:role:behaviour[:argument]`.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from shared.cli.processes import child_environment
from shared.cli.run_folder import Events, Facts, RunFolder
from shared.cli.supervision import Child, Policy
from shared.cli.supervisor import Command, Supervisor

BEHAVIOURS = {
    # waits for SIGTERM and exits 0, noting that it was asked
    "polite": """
import signal, sys, time
def leave(*_):
    print("drained", flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
while True: time.sleep(0.05)
""",
    "stubborn": """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
while True: time.sleep(0.05)
""",
    "parent": """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("up", flush=True)
while True: time.sleep(0.05)
""",
    "exits_after": "import sys, time; time.sleep(float(sys.argv[1]))",
    "refuses": """
import sys
print("model directory /nowhere is missing", file=sys.stderr)
sys.exit(2)
""",
    # dies the first `n` times, counting in a file, then stays
    "dies_times": """
import pathlib, sys, time
count = pathlib.Path(sys.argv[2]); n = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (n + 1))
if n < int(sys.argv[1]): sys.exit("boom")
while True: time.sleep(0.05)
""",
}


def command(spec: str, run_dir: Path) -> Command:
    pod, role, behaviour, *arguments = spec.split(":")
    if behaviour == "dies_times":
        arguments.append(str(run_dir / f"{pod}.count"))
    argv = (sys.executable, "-S", "-c", BEHAVIOURS[behaviour], *arguments)
    return Command(Child(pod, role), argv, child_environment(os.environ))


async def main(run_dir: Path, specs: list[str]) -> int:
    policy = Policy(backoff_min_s=0.1, stop_bound_s=0.5, stop_bounds_s={}, give_up_after=4)
    with RunFolder(run_dir) as folder:
        facts = Facts(run_dir, sys.argv, resumed=False)
        commands = [command(spec, run_dir) for spec in specs]
        supervisor = Supervisor(commands, folder, Events(run_dir), facts, policy)
        finished = await supervisor.run()
    print(json.dumps({"code": finished.code, "reason": finished.reason}), flush=True)
    return finished.code


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]), sys.argv[2:])))
