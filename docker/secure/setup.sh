#!/bin/sh
# Makes what the service and its callers show each other:  setup.sh DATA SECRETS NAME...
#
# NAMEs are the names and addresses by which the service is called. SECRETS has a folder for each who gets something:
#   authority/   ca.key, ca.pem               signs certificates; whoever has its key can pass for the service
#   service/     server.key, server.pem       a certificate of 90 days
#   operator/    key, ca.pem                  for `kvbank tenant`, `kvbank key`, `kvbank stats`, and Prometheus
#   worker-1/    key, ca.pem                  each worker is a tenant of its own, whose banks it may make and delete
#   worker-2/    key, ca.pem
# What is there stays; but a certificate that has less than 30 days left, or other names, is made anew, also while the
# service runs, which takes it up. Keys are made in the data folder DATA, and so while no service runs.
set -eu
umask 077
data=$1 secrets=$2
shift 2

authority=$secrets/authority service=$secrets/service
mkdir -p "$authority" "$service"

# quiet COMMAND...: run a command whose words count only where it fails.
quiet() {
    said=$("$@" 2>&1) || {
        printf 'setup: %s failed:\n%s\n' "$1 $2" "$said" >&2
        exit 1
    }
}

if [ ! -s "$authority/ca.pem" ]; then
    quiet openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -subj "/CN=kvbank authority" -keyout "$authority/ca.key" -out "$authority/ca.new"
    mv "$authority/ca.new" "$authority/ca.pem"
fi

if [ "$(cat "$service/names" 2>/dev/null)" != "$*" ] ||
    ! openssl x509 -in "$service/server.pem" -noout -checkend 2592000 >/dev/null 2>&1; then
    names=
    for name in "$@"; do
        case $name in
            "") ;;
            *:*) names=$names,IP:$name ;;
            *[!0-9.]*) names=$names,DNS:$name ;;
            *) names=$names,IP:$name ;;
        esac
    done
    quiet openssl req -x509 -CA "$authority/ca.pem" -CAkey "$authority/ca.key" -newkey ec \
        -pkeyopt ec_paramgen_curve:P-256 -nodes -days 90 -subj "/CN=$1" -addext "subjectAltName=${names#,}" \
        -addext basicConstraints=critical,CA:FALSE -keyout "$service/new.key" -out "$service/new.pem"
    mv "$service/new.key" "$service/server.key"
    mv "$service/new.pem" "$service/server.pem"
    printf '%s\n' "$*" >"$service/names"
    echo "setup: a certificate for $*, $(openssl x509 -in "$service/server.pem" -noout -enddate)"
fi

# key FOLDER OPTION...: make a key for the owner of a folder, who has none yet.
key() {
    folder=$secrets/$1
    shift
    mkdir -p "$folder"
    cp "$authority/ca.pem" "$folder/ca.pem"
    [ ! -s "$folder/key" ] || return 0
    rm -f "$folder/key"
    kvbank key create --memory "$data" "$@" --out "$folder/key"
}

key operator --role operator
for worker in worker-1 worker-2; do
    # It may have been made by a run that was ended before the key was.
    if [ ! -s "$secrets/$worker/key" ] && ! said=$(kvbank tenant create "$worker" --memory "$data" 2>&1); then
        case $said in
            *"there is a tenant "*) ;;
            *) printf '%s\n' "$said" >&2 && exit 1 ;;
        esac
    fi
    # Sessions make, change and delete their banks, which is for admins; one of some banks alone makes no keys.
    key "$worker" --tenant "$worker" --role admin --bank 'session-*'
done
