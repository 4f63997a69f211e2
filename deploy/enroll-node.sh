#!/bin/sh
# Enrol this machine as a node and keep the node running: unattended, and safe to run again.
#
#   FOAM_TOKEN="$(cat token)" sh enroll-node.sh --broker mqtts://HOST:8883 --id press-7 --source plant.py
#
# Over ssh:      ssh HOST 'FOAM_TOKEN=... sh -s -- --broker ... --source ...' < enroll-node.sh
# As cloud-init: the script as user data, with the options set in the environment (FOAM_BROKER …).
#
# Needs the `foam` command (pip install "/path/to/clone[node]"), or FOAM_WHEEL naming what to install.
# The token is read from the environment or from a file, never from the command line, which every
# user of a machine can read.
set -eu

broker=${FOAM_BROKER:-} identity=${FOAM_ID:-} source=${FOAM_SOURCE:-} site=${FOAM_SITE:-local}
data=${FOAM_DATA:-} wheel=${FOAM_WHEEL:-} token_file=${FOAM_TOKEN_FILE:-} service=auto

say() { printf 'enroll-node: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
usage() {
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    cat >&2 <<'END'

Options (and variables):
  --broker URL       mqtts://host:8883 (FOAM_BROKER)
  --source FILE      node file or Python file to run (FOAM_SOURCE)
  --id ID            identity; default: the host name (FOAM_ID)
  --site SITE        site to join; default: local (FOAM_SITE)
  --token-file FILE  join token; else FOAM_TOKEN (FOAM_TOKEN_FILE)
  --data FOLDER      where keys and papers are kept; default: /var/lib/foam as root (FOAM_DATA)
  --no-service       enrol only
END
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --broker) broker=$2; shift 2 ;;
        --source) source=$2; shift 2 ;;
        --id) identity=$2; shift 2 ;;
        --site) site=$2; shift 2 ;;
        --token-file) token_file=$2; shift 2 ;;
        --data) data=$2; shift 2 ;;
        --no-service) service=no; shift ;;
        *) usage ;;
    esac
done

[ -n "$broker" ] || { say "--broker is missing"; usage; }
[ -n "$source" ] || [ "$service" = no ] || { say "--source is missing"; usage; }
if [ -z "$identity" ]; then
    identity=$(hostname | tr -c 'A-Za-z0-9_\n-' '-' | cut -c1-64)
fi
if [ -z "$data" ]; then
    if [ "$(id -u)" = 0 ]; then data=/var/lib/foam; else data=${XDG_STATE_HOME:-$HOME/.local/state}/foam; fi
fi

if ! command -v foam > /dev/null 2>&1; then
    [ -n "$wheel" ] || die "there is no foam command: install it, or set FOAM_WHEEL to what pip should install"
    command -v python3 > /dev/null 2>&1 || die "there is no python3"
    python3 -m venv "$data/venv" || die "python3 cannot make virtual environments (python3-venv)"
    "$data/venv/bin/pip" install --quiet "$wheel"
    PATH=$data/venv/bin:$PATH
fi
foam=$(command -v foam)

umask 077
mkdir -p "$data"
paper=$data/identities/$identity.json
before=$(cat "$paper" 2> /dev/null || true)
# Where the machine has papers, foam tries them, and looks at the token only if they are refused.
if [ -n "$token_file" ]; then
    foam enroll --broker "$broker" --token "$token_file" --id "$identity" --site "$site" --data "$data" > /dev/null
elif [ -n "${FOAM_TOKEN:-}" ]; then
    printf '%s\n' "$FOAM_TOKEN" \
        | env -u FOAM_TOKEN foam enroll --broker "$broker" --token - --id "$identity" --site "$site" --data "$data" > /dev/null
elif [ -n "$before" ]; then
    foam enroll --broker "$broker" --id "$identity" --site "$site" --data "$data" > /dev/null
else
    die "no join token: set FOAM_TOKEN, or give --token-file"
fi
[ "$before" = "$(cat "$paper")" ] || say "$identity has joined $broker"

[ "$service" != no ] || exit 0
source=$(readlink -f "$source") || die "$source does not exist"
unit="[Unit]
Description=FOAM node $identity
Wants=network-online.target
After=network-online.target

[Service]
ExecStart=$foam node $source --identity $paper --data $data
Restart=always
RestartSec=2
# The agent gives its functions control groups of their own.
Delegate=yes
KillMode=mixed
TimeoutStopSec=40
NoNewPrivileges=yes
UMask=0077

[Install]
WantedBy=$([ "$(id -u)" = 0 ] && echo multi-user.target || echo default.target)
"
if ! command -v systemctl > /dev/null 2>&1 || [ ! -d /run/systemd/system ]; then
    say "no systemd here; run: foam node $source --identity $paper --data $data"
    exit 0
fi
if [ "$(id -u)" = 0 ]; then
    file=/etc/systemd/system/foam-node-$identity.service scope=
else
    file=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user/foam-node-$identity.service scope=--user
    mkdir -p "$(dirname "$file")"
fi
umask 022
if [ "$(cat "$file" 2> /dev/null)" != "$(printf '%s' "$unit")" ]; then
    printf '%s' "$unit" > "$file"
    systemctl $scope daemon-reload
fi
systemctl $scope enable --quiet --now "foam-node-$identity.service"
[ -z "$before" ] || [ "$before" = "$(cat "$paper")" ] || systemctl $scope restart "foam-node-$identity.service"
say "foam-node-$identity.service is running"
