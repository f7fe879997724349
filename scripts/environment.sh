# Sourced by the other scripts: `source scripts/environment.sh requirements.txt` leaves the shell in an active virtual
# environment that holds what the named file asks for, in ./.venv or in $VENV.
#
# The environment is made with $PYTHON (default: the first of python3.11 to python3.13 and python3 that is 3.11 or newer).
# pip runs only when a requirements file has changed since it last succeeded, so a second run starts at once. Nothing is
# printed but one line when something is installed, and pip's own words when that fails.

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

_cats_environment() {
    local requirements=$1 root venv python stamp wanted log
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    venv=${VENV:-$root/.venv}
    if [ ! -x "$venv/bin/pip" ]; then
        python=$(_cats_interpreter) || return 2
        printf 'Creating the virtual environment %s ...\n' "${venv#"$root/"}" >&2
        "$python" -m venv "$venv" || return 2
    fi
    stamp=$venv/.$requirements.sha256
    wanted=$(cat "$root"/requirements*.txt | "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        printf 'Installing %s (once; a few minutes) ...\n' "$requirements" >&2
        log=$(mktemp)
        if ! "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check -r "$root/$requirements" >"$log" 2>&1; then
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
