#!/bin/sh
# Install what one image needs into the virtual environment on PATH: SERVICE, TORCH, TORCH_INDEX.
set -eu

constraints=constraints.txt
# hub: the init container that fetches an hf:// model runs in the role's own image.
case $SERVICE in
    # megatron-core is small and brings nothing along
    learner) extra=learner,megatron,hub,s3,nkeys torch=1 ;;
    logit-oracle) extra=logit-oracle,megatron,hub,s3,nkeys torch=1 ;;
    rollout)
        torch=1
        # vLLM where there is a GPU; it holds transformers and numba back.
        if [ "$TORCH" = cpu ]; then
            extra=rollout-torch,hub,s3,nkeys
        else
            extra=rollout,hub,s3,nkeys constraints=constraints-cuda.txt
        fi
        ;;
    env-agents) extra=env-agents,hub,nkeys torch=0 ;;
    operator) extra=kube,nkeys torch=0 ;;
    *) echo "SERVICE=$SERVICE: learner, rollout, env-agents, logit-oracle or operator" >&2; exit 2 ;;
esac
pip install --constraint constraints.txt hatchling editables
if [ $torch = 1 ]; then
    version=$(sed -n 's/^torch==//p' constraints.txt)
    # --no-deps: what torch needs comes below from the lock; its CUDA libraries from its own index
    if [ "$TORCH" = cpu ]; then
        pip install --no-deps --index-url "$TORCH_INDEX/cpu" "torch==$version+cpu"
    else
        pip install --index-url "$TORCH_INDEX/$TORCH" "torch==$version+$TORCH"
    fi
fi
# The dependencies of the extras without the package itself, which is not copied yet.
python3 - "$extra" >/tmp/requirements.txt <<'PYTHON'
import re, sys, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras, wanted, todo = project["optional-dependencies"], list(project["dependencies"]), sys.argv[1].split(",")
while todo:
    for requirement in extras[todo.pop()]:
        inner = re.fullmatch(r"lagwise\[(.+)\]", requirement)
        todo += inner[1].split(",") if inner else []
        wanted += [] if inner else [requirement]
print("\n".join(sorted(set(wanted))))
PYTHON
pip install --constraint "$constraints" --requirement /tmp/requirements.txt
rm /tmp/requirements.txt
