#!/bin/sh
# Lets /opt/NAME be the environment of VERSION, and goes back to the one before unless the program checks in:
#
#   switch.sh NAME VERSION CONFIG [SECONDS]
#
# To check in is to be up and to have reached the broker (edge-agent), or to answer (coordinator). A round that is under way goes
# on after the switch where it was: everything that it needs is on disk.
set -eu
name=$1 version=$2 config=$3 wait=${4:-120}
link=/opt/$name
before=$(readlink "$link" 2>/dev/null || true)

point() { ln -sfn "$1" "$link.new" && mv -T "$link.new" "$link"; }

running() { [ -d /run/systemd/system ] && systemctl -q is-active "$name"; }

answers() {
    case $name in
    edge-agent) "$link/bin/edge-agent" status --config "$config" --json 2>/dev/null | grep -q '"connected": true' &&
        "$link/bin/edge-agent" status --config "$config" --json 2>/dev/null | grep -q "\"agent\": \"$version\"" ;;
    coordinator) "$link/bin/coordinator" status --config "$config" --json >/dev/null 2>&1 ||
        "$link/bin/coordinator" jobs --config "$config" >/dev/null 2>&1 ;;
    esac
}

point "/opt/$name.versions/$version"
if running || [ -n "${RANKFLEET_CHECK_IN:-}" ]; then
    ${RANKFLEET_RESTART:-systemctl restart "$name"}
    seconds=0
    until answers; do
        if [ "$seconds" -ge "$wait" ]; then
            if [ -n "$before" ] && [ "$before" != "/opt/$name.versions/$version" ]; then
                point "$before"
                ${RANKFLEET_RESTART:-systemctl restart "$name"} || true
                echo "$name $version did not check in within $wait s; ${before##*/} runs again" >&2
            else
                echo "$name $version did not check in within $wait s" >&2
            fi
            exit 1
        fi
        sleep 1
        seconds=$((seconds + 1))
    done
fi
# Of the older ones the last stays, for a way back.
for old in "/opt/$name.versions"/*; do
    case $old in "/opt/$name.versions/$version" | "$before") ;; *) rm -rf "$old" ;; esac
done
