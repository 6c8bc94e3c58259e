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
artifacts=${MLFLOW_ARTIFACTS:-$home/artifacts}
case $artifacts in
    *://*) [ ! -e "$source_folder/artifacts.tar" ] ||
        die "$source_folder holds artifacts, and this server keeps its own in $artifacts: unpack artifacts.tar to there," \
            "remove it from a copy of the backup and from its SHA256SUMS, and restore that" ;;
esac
find_postgres
must_be_here
take_turn
start_database
held=$(sql mlflow "SELECT (SELECT count(*) FROM runs) + (SELECT count(*) FROM registered_models)")
[ "$held" = 0 ] || die "$home: holds $held runs and models already; restore into an empty server (another MLFLOW_HOME)"
was_up=
if is_server_up; then was_up=1; fi

# Aside first: should this end half-way, the server is as empty as it was, and the same command does it all.
for name in mlflow mlflow_users; do
    sql postgres "DROP DATABASE IF EXISTS ${name}_restored"
    sql postgres "CREATE DATABASE ${name}_restored"
    as_postgres "$bin/pg_restore" -h "$sockets" -U mlflow --no-owner --exit-on-error -d "${name}_restored" \
        <"$source_folder/$name.dump"
done
if [ -e "$source_folder/artifacts.tar" ]; then
    tar -C "$artifacts" -xf - <"$source_folder/artifacts.tar"
fi
end_server
rm -f "$home/upgraded" # a backup of an older MLflow's tables is brought up to date at the next start
for name in mlflow_users mlflow; do # the one that is asked whether it is empty comes last
    sql postgres "DROP DATABASE IF EXISTS $name WITH (FORCE)"
    sql postgres "ALTER DATABASE ${name}_restored RENAME TO $name"
    sql "$name" ANALYZE # no backup brings the statistics without which a large registry takes minutes to list
done
say "restored from $source_folder"
exec 9>&-
if [ -n "$was_up" ]; then "$here/server.sh" start; fi
