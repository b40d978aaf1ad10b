#!/bin/sh
# Builds edge-agent_*.deb and coordinator_*.deb, with checksums and a list of what is inside (SBOM, CycloneDX).
#
# usage: build.sh OUT PYTHON [VERSION [PROGRAM]]
#
# Each package brings our wheel and the wheels that it needs for this machine, so that it installs without an index; torch and
# transformers are not among them: torch depends on the device (install-torch.sh), and both are fetched when the agent is installed.
set -eu
out=$1 python=$2
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
version=${3:-$(sed -n 's/^VERSION = "\(.*\)"/\1/p' "$root/federated/version.py")}
arch=$(dpkg --print-architecture)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/source" "$work/trees" "$work/wheels"

for part in pyproject.toml README.md LICENSE rankfleet edge_agent coordinator profiles bandit federated; do
    cp -r "$root/$part" "$work/source/"
done
sed -i "s/^VERSION = .*/VERSION = \"$version\"/" "$work/source/federated/version.py"
"$python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$work/wheels" "$work/source"
# The wheels beside ours are compiled for one version of Python, which the package therefore asks for.
this=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
next=$("$python" -c 'import sys; print("%d.%d" % (sys.version_info[0], sys.version_info[1] + 1))')

# What each program imports beside torch and transformers.
need() {
    case $1 in
    coordinator) echo 'coordinator,postgres' ;;
    edge-agent) echo 'device' ;;
    esac
}

package() {
    name=$1 config=$2 place=$3 tree=$work/trees/$1
    mkdir -p "$tree/DEBIAN" "$tree/usr/lib/$name/wheels" "$tree/usr/bin" "$tree/lib/systemd/system" "$tree$place" "$tree/usr/share/doc/$name"
    "$python" -m pip wheel -q --disable-pip-version-check -w "$tree/usr/lib/$name/wheels" "$(echo "$work"/wheels/rankfleet-*.whl)[$(need "$name")]"
    cp "$root/packaging/install-torch.sh" "$here/venv.sh" "$here/switch.sh" "$tree/usr/lib/$name/"
    cp "$root/packaging/systemd/$name.service" "$tree/lib/systemd/system/"
    cp "$root/packaging/config/$config.yaml" "$tree$place/"
    cp "$root/LICENSE" "$tree/usr/share/doc/$name/copyright"
    ln -s "/opt/$name/bin/$name" "$tree/usr/bin/$name"
    echo "$place/$config.yaml" > "$tree/DEBIAN/conffiles"
    size=$(du -sk "$tree" | cut -f1)
    recommends=$([ "$name" = coordinator ] && echo 'Recommends: mosquitto' || echo 'Suggests: nvidia-jetpack')
    cat > "$tree/DEBIAN/control" <<CONTROL
Package: $name
Version: $version
Architecture: $arch
Maintainer: The rankfleet authors <rankfleet@invalid>
Installed-Size: $size
Depends: python3 (>= $this), python3 (<< $next), python3-venv, adduser
$recommends
Section: science
Priority: optional
Description: $([ "$name" = coordinator ] && echo 'plans and runs federated fine-tuning jobs' || echo 'trains an adapter on this device, for a fleet')
 The program owns a virtual environment under /opt/$name and changes nothing of the system's Python.
CONTROL
    for script in postinst prerm postrm; do
        sed "s/@NAME@/$name/g; s/@VERSION@/$version/g; s|@STATE@|$([ "$name" = coordinator ] && echo /var/lib/rankfleet || echo /var/lib/edge-agent)|g
             s/@USER@/$([ "$name" = coordinator ] && echo rankfleet || echo edge-agent)/g; s|@ETC@|$place|g" "$here/$script" > "$tree/DEBIAN/$script"
        chmod 755 "$tree/DEBIAN/$script"
    done
    dpkg-deb --root-owner-group --build "$tree" "$out/${name}_${version}_$arch.deb" >/dev/null
    sbom "$tree/usr/lib/$name/wheels" > "$out/${name}_${version}_$arch.cdx.json"
}

# Name, version and SHA-256 of every wheel.
sbom() {
    printf '{"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "metadata": {"component": {"type": "application", "name": "%s", "version": "%s"}}, "components": [' "$name" "$version"
    comma=''
    for wheel in "$1"/*.whl; do
        file=$(basename "$wheel") package=${wheel##*/}
        package=${package%%-*} rest=${file#*-}
        printf '%s\n {"type": "library", "name": "%s", "version": "%s", "purl": "pkg:pypi/%s@%s", "hashes": [{"alg": "SHA-256", "content": "%s"}]}' \
            "$comma" "$package" "${rest%%-*}" "$(echo "$package" | tr '_A-Z' '-a-z')" "${rest%%-*}" "$(sha256sum "$wheel" | cut -d' ' -f1)"
        comma=','
    done
    printf '\n]}\n'
}

case ${4:-both} in both | edge-agent) package edge-agent agent /etc/edge-agent ;; esac
case ${4:-both} in both | coordinator) package coordinator coordinator /etc/rankfleet ;; esac
(cd "$out" && sha256sum ./*"_${version}_"* > "SHA256SUMS-$version")
ls -lh "$out"
