#!/usr/bin/env bash
# Install what `make test-envs` needs, without torch: scripts/install_envs.sh VENV
#
# openenv-core comes without its dependencies: they bring gradio and more (450 MB), of which its
# server needs only what the extra envs-test names.
set -euo pipefail

venv=$1
python=${PYTHON:-python3}
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv" || {
    printf 'install: python3 -m venv failed: on Debian, apt install python3-venv\n' >&2
    exit 2
}
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable ".[envs-test]"
"$venv/bin/python" -m pip install --quiet --no-deps "$(grep '^openenv-core==' constraints.txt)"
