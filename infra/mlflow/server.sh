#!/usr/bin/env bash
# A tracking server for a team on a plain Debian host: PostgreSQL, MLflow with login, artifacts in a folder or in S3.
#
#   MLFLOW_AUTH_ADMIN_PASSWORD=... infra/mlflow/server.sh start     the first start needs the password
#   infra/mlflow/server.sh status|stop
#
# The administrator creates the other users in a browser at http://HOST:PORT/signup. Each user sets
# MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
#
# MLFLOW_HOST (127.0.0.1), MLFLOW_PORT (5000), MLFLOW_WORKERS (2), MLFLOW_AUTH_ADMIN_USERNAME (admin)
# MLFLOW_ARTIFACTS   s3://BUCKET/PATH, with MLflow's variables AWS_* and MLFLOW_S3_ENDPOINT_URL; default: a folder
# MLFLOW_ALLOWED_HOSTS   names by which users reach it, as HOST:PORT,...; default: this machine and private networks
# common.sh lists further variables. The database has no password: it listens only on a socket, which only its owner and
# the user who started it can use. MLflow runs as the user who starts it; use an ordinary user if you can.
set -euo pipefail
source "$(dirname "$0")/common.sh"

host=${MLFLOW_HOST:-127.0.0.1} port=${MLFLOW_PORT:-5000} workers=${MLFLOW_WORKERS:-2}
artifacts=${MLFLOW_ARTIFACTS:-$home/artifacts}

check_password() {
    local password=${MLFLOW_AUTH_ADMIN_PASSWORD:-}
    if [ -e "$home/initialised" ] && [ -z "$password" ]; then return; fi
    [ -n "$password" ] || die "set MLFLOW_AUTH_ADMIN_PASSWORD: the first start creates the administrator with it"
    case $password in
        password* | admin* | mlflow* | changeme* | secret*)
            die "MLFLOW_AUTH_ADMIN_PASSWORD begins like a well-known password; choose another" ;;
    esac
    [ ${#password} -ge 12 ] || die "MLFLOW_AUTH_ADMIN_PASSWORD has ${#password} characters; it needs at least 12"
}

check_packages() {
    if [ "$(id -u)" = 0 ] && ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
        say "installing PostgreSQL from Debian's packages"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends postgresql
        } >/dev/null || die "apt-get could not install postgresql"
    fi
    find_postgres
    [ -x "$python" ] || die "$python: no such Python; run infra/venv.sh, or set MLFLOW_PYTHON to one that has mlflow"
    "$python" -c 'from importlib.util import find_spec as f; assert f("flask_wtf") and f("mlflow") and f("psycopg")' \
        2>/dev/null ||
        die "$python lacks packages that the server needs: uv pip install --constraint constraints.txt '.[server]'"
}

make_home() {
    mkdir -p "$home"
    chmod 711 "$home" # the owner of the database must be able to enter it
    lock_home
    mkdir -p "$home/db" "$home/artifacts"
    chmod 700 "$home/db" "$home/artifacts"
    [ "$(id -u)" != 0 ] || chown "$user" "$home/db"
    [ ! -e "$home/db/ready" ] || return 0
    as_postgres rm -rf data # left by an interrupted start
    as_postgres mkdir -p "$sockets"
    as_postgres "$bin/initdb" -D data --auth-local=peer --auth-host=reject --username=mlflow --encoding=UTF8 \
        --locale=C.UTF-8 >/dev/null
    as_postgres tee -a data/postgresql.conf >/dev/null <<P
listen_addresses = ''
unix_socket_directories = '$sockets'
max_connections = 200
P
    echo "local all all peer map=mlflow" | as_postgres tee data/pg_hba.conf >/dev/null
    printf 'mlflow %s mlflow\n' $(printf '%s\n' "$user" "$(id -un)" | sort -u) | as_postgres tee data/pg_ident.conf >/dev/null
    as_postgres touch ready
}

