#!/bin/sh
# Makes the virtual environment of one version: venv.sh NAME VERSION. Nothing of an older version is touched.
set -eu
name=$1 version=$2 place=/opt/$1.versions/$2 lib=/usr/lib/$1
rm -rf "$place.new" "$place"
mkdir -p "/opt/$name.versions"
flags=$(sh "$lib/install-torch.sh" --venv-flags)
# shellcheck disable=SC2086 - none or one word
/usr/bin/python3 -m venv $flags "$place"
extras=$([ "$name" = coordinator ] && echo 'coordinator,postgres' || echo 'device')
"$place/bin/python" -m pip install -q --disable-pip-version-check --no-index --find-links "$lib/wheels" "rankfleet[$extras]==$version"
# What the version before had beside our own wheels, torch above all, is linked and not fetched again; another Python has to fetch it.
before=$(readlink "/opt/$name" 2>/dev/null || true)
new=$(echo "$place"/lib/python3.*/site-packages)
old=$before${new#"$place"}
if [ -n "$before" ] && [ "$before" != "$place" ] && [ -d "$old" ]; then
    for entry in "$old"/*; do
        [ -e "$new/${entry##*/}" ] || case ${entry##*/} in rankfleet-*) ;; *) cp -al "$entry" "$new/" ;; esac
    done
fi
if [ "$name" = edge-agent ] && [ -z "${RANKFLEET_NO_TORCH:-}" ]; then
    # A device without a network can be given them later; until then the agent says what is missing.
    if sh "$lib/install-torch.sh" "$place/bin/python"; then
        "$place/bin/python" -m pip install -q --disable-pip-version-check --find-links "$lib/wheels" "rankfleet[agent]==$version" ||
            echo "transformers could not be installed: edge-agent doctor says what to do" >&2
    else
        echo "torch could not be installed: edge-agent doctor says what to do" >&2
    fi
fi
