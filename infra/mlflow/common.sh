# What server.sh, backup.sh and restore.sh share: where things lie, and PostgreSQL's user.
# MLFLOW_HOME     folder of the database, the artifacts and the logs; default /var/lib/adaptnet-mlflow for root, else
#                 mlflow-server in the user's home
# MLFLOW_DB_USER  the user that PostgreSQL runs as where root starts it, which it refuses to be; default postgres
# MLFLOW_PYTHON   the Python that has mlflow; default .venv of this checkout

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

as_postgres() { # COMMAND...: as the user that owns the database, in its folder
    if [ "$(id -un)" = "$user" ]; then (cd "$home/db" && "$@"); else (cd "$home/db" && runuser -u "$user" -- "$@"); fi
}

find_postgres() { # sets bin: Debian's newest, or that which this database was made with
    local release
    release=$(cat "$home/db/data/PG_VERSION" 2>/dev/null || ls /usr/lib/postgresql 2>/dev/null | sort -V | tail -1) || true
    bin=/usr/lib/postgresql/$release/bin
    [ -n "$release" ] && [ -x "$bin/initdb" ] ||
        die "PostgreSQL${release:+ $release} is not installed here: apt-get install postgresql${release:+-$release}"
}

# A process group's number is given out anew after the machine has started anew: another's must not be ended.
boot() { cat /proc/sys/kernel/random/boot_id; }
is_server_up() {
    [ "$(cat "$home/server.boot" 2>/dev/null)" = "$(boot)" ] && kill -0 -- "-$(cat "$home/server.pid")" 2>/dev/null
}
end_server() { # its whole process group; by force after 10 s
    local left
    for left in $(seq 110); do
        is_server_up || break
        [ "$left" != 1 ] || kill -TERM -- "-$(cat "$home/server.pid")" 2>/dev/null || true
        [ "$left" -lt 100 ] || kill -KILL -- "-$(cat "$home/server.pid")" 2>/dev/null || true
        sleep 0.1
    done
    rm -f "$home/server.pid" "$home/server.boot"
}
take_turn() { # for what must not go on twice at once; others are told
    exec 9>"$home/lock" && flock -w 120 9 || die "another start or restore of $home is under way"
}
must_be_here() { [ -e "$home/db/ready" ] || die "$home: no server here yet; infra/mlflow/server.sh start makes one"; }
is_database_up() { as_postgres "$bin/pg_ctl" -D "$home/db/data" status >/dev/null 2>&1; }

start_database() {
    is_database_up && return
    as_postgres "$bin/pg_ctl" -D "$home/db/data" -l "$home/db/log" -w -t 60 start >/dev/null 9>&- ||
        die "PostgreSQL does not start; its last words: $(tail -3 "$home/db/log" 2>/dev/null)"
}

sql() { # DATABASE QUERY
    PGOPTIONS=--client-min-messages=warning as_postgres "$bin/psql" -h "$sockets" -U mlflow -d "$1" -XAtqc "$2"
}
