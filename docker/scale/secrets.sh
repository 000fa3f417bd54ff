#!/bin/sh
# Makes the words by which the parts of docker/scale/compose.yaml know each other:  secrets.sh FOLDER
#
# FOLDER has a folder for each who gets something, which only its container mounts:
#   database/   password                                 of PostgreSQL's user kvbank
#   bucket/     s3.json                                  keys of the server of objects
#   store/      pgpass, env                              the same for the services, and the bucket's maker
#   grafana/    password                                 of Grafana's user admin
# What is there stays. Nothing has a password that stands in a file of the repository.
set -eu
umask 022
folder=$1

# word: print a random word of 40 letters and digits.
word() {
    od -An -N20 -tx1 /dev/urandom | tr -d ' \n'
}

for name in database bucket store grafana; do
    mkdir -p "$folder/$name"
done
[ -s "$folder/grafana/password" ] || word >"$folder/grafana/password"
if [ ! -s "$folder/store/env" ]; then
    password=$(word) access=$(word) secret=$(word)
    printf '%s' "$password" >"$folder/database/password"
    printf '{"identities": [{"name": "kvbank", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["%s"]}]}\n' \
        "$access" "$secret" 'Read:kvbank", "Write:kvbank", "List:kvbank' >"$folder/bucket/s3.json"
    (
        umask 077 # PostgreSQL's library refuses a file that others can read.
        printf 'database:5432:kvbank:kvbank:%s\n' "$password" >"$folder/store/pgpass"
        printf 'AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\n' "$access" "$secret" >"$folder/store/env.new"
    )
    # Last, so that a run that was ended before makes all of them anew.
    mv "$folder/store/env.new" "$folder/store/env"
fi
