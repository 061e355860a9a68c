#!/usr/bin/env bash
# Build a Kubernetes control plane into .tools/kubernetes: apiserver, controller manager, scheduler, etcd.
#
# scripts/control_plane.sh     about 10 minutes on two cores, 3 GB of build cache which is deleted
# Everything comes from the distribution, checked by apt: Debian's source package of Kubernetes (1.20, the
# last with the servers in it), Debian's Go that compiles it, Debian's etcd. Nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

target=$PWD/${TOOLS_DIR:-.tools}/kubernetes
servers=(kube-apiserver kube-controller-manager kube-scheduler)
go=golang-1.19
say() { printf 'control plane: %s\n' "$*"; }
fail() { printf 'control plane: %s\n' "$*" >&2; exit 2; }

missing=0
for name in "${servers[@]}" etcd; do [ -x "$target/$name" ] || missing=1; done
[ $missing = 1 ] || exit 0
[ "$(uname -sm)" = "Linux x86_64" ] || fail "only on Linux x86_64"
command -v apt-get >/dev/null || fail "needs Debian's packages (apt-get)"

mkdir -p "$target"
work=$(mktemp -d "$target/.build.XXXXXX")
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,parts,debs,unpacked,gopath/src/k8s.io}

# The machine's own package sources, asked for source packages too; its lists stay as they are.
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources}; do
    [ -f "$file" ] || continue
    sed -e 's/^Types: deb$/Types: deb-src/' -e 's/^deb /deb-src /' "$file" >"$work/parts/$(basename "$file" .list)$(
        [[ $file == *.sources ]] || echo .list)"
done
apt=(apt-get --quiet --quiet -o APT::Sandbox::User=root)
say "fetching"
(
    cd "$work/debs"
    "${apt[@]}" -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/parts" \
        -o "Dir::State::lists=$work/lists" update
    "${apt[@]}" -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/parts" \
        -o "Dir::State::lists=$work/lists" source --download-only kubernetes
    "${apt[@]}" download "$go-go" "$go-src" etcd-server rsync jq libjq1 libonig5 libpopt0 libxxhash0
    for deb in *.deb; do dpkg -x "$deb" "$work/unpacked"; done
) || fail "a package is missing: does apt know the suite bookworm of Debian?"

source=$work/gopath/src/k8s.io/kubernetes
mkdir "$source"
tar --extract --strip-components=1 --directory "$source" --file "$work"/debs/kubernetes_*.orig.tar.gz
version=$(sed -n 's/^.*really\([0-9.]*\)-.*/\1/p' <<<"$(basename "$work"/debs/kubernetes_*.dsc)")
version=${version:-1.20.2}
cat >"$work/version" <<VERSION
KUBE_GIT_COMMIT=archive
KUBE_GIT_TREE_STATE=archive
KUBE_GIT_VERSION=v$version
KUBE_GIT_MAJOR=1
KUBE_GIT_MINOR=$(cut -d. -f2 <<<"$version")
VERSION
say "building $version"
(
    cd "$source"
    export GOROOT=$work/unpacked/usr/lib/${go/golang/go} GOPATH=$work/gopath GOCACHE=$work/cache HOME=$work
    export PATH=$GOROOT/bin:$work/unpacked/usr/bin:$PATH LD_LIBRARY_PATH=$work/unpacked/usr/lib/x86_64-linux-gnu
    export CGO_ENABLED=0 GO111MODULE=off GOPROXY=off KUBE_GIT_VERSION_FILE=$work/version
    make WHAT="${servers[*]/#/cmd/}" >"$work/log" 2>&1
) || { tail -20 "$work/log" >&2; fail "it does not build"; }
for name in "${servers[@]}"; do install "$source/_output/bin/$name" "$target/$name"; done
install "$work/unpacked/usr/bin/etcd" "$target/etcd"
say "done: $target"
