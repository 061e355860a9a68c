#!/usr/bin/env bash
# Install into a virtual environment: scripts/install.sh VENV EXTRA
#
# torch comes first, and only as a CPU build: PyPI's default Linux build brings gigabytes of CUDA.
# Seconds spent are added to VENV/.install_s, which the demo's summary reports.
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

torch=$(grep -E '^torch==' constraints.txt)
report=$(mktemp)
trap 'rm -f "$report"' EXIT

# Whether pip, called with these further arguments, would take a torch without CUDA.
offers_cpu_torch() {
    pip install --quiet --dry-run --ignore-installed --report "$report" "$@" "$torch" \
        >/dev/null 2>&1 || return 1
    "$venv/bin/python" - "$report" <<'PYTHON'
import json, sys
names = [item["metadata"]["name"].lower() for item in json.load(open(sys.argv[1]))["install"]]
sys.exit(any(name.startswith(("nvidia", "cuda", "triton")) for name in names))
PYTHON
}

if ! "$venv/bin/python" -c "
import importlib.metadata as m, sys
sys.exit(m.version('torch').split('+')[0] != '${torch#torch==}')" 2>/dev/null; then
    if offers_cpu_torch --index-url "$cpu_index" --timeout 10 --retries 0; then
        say "$torch (CPU) from $cpu_index"
        pip install --quiet --index-url "$cpu_index" "$torch"
    elif offers_cpu_torch; then
        say "$torch (CPU) as pip is configured"
        pip install --quiet "$torch"
    else
        fail "no CPU build of $torch: $cpu_index is unreachable and pip's own index offers none" \
            "(or one with CUDA); put the CPU wheel in a folder and set PIP_FIND_LINKS to it"
    fi
fi

say ".[$extra]"
pip install --quiet --constraint constraints.txt --editable ".[$extra]"

spent=$("$venv/bin/python" - "$venv/.install_s" "$started" <<'PYTHON'
import pathlib, sys, time
path, spent = pathlib.Path(sys.argv[1]), time.time() - float(sys.argv[2])
before = float(path.read_text()) if path.exists() else 0.0
path.write_text(f"{before + spent:.1f}\n")
print(f"{spent:.1f}")
PYTHON
)
say "done in $spent s"
