# shellcheck shell=bash
# Sourced by the commands beside it. `set_up core` leaves llmq ready to use in .venv; `set_up test` adds what its tests
# need. A stamp says what .venv was made from: while that holds, a set-up is over at once; where the stamp is missing,
# because a set-up was cut short, it starts again from an empty .venv.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/set-up-from
constraints=$root/scripts/constraints.txt

set_up() {
    local set=$1 python version device base inputs had_base="" had_inputs="" had_set=""
    trap 'exit 130' INT # pip survives an interrupt with an error, which is not a reason to try something else
    lock
    python=$(find_python)
    version=$("$python" -c 'import platform; print(platform.python_version())')
    # Where .venv is active, the first Python on the PATH is its own, which cannot make .venv anew.
    python=$("$python" -c 'import sys; print(sys._base_executable)')
    device=$(has_gpu && echo GPU || echo "no GPU")
    base="$root, Python $version, $device"
    inputs=$(cat "$root/pyproject.toml" "$constraints" "${BASH_SOURCE[0]}" | cksum)
    if [ -f "$stamp" ]; then
        { read -r had_base && read -r had_inputs && read -r had_set; } < "$stamp" || true
    fi
    if [ "$had_base" != "$base" ] || [ "$had_inputs" != "$inputs" ] || [[ $had_set != test && $had_set != "$set" ]]; then
        rm -f "$stamp"
        if [ "$had_base" != "$base" ]; then
            echo "Setting up .venv with Python $version ($device); this takes a few minutes once."
            rm -rf "$venv"
            "$python" -m venv "$venv"
        else
            echo "Bringing .venv up to date."
        fi
        install "$set"
        printf '%s\n' "$base" "$inputs" "$set" > "$stamp"
    fi
    unlock
    trap - INT
    export PATH="$venv/bin:$PATH"
}

install() {
    local torch extra=""
    [ "$1" = core ] || extra="[$1]"
    torch=$(sed -n 's/^torch==//p' "$constraints")
    pip_install --upgrade pip
    # A machine without a GPU does well without gigabytes of CUDA libraries: where a CPU build is on offer, take it.
    # `===` takes no other build of the version than the one published under that very name.
    if has_gpu; then
        pip_install "torch===$torch"
    else
        pip_install "torch==$torch+cpu" 2> /dev/null || pip_install "torch==$torch"
    fi
    pip_install --build-constraint "$constraints" --editable "$root$extra" ||
        fail "the set-up failed" "see pip's message above; some test packages are built here and need a C compiler"
}

pip_install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --constraint "$constraints" "$@"
}

# The interpreter in $PYTHON, or else the first on the PATH that the pinned versions support.
find_python() {
    local python
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13" "name one that is, or unset it"
        echo "$PYTHON"
        return
    fi
    for python in python3 python3.12 python3.11 python3.13; do
        if supported "$python"; then
            echo "$python"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 found" "install one, or name it: PYTHON=/path/to/python $0"
}

supported() {
    # A name on the PATH may be a launcher with nothing behind it: only running it tells.
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null
}

has_gpu() {
    [ -e /dev/nvidia0 ] || nvidia-smi --list-gpus > /dev/null 2>&1
}

# Two set-ups at once would undo each other's work: the second waits for the first.
lock() {
    if command -v flock > /dev/null; then
        exec 9< "${BASH_SOURCE[0]}"
        flock 9
    fi
}

unlock() {
    exec 9<&-
}

fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 1
}
