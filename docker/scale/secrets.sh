#!/bin/sh
# Makes the words by which the parts of docker/scale/compose.yaml know each other:  secrets.sh FOLDER
#
# FOLDER has a folder for each who gets something, which only its container mounts:
#   database/   password, service                        of PostgreSQL's users kvbank, which owns the tables, and kvbank_service
#   bucket/     s3.json                                  keys of the server of objects
#   store/      pgpass, env                              what services know of both: the password of kvbank_service, and the keys
#   owner/      pgpass, env                              the same with the password of kvbank, for who makes the tables
#   grafana/    password                                 of Grafana's user admin
# What is there stays. Nothing has a password that stands in a file of the repository.
set -eu
umask 022
folder=$1

# word: print a random word of 40 letters and digits.
word() {
    od -An -N20 -tx1 /dev/urandom | tr -d ' \n'
}

# login FOLDER USER PASSWORD: write down how the user of the database logs in.
login() (
    umask 077 # PostgreSQL's library refuses a file that others can read.
    printf 'database:5432:kvbank:%s:%s\n' "$2" "$3" >"$folder/$1/pgpass"
)

for name in database bucket store owner grafana; do
    mkdir -p "$folder/$name"
done
[ -s "$folder/grafana/password" ] || word >"$folder/grafana/password"
if [ ! -s "$folder/store/env" ]; then
    access=$(word) secret=$(word)
    printf '{"identities": [{"name": "kvbank", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["%s"]}]}\n' \
        "$access" "$secret" 'Read:kvbank", "Write:kvbank", "List:kvbank' >"$folder/bucket/s3.json"
    word >"$folder/database/password"
    (
        umask 077
        printf 'AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\n' "$access" "$secret" >"$folder/store/env.new"
    )
    # Last, so that a run that was ended before makes all of them anew.
    mv "$folder/store/env.new" "$folder/store/env"
fi
# A store of before the user kvbank_service gets these too; then roles.sh makes the user.
if [ ! -s "$folder/owner/env" ]; then
    word >"$folder/database/service"
    login owner kvbank "$(cat "$folder/database/password")"
    login store kvbank_service "$(cat "$folder/database/service")"
    cp -p "$folder/store/env" "$folder/owner/env.new"
    mv "$folder/owner/env.new" "$folder/owner/env"
fi
