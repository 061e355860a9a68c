"""Shuts itself in, then becomes the given program: `python -I -S sandbox_launcher.py ORDER`.

ORDER is JSON: `argv`, `isolate`, `memory_bytes`, `processes`, `cpu_s`, `disk_bytes`, `visible`
(folders the program may read). Standard library only: it is run by path, before anything of ours
can be imported. Linux 5.12 or newer (mount_setattr).

With `isolate`: mount, pid, network, IPC and host-name namespaces of its own, and a user namespace
unless it starts as root; a root file system made of a small tmpfs with the visible folders mounted
read-only; no capability, no way to gain one; a user id without any other process. Without it: the
resource limits alone. Exit status 120 and one line on stderr: it could not shut itself in.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys
from typing import Any, NoReturn

CANNOT = 120
"""Exit status when the program was not even started."""

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR = 442  # the same on x86_64 and aarch64
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str]) -> NoReturn:
    """Do as the order says."""
    order = json.loads(argv[0])
    try:
        if order["isolate"]:
            _shut_in(order)
        _limit(order)
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        }  # fmt: skip
        os.closerange(3, 1 << 16)
        os.execve(order["argv"][0], order["argv"], environment)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(CANNOT)


def _shut_in(order: dict[str, Any]) -> None:
    """Return only in the process that is to become the program."""
    _check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    root, uid, gid = os.geteuid() == 0, os.geteuid(), os.getegid()
    flags = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    _check(libc.unshare(flags | (0 if root else _CLONE_NEWUSER)), "unshare")
    if not root:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    own_uid = 100_000 + os.getpid()  # nobody else's: RLIMIT_NPROC counts by user
    first = os.fork()
    if first:
        _follow(first)
    _check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    _build_root(order)
    _check(libc.sethostname(b"sandbox", 7), "sethostname")
    program = os.fork()
    if program:
        # The first process of the namespace: when it ends, the kernel ends all others in it.
        _follow(program)
    os.setsid()
    _drop(own_uid if root else None)


def _follow(pid: int) -> NoReturn:
    """Wait for a child and end as it ended."""
    for standard in (0, 1, 2):
        os.close(standard)
    while True:
        ended, status = os.wait()
        if ended == pid:
            os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _build_root(order: dict[str, Any]) -> None:
    """Leave a file system that holds what is visible and nothing else."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)
    visible = [path for path in order["visible"] if os.path.isdir(path)]
    links = {path: os.readlink(path) for path in visible if os.path.islink(path)}
    folders = {path: os.open(path, os.O_PATH) for path in visible if path not in links}
    devices = {path: os.open(path, os.O_PATH) for path in ("/dev/null", "/dev/urandom")}
    old_proc = os.open("/proc", os.O_PATH)
    options = f"size={order['disk_bytes']},nr_inodes=10000,mode=755"
    # /tmp is only a place to build on: what is opened above stays reachable through /proc.
    _mount("lagwise", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir("/tmp")
    for path, target in links.items():
        os.makedirs(os.path.dirname("." + path), exist_ok=True)
        os.symlink(target, "." + path)
    for path, fd in folders.items():
        os.makedirs("." + path, exist_ok=True)
        _mount(f"/proc/self/fd/{fd}", "." + path, None, _MS_BIND | _MS_REC, None)
        _make_read_only("." + path)
    os.makedirs("./dev", exist_ok=True)
    for path, fd in devices.items():
        os.close(os.open("." + path, os.O_CREAT | os.O_WRONLY, 0o666))
        _mount(f"/proc/self/fd/{fd}", "." + path, None, _MS_BIND, None)
    os.makedirs("./tmp", exist_ok=True)
    os.chmod("./tmp", 0o1777)
    os.makedirs("./proc", exist_ok=True)
    # A container that hides parts of /proc forbids it: programs run without.
    with contextlib.suppress(PermissionError):
        _mount("proc", "./proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)
    os.close(old_proc)
    _check(libc.pivot_root(b".", b"."), "pivot_root")
    _check(libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/tmp")


def _make_read_only(path: str) -> None:
    attributes = (ctypes.c_uint64 * 4)(
        _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, 0, 0, 0
    )
    done = libc.syscall(
        _SYS_MOUNT_SETATTR, -100, path.encode(), _AT_RECURSIVE,
        ctypes.byref(attributes), ctypes.sizeof(attributes),
    )  # fmt: skip
    _check(done, f"mount_setattr {path} ({platform.release()})")


def _drop(uid: int | None) -> None:
    """Give up every capability, for good; an execve as non-root clears what is still held."""
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if uid is not None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        try:
            os.setresuid(uid, uid, uid)
        except OSError:  # a user namespace that does not reach so far
            os.setresuid(NOBODY, NOBODY, NOBODY)
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def _limit(order: dict[str, Any]) -> None:
    bounds = {
        resource.RLIMIT_AS: order["memory_bytes"],
        resource.RLIMIT_CPU: max(1, round(order["cpu_s"])),
        resource.RLIMIT_FSIZE: order["disk_bytes"],
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    if order["isolate"]:
        # Without a user of its own the count would be of everybody's processes.
        bounds[resource.RLIMIT_NPROC] = order["processes"]
    for what, bound in bounds.items():
        _, hard = resource.getrlimit(what)
        allowed = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (allowed, allowed))


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None
) -> None:
    done = libc.mount(
        source.encode() if source else None, target.encode(),
        kind.encode() if kind else None, ctypes.c_ulong(flags),
        options.encode() if options else None,
    )  # fmt: skip
    _check(done, f"mount {target}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _check(done: int, what: str) -> None:
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(sys.argv[1:])
