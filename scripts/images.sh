#!/usr/bin/env bash
# Build, and with `push` also push, the images of the chart: scripts/images.sh build|push|test|check
#
# REGISTRY=registry.example.com/team   required to push
# TAG=0.1.0                            default: the chart's appVersion
# BASE_IMAGE=, TORCH=cu130             see charts/images/Dockerfile
# test builds and checks; check takes the images as they are
# SERVICES="rollout learner"           default: all five
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { printf 'images: %s\n' "$*" >&2; exit 2; }

# A docker command without its daemon is no engine.
engine=""
for candidate in docker podman; do
    if [ -z "$engine" ] && command -v "$candidate" >/dev/null && "$candidate" info >/dev/null 2>&1; then
        engine=$candidate
    fi
done
[ -n "$engine" ] || fail "no container engine: neither \`docker info\` nor \`podman info\` answers"
act=${1:-build}
registry=${REGISTRY:-}
tag=${TAG:-$(sed -n 's/^appVersion: "\(.*\)"/\1/p' charts/lagwise/Chart.yaml)}
read -r -a services <<<"${SERVICES:-learner rollout env-agents logit-oracle operator}"
read -r -a build_flags <<<"${BUILD_FLAGS:-}"
read -r -a run_flags <<<"${RUN_FLAGS:-}"
[ "$tag" != latest ] || fail "TAG=latest: name a version"
[ "$act" != push ] || [ -n "$registry" ] || fail "REGISTRY is not set: make images push REGISTRY=registry.example.com/team"

name() { printf '%slagwise-%s:%s' "${registry:+$registry/}" "$1" "$tag"; }

build() {
    local arguments=(--build-arg "SERVICE=$1" --build-arg "VERSION=$tag" --build-arg "TORCH=${TORCH:-cpu}")
    [ -z "${BASE_IMAGE:-}" ] || arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
    "$engine" build "${build_flags[@]}" -f charts/images/Dockerfile "${arguments[@]}" -t "$(name "$1")" .
}

# As hardened as in the chart: no root, read-only root, no capabilities.
run() { "$engine" run "${run_flags[@]}" --read-only --tmpfs /tmp --cap-drop=all --security-opt=no-new-privileges "$@"; }

# It starts, it is nobody special, it can fetch a model, and SIGTERM ends it at once with exit code 0.
check() {
    local module code started container=lagwise-check-$$
    case $1 in
        operator) module=shared.cli.deletion_costs ;;
        *) module=services.${1//-/_} ;;
    esac
    run --rm "$(name "$1")" "$module" --help >/dev/null || fail "$1: --help does not run hardened"
    run --rm -i --entrypoint python "$(name "$1")" - <<'PYTHON' || fail "$1: is not hardened"
import os
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines())
assert os.getuid() == os.getgid() == 10001, (os.getuid(), os.getgid())
assert int(status["CapEff"], 16) == 0 and status["NoNewPrivs"] == "1", status
assert not os.access("/app", os.W_OK) and os.access("/tmp", os.W_OK)
assert os.statvfs("/").f_flag & os.ST_RDONLY, "the root can be written"
PYTHON
    if [ "$1" = operator ]; then
        printf 'images: %s runs hardened\n' "$1"
        return 0
    fi
    run --rm --entrypoint python "$(name "$1")" -c "import huggingface_hub" || fail "$1: cannot fetch a model"
    # Nobody answers at this address: the service waits for the bus, and must leave at once.
    run --detach --name "$container" "$(name "$1")" "$module" \
        --set bus.url=nats://127.0.0.1:1 --set bus.connect_timeout_s=120 >/dev/null
    started=$SECONDS
    until "$engine" logs "$container" 2>&1 | grep -q '"event": "bus_error"'; do
        [ $((SECONDS - started)) -lt 60 ] || fail "$1: did not try the bus: $("$engine" logs --tail 3 "$container" 2>&1)"
        sleep 1
    done
    started=$SECONDS
    "$engine" stop --time 20 "$container" >/dev/null
    code=$("$engine" inspect --format '{{.State.ExitCode}}' "$container")
    "$engine" rm "$container" >/dev/null
    [ "$code" = 0 ] || fail "$1: SIGTERM ended it with exit code $code (137: killed after 20 s)"
    printf 'images: %s runs hardened, SIGTERM ends it in %s s\n' "$1" $((SECONDS - started))
}

for service in "${services[@]}"; do
    case $act in
        build) build "$service" ;;
        push) build "$service" && "$engine" push "$(name "$service")" ;;
        test) build "$service" && check "$service" ;;
        check) check "$service" ;;
        *) fail "$act: build, push, test or check" ;;
    esac
done
