"""One rank of a job as the services start it: `python rank_worker.py CASE ARGUMENTS.json`.

Rank 0 runs the case with the `Ranks` it leads; the others follow. The environment is torchrun's.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    import faulthandler

    import torch

    from shared.backends.rank_follower import follow
    from shared.backends.ranks import open_ranks

    faulthandler.enable()
    torch.set_num_threads(1)
    case, arguments = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    size = int(os.environ["WORLD_SIZE"])
    job = {"key": "learner.ranks", "device": "cpu", "timeout_s": arguments.get("timeout_s", 60.0)}
    if os.environ["RANK"] != "0":
        follow(size, name="learner", **job)
    else:
        module, _, function = case.partition(":")
        sys.path.insert(0, str(Path(__file__).parent))
        ranks = open_ranks(size, **job)
        getattr(import_module(module), function)(arguments, ranks)
        ranks.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
