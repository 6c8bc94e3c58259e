#!/usr/bin/env bash
# Restores a backup into an empty server: one that has been started once and contains no runs and no models.
# Users and passwords are those of the backup.
#
#   infra/mlflow/restore.sh FOLDER
set -euo pipefail
source "$(dirname "$0")/common.sh"

source_folder=$(realpath "${1:?give the folder of a backup}")
[ -e "$source_folder/SHA256SUMS" ] || die "$source_folder: not a backup (no SHA256SUMS)"
(cd "$source_folder" && sha256sum --quiet -c SHA256SUMS) || die "$source_folder: damaged; use another backup"
artifacts=${MLFLOW_ARTIFACTS:-$home/artifacts}
case $artifacts in
    *://*) [ ! -e "$source_folder/artifacts.tar" ] ||
        die "$source_folder contains artifacts, but this server stores artifacts in $artifacts: unpack artifacts.tar there," \
            "remove it from a copy of the backup and from its SHA256SUMS, and restore that copy" ;;
esac
find_postgres
require_server
lock_home
start_database
held=$(sql mlflow "SELECT (SELECT count(*) FROM runs) + (SELECT count(*) FROM registered_models)")
[ "$held" = 0 ] || die "$home already contains $held runs and models; restore into an empty server (another MLFLOW_HOME)"
was_up=
if is_server_up; then was_up=1; fi

# Restore under other names first: if this is interrupted, the server is still empty and the command can be repeated.
for name in mlflow mlflow_users; do
    sql postgres "DROP DATABASE IF EXISTS ${name}_restored"
    sql postgres "CREATE DATABASE ${name}_restored"
    as_postgres "$bin/pg_restore" -h "$sockets" -U mlflow --no-owner --exit-on-error -d "${name}_restored" \
        <"$source_folder/$name.dump"
done
if [ -e "$source_folder/artifacts.tar" ]; then
    tar -C "$artifacts" -xf - <"$source_folder/artifacts.tar"
fi
stop_server
rm -f "$home/upgraded" # the next start upgrades the tables, which may be those of an older MLflow
for name in mlflow_users mlflow; do # mlflow last: it tells whether the server is empty
    sql postgres "DROP DATABASE IF EXISTS $name WITH (FORCE)"
    sql postgres "ALTER DATABASE ${name}_restored RENAME TO $name"
    sql "$name" ANALYZE # backups have no statistics; without them listing a large registry takes minutes
done
say "restored from $source_folder"
exec 9>&-
if [ -n "$was_up" ]; then "$here/server.sh" start; fi
