#!/usr/bin/env bash
# Writes all that the server of this home holds into a new folder, whole or not at all, while it runs:
# the database first, so that every artifact it speaks of is in the copy that follows.
#
#   infra/mlflow/backup.sh FOLDER
set -euo pipefail
source "$(dirname "$0")/common.sh"

target=${1:?give a folder for the backup}
[ ! -e "$target" ] || die "$target exists already; name a new folder"
find_postgres
must_be_here
mkdir -p "$(dirname "$target")"
start_database
aside=$(mktemp -d "$(dirname "$(realpath -m "$target")")/.backup.XXXXXX")
trap 'rm -rf "$aside"' EXIT
for name in mlflow mlflow_users; do
    as_postgres "$bin/pg_dump" -h "$sockets" -U mlflow --format=custom --no-owner "$name" >"$aside/$name.dump"
done
case ${MLFLOW_ARTIFACTS:-$home/artifacts} in
    *://*) say "the artifacts are in $MLFLOW_ARTIFACTS: back them up there" ;;
    *) # 1: a file has changed meanwhile: one that is just coming in, of which the database does not speak yet
        tar -C "${MLFLOW_ARTIFACTS:-$home/artifacts}" --warning=no-file-changed -cf "$aside/artifacts.tar" . ||
            [ $? = 1 ] || die "the artifacts could not be copied" ;;
esac
(cd "$aside" && sha256sum ./* >SHA256SUMS)
sync
mv -T "$aside" "$target"
say "backed up to $target: $(du -sh "$target" | cut -f1)"
