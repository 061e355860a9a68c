#!/usr/bin/env bash
# Build, and with `push` also push, the images of the chart: scripts/images.sh build|push|test
#
# REGISTRY=registry.example.com/team   required to push
# TAG=0.1.0                            default: the chart's appVersion
# BASE_IMAGE=, TORCH=cu128             see charts/images/Dockerfile
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

# As hardened as in the chart: no root, read-only root, no capabilities; SIGTERM must end it.
check() {
    local module code started
    case $1 in
        operator) module=shared.cli.deletion_costs ;;
        *) module=services.${1//-/_} ;;
    esac
    "$engine" run --rm "${run_flags[@]}" --read-only --tmpfs /tmp --cap-drop=all \
        --security-opt=no-new-privileges "$(name "$1")" "$module" --help >/dev/null ||
        fail "$1: --help does not run hardened"
    [ "$1" != operator ] || return 0
    # Nobody answers at this address: the service waits for the bus, and must leave at once.
    "$engine" run --detach --name "lagwise-check-$$" "${run_flags[@]}" --read-only --tmpfs /tmp \
        --cap-drop=all --security-opt=no-new-privileges "$(name "$1")" "$module" \
        --set bus.url=nats://127.0.0.1:1 --set bus.connect_timeout_s=60 >/dev/null
    sleep 5
    started=$SECONDS
    "$engine" stop --time 20 "lagwise-check-$$" >/dev/null
    code=$("$engine" inspect --format '{{.State.ExitCode}}' "lagwise-check-$$")
    "$engine" rm "lagwise-check-$$" >/dev/null
    [ "$code" != 137 ] || fail "$1: SIGTERM did not end it within 20 s"
    printf 'images: %s runs hardened, SIGTERM ends it in %s s (exit %s)\n' "$1" $((SECONDS - started)) "$code"
}

for service in "${services[@]}"; do
    case $act in
        build) build "$service" ;;
        push) build "$service" && "$engine" push "$(name "$service")" ;;
        test) build "$service" && check "$service" ;;
        *) fail "$act: build, push or test" ;;
    esac
done
