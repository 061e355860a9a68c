"""What the runtime knows of ranks: configuration, followers, lost peers, the launcher's death."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from services.learner.config import LearnerConfig
from services.logit_oracle.config import LogitOracleConfig
from shared.runtime import config as configuration
from shared.runtime.errors import ConfigError, Fatal
from shared.runtime.peers import unless_lost
from shared.runtime.rank_life import LAUNCHER

ROOT = Path(__file__).resolve().parents[2]


# --- configuration
@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"layout": {"tp": 2}}, "layout tp 2: the backend torch only shards"),
        ({"layout": {"pp": 2, "sp": True}}, "layout pp 2, sp true"),
        ({"layout": {"ep": 4}}, "layout ep 4"),
        ({"layout": {"tp": 0}}, "model.layout.tp"),
        ({"backend": "megatron", "layout": {"sp": True}}, "layout sp true needs layout.tp above 1"),
        ({"backend": "megatron", "dtype": "float64"}, "dtype float64: the backend megatron"),
        ({"backend": "megatron", "compile": True}, "compile: the backend megatron does not"),
        ({"backend": "fsdp"}, "model.backend"),
        ({"device": "tpu"}, "model.device"),
        ({"rank_timeout_s": 0}, "model.rank_timeout_s"),
    ],
)
def test_a_model_that_cannot_be_laid_out_is_refused_in_one_line(model: dict, named: str):
    with pytest.raises(ConfigError) as refused:
        configuration.load(LearnerConfig, {"model": model}, origin="file")
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("cls", "role"), [(LearnerConfig, "learner"), (LogitOracleConfig, "logit_oracle")]
)
def test_ranks_that_the_layout_does_not_divide_are_refused(cls, role: str):
    tree = {"model": {"backend": "megatron", "layout": {"tp": 2, "pp": 2}}, role: {"ranks": 6}}
    with pytest.raises(ConfigError, match=f"{role}.ranks 6 is no multiple of model.layout tp 2"):
        configuration.load(cls, tree, origin="file")
    tree[role]["ranks"] = 8
    assert getattr(configuration.load(cls, tree, origin="file"), role).ranks == 8
    tree["model"]["layout"]["ep"] = 3
    said = f"model.layout ep 3 does not divide the 4 ranks of a stage ({role}.ranks 8 / pp 2)"
    with pytest.raises(ConfigError, match=re.escape(said)):
        configuration.load(cls, tree, origin="file")
    tree["model"]["layout"]["ep"] = 4  # over tensor- and data-parallel ranks
    configuration.load(cls, tree, origin="file")


# --- processes
def service(
    module: str, *settings: str, bound_s: float = 60, **environment: str
) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *(p for s in settings for p in ("--set", s))],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=bound_s,
    )
    return done.returncode, done.stderr


RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("module", ["services.learner", "services.logit_oracle"])
def test_another_number_of_processes_than_configured_is_refused_on_every_rank(module: str):
    key = module.rpartition(".")[2] + ".ranks"
    code, said = service(module, f"{key}=3", **RANK, MASTER_PORT="1")
    assert code == 2
    assert f"{key} 3: 2 processes started (WORLD_SIZE): start 3 with torchrun" in said


def test_a_follower_that_meets_nobody_ends_within_the_bound():
    from shared.runtime.nats_server import free_port

    code, said = service(
        "services.learner",
        "learner.ranks=2",
        "model.rank_timeout_s=2",
        **RANK,
        MASTER_PORT=str(free_port()),
    )
    assert code == 1
    assert "lagwise learner:" in said.strip().splitlines()[-1]


def test_a_rank_whose_launcher_died_before_it_could_wish_to_follow_ends():
    code, _ = service("services.learner", "learner.ranks=2", **RANK, **{LAUNCHER: "1"})
    assert code == 1


def test_a_rank_ends_with_its_launcher():
    """The launcher is a process that starts one rank and is then killed."""
    script = (
        "import os, subprocess, sys, time\n"
        f"env = {{**os.environ, {LAUNCHER!r}: str(os.getpid())}}\n"
        "code = 'from shared.runtime.rank_life import die_with_launcher as d; import time; d();'\n"
        "code += 'print(1, flush=True); time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', code], env=env,\n"
        "                         stdout=subprocess.PIPE, start_new_session=True)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "zombie" not in _state(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "zombie"


# --- peers
class Peers:
    reason = ""


async def test_work_that_ends_before_anybody_is_lost_is_awaited_as_it_is():
    done: list[int] = []

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.append(1)

    await unless_lost(Peers(), work(), "again")
    assert done == [1]

    async def fail() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await unless_lost(Peers(), fail(), "again")


async def test_work_that_waits_for_a_lost_peer_is_given_up_and_the_peer_named():
    peers, stuck, cleaned = Peers(), threading.Event(), []

    async def work() -> None:
        try:
            await asyncio.to_thread(stuck.wait, 30)
        finally:
            cleaned.append(1)

    async def lose() -> None:
        await asyncio.sleep(0.1)
        peers.reason = "rank 1: its process ended"

    began = time.monotonic()
    losing = asyncio.create_task(lose())
    with pytest.raises(Fatal, match="rank 1: its process ended: starting again"):
        await unless_lost(peers, work(), "starting again")
    assert time.monotonic() - began < 5
    assert cleaned == [1]
    await losing
    stuck.set()


async def test_what_the_work_says_on_purpose_decides_over_what_its_failure_did_to_peers():
    peers = Peers()

    async def work() -> None:
        peers.reason = "rank 0: save: No space left on device"
        await asyncio.sleep(0.3)  # it is on its way
        raise Fatal("checkpoint v7: free some space")

    with pytest.raises(Fatal, match="free some space"):
        await unless_lost(peers, work(), "again")


async def test_what_fails_because_of_a_lost_peer_is_told_as_its_loss():
    peers = Peers()

    async def work() -> None:
        peers.reason = "rank 1: its process ended"
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(Fatal, match="rank 1: its process ended") as lost:
        await unless_lost(peers, work(), "again")
    assert isinstance(lost.value.__cause__, RuntimeError)