make_databases() {
    local name
    for name in mlflow mlflow_users; do
        [ "$(sql postgres "SELECT 1 FROM pg_database WHERE datname = '$name'")" = 1 ] ||
            sql postgres "CREATE DATABASE $name"
    done
    local version
    version=$("$python" -c 'from importlib.metadata import version as v; print(v("mlflow"))')
    [ "$(cat "$home/upgraded" 2>/dev/null)" != "$version" ] || return 0
    "$python" -m mlflow db upgrade "$database" >"$home/upgrade.log" 2>&1 ||
        die "the tables could not be upgraded: $(tail -3 "$home/upgrade.log")"
    echo "$version" >"$home/upgraded"
}

write_settings() {
    [ -e "$home/session.key" ] || head -c 32 /dev/urandom | base64 >"$home/session.key"
    cat >"$home/auth.ini" <<P
[mlflow]
default_permission = EDIT
database_uri = $users
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
P
}

launch() {
    export MLFLOW_AUTH_CONFIG_PATH=$home/auth.ini MLFLOW_AUTH_ADMIN_USERNAME=${MLFLOW_AUTH_ADMIN_USERNAME:-admin}
    export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
    MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$home/session.key")
    export MLFLOW_FLASK_SERVER_SECRET_KEY
    cd "$home"
    rm -f server.pid
    boot >server.boot
    setsid --fork sh -c 'echo $$ >server.pid && exec "$@"' - "$python" -m mlflow server --app-name basic-auth \
        --backend-store-uri "$database" --artifacts-destination "$artifacts" --host "$host" --port "$port" \
        --workers "$workers" ${MLFLOW_ALLOWED_HOSTS:+--allowed-hosts "$MLFLOW_ALLOWED_HOSTS"} \
        >>"$home/server.log" 2>&1 9>&- </dev/null
}

answers() { "$python" -c "
import sys, urllib.request as r
sys.exit(r.urlopen('http://$1:$port/health', timeout=2).status != 200)" 2>/dev/null; }

reach=$host
[ "$host" = 0.0.0.0 ] && reach=127.0.0.1

start() {
    check_packages
    check_password
    make_home
    start_database
    local left
    for left in $(seq 15); do # a busy server may answer slowly
        is_server_up || break
        if answers "$reach"; then say "already running: http://$host:$port" && return; fi
        [ "$left" -lt 15 ] || die "it is running but does not answer at http://$host:$port; run infra/mlflow/server.sh stop, then start"
        sleep 1
    done
    if (: </dev/tcp/"$reach"/"$port") 2>/dev/null; then
        die "$reach:$port is used by another server; set MLFLOW_PORT to a free port"
    fi
    make_databases
    write_settings
    launch
    for left in $(seq 240); do
        if is_server_up && answers "$reach"; then
            touch "$home/initialised"
            say "http://$host:$port, log in as ${MLFLOW_AUTH_ADMIN_USERNAME:-admin}; all data is in $home"
            return
        fi
        sleep 0.5
        [ "$left" -lt 8 ] || is_server_up || break
    done
    local last
    last=$(grep -E "Error|Exception|error" "$home/server.log" | tail -2) || true
    stop
    die "the server does not answer; last errors in its log: ${last:-none; see $home/server.log}"
}

stop() {
    find_postgres
    stop_server
    if [ -e "$home/db/ready" ] && is_database_up; then
        as_postgres "$bin/pg_ctl" -D "$home/db/data" -m fast -w stop >/dev/null
    fi
    say "stopped"
}

status() {
    find_postgres
    local code=0
    if [ -e "$home/db/ready" ] && is_database_up; then
        echo "database   up, revision $(sql mlflow 'SELECT version_num FROM alembic_version' 2>/dev/null || echo none)"
    else
        echo "database   down: infra/mlflow/server.sh start" && code=1
    fi
    if is_server_up && answers "$reach"; then
        echo "server     up: http://$host:$port"
    else
        echo "server     down: infra/mlflow/server.sh start; its log: $home/server.log" && code=1
    fi
    echo "artifacts  $artifacts"
    return $code
}

case ${1:-} in
    start | stop | status) "$1" ;;
    *) die "give start, stop or status" ;;
esac
