#!/usr/bin/env bash
# Backs up the server of this MLFLOW_HOME into a new folder while it runs. The folder appears only when it is complete.
# The database is copied before the artifacts, so that every artifact that it refers to is in the copy.
#
#   infra/mlflow/backup.sh FOLDER
set -euo pipefail
source "$(dirname "$0")/common.sh"

target=${1:?give a new folder for the backup}
[ ! -e "$target" ] || die "$target already exists; give a new folder"
find_postgres
require_server
mkdir -p "$(dirname "$target")"
start_database
incomplete=$(mktemp -d "$(dirname "$(realpath -m "$target")")/.backup.XXXXXX")
trap 'rm -rf "$incomplete"' EXIT
for name in mlflow mlflow_users; do
    as_postgres "$bin/pg_dump" -h "$sockets" -U mlflow --format=custom --no-owner "$name" >"$incomplete/$name.dump"
done
case ${MLFLOW_ARTIFACTS:-$home/artifacts} in
    *://*) say "the artifacts are in $MLFLOW_ARTIFACTS: back them up there" ;;
    *) # status 1: a file that is being uploaded changed; the database does not refer to it yet
        tar -C "${MLFLOW_ARTIFACTS:-$home/artifacts}" --warning=no-file-changed -cf "$incomplete/artifacts.tar" . ||
            [ $? = 1 ] || die "the artifacts could not be copied" ;;
esac
(cd "$incomplete" && sha256sum ./* >SHA256SUMS)
sync
mv -T "$incomplete" "$target"
say "backed up to $target: $(du -sh "$target" | cut -f1)"
