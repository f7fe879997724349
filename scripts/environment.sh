# Sourced by the other scripts: `source scripts/environment.sh requirements.txt` leaves the shell in an active virtual
# environment that holds what the named file asks for, in ./.venv or in $VENV.
#
# The environment is made with $PYTHON (default: the first of python3.11 to python3.13 and python3 that is 3.11 or newer).
# pip runs only when a requirements file has changed since it last succeeded, so a second run starts at once. Nothing is
# printed but one line when something is installed, which counts the seconds, and pip's own words when that fails.

_cats_interpreter() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return 0
        fi
    done
    printf 'error: no Python 3.11 or newer with venv among: %s; install one, or name it with PYTHON=/path/to/python.\n' \
        "${PYTHON:-python3.11 python3.12 python3.13 python3}" >&2
    return 1
}

# Runs a command; $1 and the seconds so far stand on one line of stderr meanwhile.
_cats_counting() {
    local what=$1 start=$SECONDS counter status=0
    shift
    printf '%s' "$what" >&2
    # The shell itself is watched too: after Ctrl-C nobody ends the counter.
    (while sleep 3 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do printf '\r%s %d s' "$what" $((SECONDS - start)) >&2; done) &
    counter=$!
    "$@" || status=$?
    kill "$counter" 2>/dev/null || true
    wait "$counter" 2>/dev/null || true
    printf '\n' >&2
    return "$status"
}

# Installs the requirements file $1 into the environment $2; pip's words go to $3.
_cats_install() {
    "$2/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check -r "$1" >"$3" 2>&1
}

_cats_environment() {
    local requirements=$1 root venv python stamp wanted log
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    venv=${VENV:-$root/.venv}
    if [ ! -x "$venv/bin/pip" ]; then
        python=$(_cats_interpreter) || return 2
        _cats_counting "Creating the virtual environment ${venv#"$root/"} ..." "$python" -m venv "$venv" || return 2
    fi
    stamp=$venv/.$requirements.sha256
    wanted=$(cat "$root"/requirements*.txt | "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        log=$(mktemp)
        if ! _cats_counting "Installing $requirements (once; a few minutes) ..." _cats_install "$root/$requirements" "$venv" "$log"; then
            cat "$log" >&2
            rm -f "$log"
            printf 'error: pip could not install %s; see its words above, then run again.\n' "$requirements" >&2
            return 2
        fi
        rm -f "$log"
        printf '%s\n' "$wanted" >"$stamp"
    fi
    # Bytecode is kept, whatever the caller's environment says: without it every start compiles torch and transformers anew, for 6 s.
    export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH" PYTHONDONTWRITEBYTECODE=
    hash -r
}

_cats_environment "${1:-requirements.txt}" || exit 2
