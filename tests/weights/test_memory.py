"""A follower needs its model once, and a bound that does not grow with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.weights import deltas, keyframes
from shared.weights.digests import specs
from shared.wire.codec import encode
from tests.weights.chains import manifest_of

MB = 1 << 20
SPOOL_BYTES = 8 * MB
SLACK_BYTES = 210 * MB
"""The compiled kernels, dense blocks in work on two threads, the pieces in flight: 175 MB measured,
whatever the model's size. One more copy of the model would be 96 MB more."""

FOLLOW = """
import asyncio, json, sys
from pathlib import Path
from shared.cli.bench_weights_follower import peak_rss_bytes
from shared.weights.history import WeightHistory
from shared.weights.spool import Spool
from shared.wire.codec import decode
from shared.wire.weights import Manifest

folder, spool_bytes = Path(sys.argv[1]), int(sys.argv[2])
manifests = [decode((folder / f"{v}.manifest").read_bytes(), Manifest) for v in range(4)]

async def pieces(path):
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece

async def follow():
    history = WeightHistory(threads=2, spool_bytes=spool_bytes)
    before = peak_rss_bytes()
    await history.load_keyframe(manifests[0], pieces(folder / "0.keyframe"))
    for version in (1, 2):
        spool = Spool(spool_bytes)
        async for piece in pieces(folder / f"{version}.delta"):
            spool.write(piece)
        await history.apply_delta(manifests[version], version - 1, spool)
    await history.load_keyframe(manifests[3], pieces(folder / "3.keyframe"))
    for version in (0, 3, 1, 2):
        async with history.at(version):
            pass
    assert history.versions == (0, 1, 2, 3) and history.faults == 0
    print(json.dumps({"grown": peak_rss_bytes() - before, "spilled": history.bytes_spilled}))
    history.clear()

asyncio.run(follow())
"""


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc (Linux)")
def test_an_oracle_holds_one_copy_and_a_bound_however_dense_the_deltas_are(tmp_path: Path) -> None:
    """Three deltas as large as the model and a keyframe over what is held."""
    num_elements = 48 * MB
    rng = np.random.default_rng(0)
    old: dict[str, torch.Tensor] = {}
    for version in range(4):
        bits = rng.integers(0, 1 << 16, num_elements, dtype=np.uint16)
        new = {"w": torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)}
        (tmp_path / f"{version}.manifest").write_bytes(encode(manifest_of(version, new)))
        if version in (0, 3):
            with (tmp_path / f"{version}.keyframe").open("wb") as file:
                file.writelines(keyframes.SafetensorsPieces(new))
        else:
            with (tmp_path / f"{version}.delta").open("wb") as file:
                file.writelines(deltas.DeltaWriter(old, new, tensors=specs(old)).pieces())
        old = new
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, str(tmp_path), str(SPOOL_BYTES)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["spilled"] > 4 * num_elements  # the deltas are really as large as that
    assert told["grown"] < 2 * num_elements + 2 * SPOOL_BYTES + SLACK_BYTES
