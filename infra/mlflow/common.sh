# What server.sh, backup.sh and restore.sh share: where things lie, and PostgreSQL's user.
# MLFLOW_HOME     folder of the database, the artifacts and the logs; default /var/lib/adaptnet-mlflow for root, else
#                 mlflow-server in the user's home
# MLFLOW_DB_USER  the user that PostgreSQL runs as where root starts it, which it refuses to be; default postgres
# MLFLOW_PYTHON   the Python that has mlflow; default .venv of this checkout

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

find_postgres() { # sets bin: the newest of Debian's
    bin=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1)
    [ -x "$bin/initdb" ] || die "PostgreSQL is not installed here: apt-get install postgresql"
}

is_server_up() { [ -e "$home/server.pid" ] && kill -0 -- "-$(cat "$home/server.pid")" 2>/dev/null; }
is_database_up() { as_postgres "$bin/pg_ctl" -D "$home/db/data" status >/dev/null 2>&1; }

start_database() {
    is_database_up && return
    as_postgres "$bin/pg_ctl" -D "$home/db/data" -l "$home/db/log" -w -t 60 start >/dev/null 9>&- ||
        die "PostgreSQL does not start; its last words: $(tail -3 "$home/db/log" 2>/dev/null)"
}

sql() { # DATABASE QUERY
    as_postgres "$bin/psql" -h "$sockets" -U mlflow -d "$1" -XAtqc "$2"
}
