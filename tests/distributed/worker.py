"""One rank of a multi-process test: `python worker.py CASE ARGUMENTS.json`.

RANK, WORLD_SIZE and a rendezvous file come in the environment. The first rank writes what the
test reads, as safetensors and JSON, into the folder of the arguments.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path


def main() -> None:
    import faulthandler

    import torch
    import torch.distributed as dist

    faulthandler.enable()
    torch.set_num_threads(1)
    case, arguments = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    module, _, function = case.partition(":")
    sys.path.insert(0, str(Path(__file__).parent))
    getattr(import_module(module), function)(arguments)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # gloo threads of subgroups may outlive the interpreter's end and abort it
    os._exit(0)


if __name__ == "__main__":
    main()
