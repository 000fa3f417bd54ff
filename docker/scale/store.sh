#!/bin/sh
# Runs a command with the secrets of the store:  store.sh FOLDER COMMAND...
#
# FOLDER is the folder `store` or `owner` that secrets.sh has made; from its files come the variables of PostgreSQL and of S3.
set -eu
PGPASSFILE=$1/pgpass
export PGPASSFILE
set -a
. "$1/env"
set +a
shift
exec "$@"
