#!/usr/bin/env bash
# Install, upgrade, scale and uninstall on the cluster that KUBECONFIG points at (kind included).
#
# KUBECONFIG, REGISTRY   required; the images must be there (make images push REGISTRY=...)
# RELEASE, NAMESPACE     made for this, and removed at the end
# CHART                  another copy of the chart
# HELM_FLAGS             for install and upgrade; HELM_TEST_FLAGS for the tests (default --logs)
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { printf 'test-cluster: %s\n' "$*" >&2; exit 2; }
[ -n "${KUBECONFIG:-}" ] || fail "KUBECONFIG is not set: make test-cluster KUBECONFIG=... REGISTRY=..."
[ -n "${REGISTRY:-}" ] || fail "REGISTRY is not set: where the images are"
chart=${CHART:-charts/lagwise}
read -ra flags <<<"${HELM_FLAGS:-}"
read -ra test_flags <<<"${HELM_TEST_FLAGS---logs}"
release=${RELEASE:-lagwise-test} namespace=${NAMESPACE:-lagwise-test}
helm=(.tools/helm --namespace "$namespace")
kubectl=(.tools/kubectl --namespace "$namespace")
lagwise=("${VENV:-.venv}/bin/python" -m shared.cli.main)
values=(-f examples/frozen_lake/values.yaml --set "image.registry=$REGISTRY" --set autoscaling.mode=external
    --set rollout.replicas=null --set env_agents.replicas=null --set logit_oracle.replicas=null
    --set config.learner.eval.episodes=0)
say() { printf 'test-cluster: %s\n' "$*"; }
clean() {
    "${helm[@]}" uninstall "$release" --wait >/dev/null 2>&1 || true
    "${kubectl[@]}" delete pvc -l "app.kubernetes.io/instance=$release" --ignore-not-found >/dev/null 2>&1 || true
}
replicas() { "${kubectl[@]}" get deployment "$release-rollout" -o 'jsonpath={.spec.replicas}'; }

"${kubectl[@]}" get namespace "$namespace" >/dev/null 2>&1 || "${kubectl[@]}" create namespace "$namespace"
# Restricted Pod Security must let everything in.
"${kubectl[@]}" label --overwrite namespace "$namespace" pod-security.kubernetes.io/enforce=restricted
trap clean EXIT
say "install"
"${helm[@]}" install "$release" "$chart" "${values[@]}" "${flags[@]}" --wait --timeout 10m
"${helm[@]}" test "$release" "${test_flags[@]}"
say "scale"
"${lagwise[@]}" scale rollout 3 --release "$release" --namespace "$namespace"
"${kubectl[@]}" rollout status "deployment/$release-rollout" --timeout 5m
"${lagwise[@]}" status --release "$release" --namespace "$namespace"
say "upgrade"
"${helm[@]}" upgrade "$release" "$chart" "${values[@]}" "${flags[@]}" --set config.telemetry.drain_s=20 --wait --timeout 10m
[ "$(replicas)" = 3 ] || fail "helm upgrade reset the rollouts to $(replicas)"
"${helm[@]}" test "$release" "${test_flags[@]}"
say "drain"
pod=$("${kubectl[@]}" get pods -l app.kubernetes.io/component=learner -o 'jsonpath={.items[0].metadata.name}')
"${kubectl[@]}" delete pod "$pod" --wait=true
"${kubectl[@]}" rollout status "statefulset/$release-learner" --timeout 5m
say "uninstall"
"${helm[@]}" uninstall "$release" --wait
# Helm waits for what it made, not for the pods of it, which drain first.
"${kubectl[@]}" wait --for=delete pods -l "app.kubernetes.io/instance=$release" --timeout 5m
left=$("${kubectl[@]}" get all -l "app.kubernetes.io/instance=$release" -o name)
[ -z "$left" ] || fail "left behind: $left"
say "OK"
