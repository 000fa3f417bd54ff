#!/bin/sh
# Makes the user by which services work in the database. It changes rows and owns nothing, so that row-level security binds
# it (docs/security.md). PostgreSQL's container runs this once, when it makes its database; of a store of before that:
#   docker compose -f docker/scale/compose.yaml exec database sh /docker-entrypoint-initdb.d/roles.sh
set -eu
psql -q -v ON_ERROR_STOP=1 -U "$POSTGRES_USER" -d "$POSTGRES_DB" <<EOF
SELECT 'CREATE ROLE kvbank_service LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'kvbank_service') \gexec
ALTER ROLE kvbank_service PASSWORD '$(cat "$SERVICE_PASSWORD_FILE")';
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO kvbank_service;
GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO kvbank_service;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO kvbank_service;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON SEQUENCES TO kvbank_service;
EOF
