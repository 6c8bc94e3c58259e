#!/usr/bin/env bash
# Puts a backup into an empty server: one of the same home that was started once and holds no run and no model.
# Users and passwords come from the backup.
#
#   infra/mlflow/restore.sh FOLDER
set -euo pipefail
source "$(dirname "$0")/common.sh"

source_folder=$(realpath "${1:?give the folder of a backup}")
[ -e "$source_folder/SHA256SUMS" ] || die "$source_folder: no backup (no SHA256SUMS)"
(cd "$source_folder" && sha256sum --quiet -c SHA256SUMS) || die "$source_folder: damaged; take another backup"
find_postgres
[ -e "$home/db/ready" ] || die "$home: no server here yet; infra/mlflow/server.sh start, then restore"
start_database
held=$(sql mlflow "SELECT (SELECT count(*) FROM runs) + (SELECT count(*) FROM registered_models)")
[ "$held" = 0 ] || die "$home: holds $held runs and models already; restore into an empty server (another MLFLOW_HOME)"
if is_server_up; then
    was_up=1
    kill -TERM -- "-$(cat "$home/server.pid")"
    for _ in $(seq 100); do is_server_up || break; sleep 0.1; done
fi
for name in mlflow mlflow_users; do
    sql postgres "DROP DATABASE $name WITH (FORCE)"
    sql postgres "CREATE DATABASE $name"
    as_postgres "$bin/pg_restore" -h "$sockets" -U mlflow --no-owner --exit-on-error -d "$name" <"$source_folder/$name.dump"
done
if [ -e "$source_folder/artifacts.tar" ]; then
    tar -C "${MLFLOW_ARTIFACTS:-$home/artifacts}" -xf - <"$source_folder/artifacts.tar"
fi
say "restored from $source_folder"
if [ -n "${was_up:-}" ]; then "$here/server.sh" start; fi
