# Paths and functions that server.sh, backup.sh and restore.sh share.
# MLFLOW_HOME     folder of the database, the artifacts and the logs; default: /var/lib/adaptnet-mlflow for root, else
#                 ~/mlflow-server
# MLFLOW_DB_USER  user that runs PostgreSQL if root starts it (PostgreSQL refuses to run as root); default: postgres
# MLFLOW_PYTHON   Python interpreter with mlflow; default: that of .venv in this checkout

umask 077
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$here/../.." && pwd)
if [ "$(id -u)" = 0 ]; then
    home=${MLFLOW_HOME:-/var/lib/adaptnet-mlflow} user=${MLFLOW_DB_USER:-postgres}
else
    home=${MLFLOW_HOME:-$HOME/mlflow-server} user=$(id -un)
fi
home=$(realpath -m "$home")
python=${MLFLOW_PYTHON:-$checkout/.venv/bin/python}
sockets=$home/db/sockets
database="postgresql://mlflow@/mlflow?host=$sockets"
users="postgresql://mlflow@/mlflow_users?host=$sockets"

say() { echo "mlflow: $*" >&2; }
die() {
    say "$*"
    exit 1
}

as_postgres() { # COMMAND...: runs it as the owner of the database, in the folder of the database
    if [ "$(id -un)" = "$user" ]; then (cd "$home/db" && "$@"); else (cd "$home/db" && runuser -u "$user" -- "$@"); fi
}

find_postgres() { # sets bin: the release that created this database, otherwise Debian's newest
    local release
    release=$(cat "$home/db/data/PG_VERSION" 2>/dev/null || ls /usr/lib/postgresql 2>/dev/null | sort -V | tail -1) || true
    bin=/usr/lib/postgresql/$release/bin
    [ -n "$release" ] && [ -x "$bin/initdb" ] ||
        die "PostgreSQL${release:+ $release} is not installed: apt-get install postgresql${release:+-$release}"
}

# After a reboot the number of our process group may belong to another group, which must not be killed.
boot() { cat /proc/sys/kernel/random/boot_id; }
is_server_up() {
    [ "$(cat "$home/server.boot" 2>/dev/null)" = "$(boot)" ] && kill -0 -- "-$(cat "$home/server.pid")" 2>/dev/null
}
stop_server() { # ends its process group, after 10 s with SIGKILL
    local left
    for left in $(seq 110); do
        is_server_up || break
        [ "$left" != 1 ] || kill -TERM -- "-$(cat "$home/server.pid")" 2>/dev/null || true
        [ "$left" -lt 100 ] || kill -KILL -- "-$(cat "$home/server.pid")" 2>/dev/null || true
        sleep 0.1
    done
    rm -f "$home/server.pid" "$home/server.boot"
}
lock_home() { # for operations that must not run concurrently; another one waits up to 120 s
    exec 9>"$home/lock" && flock -w 120 9 || die "another start or restore of $home is running"
}
require_server() { [ -e "$home/db/ready" ] || die "$home: no server here yet; create it with infra/mlflow/server.sh start"; }
is_database_up() { as_postgres "$bin/pg_ctl" -D "$home/db/data" status >/dev/null 2>&1; }

start_database() {
    is_database_up && return
    as_postgres "$bin/pg_ctl" -D "$home/db/data" -l "$home/db/log" -w -t 60 start >/dev/null 9>&- ||
        die "PostgreSQL does not start; last lines of its log: $(tail -3 "$home/db/log" 2>/dev/null)"
}

sql() { # DATABASE QUERY
    PGOPTIONS=--client-min-messages=warning as_postgres "$bin/psql" -h "$sockets" -U mlflow -d "$1" -XAtqc "$2"
}
