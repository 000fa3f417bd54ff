#!/bin/sh
# Makes certificates and keys of a store that is in a database:  keys.sh SECRETS NAME...
#
# Keys are made by a service on a socket that only this container has, and which ends again; it also makes the tables of
# an empty database. What is made is what docker/secure/setup.sh (or the script SETUP) makes, and besides:
#   balancer/    service.pem, ca.pem    what HAProxy reads: the certificate with its key
#   watching/    key, ca.pem            the operator's key, for Prometheus
set -eu
secrets=$1 own=$(mktemp -d)
socket=$own/socket
shift

kvbank serve --listen "unix:$socket" --cache "$own/cache" &
service=$!
trap 'kill "$service" 2>/dev/null || :' EXIT
# The socket is there when the service listens; where it ends before that, it has said why.
until [ -S "$socket" ]; do
    kill -0 "$service" 2>/dev/null || exit 1
    sleep 1
done
/bin/sh "${SETUP:-/usr/local/bin/kvbank-setup}" "unix:$socket" "$secrets" "$@"
kill "$service"
wait "$service" || :
trap - EXIT
rm -rf "$own"

umask 022
mkdir -p "$secrets/balancer" "$secrets/watching"
cat "$secrets/service/server.pem" "$secrets/service/server.key" >"$secrets/balancer/service.new"
mv "$secrets/balancer/service.new" "$secrets/balancer/service.pem"
cp "$secrets/authority/ca.pem" "$secrets/balancer/ca.pem"
cp "$secrets/authority/ca.pem" "$secrets/watching/ca.pem"
cat "$secrets/operator/key" >"$secrets/watching/key"
