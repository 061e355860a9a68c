#!/usr/bin/env bash
# Install into a virtual environment: scripts/install.sh VENV EXTRA
#
# torch comes first, and only as a CPU build: PyPI's default Linux build brings gigabytes of CUDA.
# vLLM on CPUs (extra rollout-cpu) comes as a list of exact versions: resolving it would bring CUDA
# builds of packages that it does not use on CPUs, and a transformers that the learner cannot have.
# What the demo's installation took goes to VENV/.install_s, for its summary.
set -euo pipefail

venv=$1
extra=$2
cpu_index=https://download.pytorch.org/whl/cpu
started=$(date +%s.%N)
say() { printf 'install: %s\n' "$*"; }
fail() { printf 'install: %s\n' "$*" >&2; exit 2; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python is not installed: install Python 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: install Python 3.11 or newer, or set PYTHON="
if [ ! -x "$venv/bin/pip" ]; then
    say "creating $venv"
    "$python" -m venv "$venv" || fail "python3 -m venv failed: on Debian, apt install python3-venv"
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$venv/bin/python" -m pip "$@"; }

pinned=$(grep -E '^torch==' constraints.txt)
torch=$pinned
# On Linux only builds without CUDA carry this label; elsewhere PyPI's own build has none.
[ "$(uname -s)" = Linux ] && torch=$pinned+cpu

reachable() {
    "$venv/bin/python" - "$1" <<'PYTHON'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=10).close()
except OSError:
    sys.exit(1)
PYTHON
}

if ! "$venv/bin/python" -c "
import importlib.metadata as m, sys
sys.exit('torch==' + m.version('torch').split('+')[0] != '$pinned')" 2>/dev/null; then
    # --no-deps: what torch needs beside itself comes below, from pip's own index
    if reachable "$cpu_index/torch/" &&
        pip install --quiet --no-deps --index-url "$cpu_index" "$torch"; then
        say "$torch from $cpu_index"
    elif pip install --quiet --no-deps "$torch"; then
        say "$torch as pip is configured"
    else
        fail "no $torch: $cpu_index is unreachable and pip's own index has no CPU build;" \
            "put its wheel into a folder and set PIP_FIND_LINKS to that folder"
    fi
fi

say ".[$extra]"
if [ "$extra" = rollout-cpu ]; then
    "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        fail "vLLM needs the system library libnuma.so.1: on Debian, apt install libnuma1"
    pip install --quiet --no-deps --requirement constraints-vllm.txt
    pip install --quiet --no-deps --editable .
else
    pip install --quiet --constraint constraints.txt --editable ".[$extra]"
fi

spent=$("$venv/bin/python" -c "import time; print(f'{time.time() - $started:.1f}')")
[ "$extra" != demo ] || echo "$spent" >"$venv/.install_s"
say "done in $spent s"
