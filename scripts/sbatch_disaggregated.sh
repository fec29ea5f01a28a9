#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
#SBATCH --job-name=dynamo_mpi
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
# five minutes before the time limit the deployment is asked to finish what is in flight
#SBATCH --signal=B:USR2@300
#
# srun_disaggregated.sh as a batch job. Run it to submit itself, with nodes, GPUs, PARTITION and ACCOUNT from the environment; or
# `sbatch --nodes=4 … scripts/sbatch_disaggregated.sh` from the checkout, with spare nodes also --no-kill. A job that ends with 75
# (temporary) goes back into the queue, some times, without the nodes that launch has excluded.

set -euo pipefail

usage() {
    cat <<'END'
usage: sbatch_disaggregated.sh [--dry-run] [OPTIONS OF sbatch] [-- FLAGS OF srun_disaggregated.sh]

The numbers of nodes, workers, spare nodes and GPUs, in flags or variables, are what sbatch is asked for.

  IMAGE=/images/dynamo.sqsh MODEL_PATH=/models/M MOUNTS=/models:/models scripts/sbatch_disaggregated.sh --time=04:00:00

Environment: that of srun_disaggregated.sh (--help), and
  PARTITION, ACCOUNT      of the job (Slurm's defaults)
  DYN_MPI_MAX_REQUEUES    how often it goes back into the queue after 75 (10)
END
}

# Slurm runs a copy of this file from its spool folder: there the checkout is where it was submitted from, unless we said where.
root=${DYN_MPI_CHECKOUT:-${SLURM_SUBMIT_DIR:-.}}

# Sets `value` and `origin` as launch will read an option: its flag among `arguments`, over its variables in their order, over the default.
find_value() {
    local flag=$1 name word previous=""
    value=$2 origin=default
    for name in "${@:3}"; do
        if [[ -n ${!name:-} ]]; then
            value=${!name} origin="environment $name"
            break
        fi
    done
    for word in ${arguments[@]+"${arguments[@]}"}; do
        # what follows is the workers'
        [[ $word != -- ]] || break
        # launch takes an unambiguous beginning of a flag, too
        [[ $previous != --?* || $flag != "$previous"* ]] || use "$word" "$previous"
        [[ $word != --?*=* || $flag != "${word%%=*}"* ]] || use "${word#*=}" "${word%%=*}"
        previous=$word
    done
}

# --nodes may also list nodes, which is no number of them
use() {
    [[ $flag == --nodes && -n $1 && ! $1 =~ ^[-+.0-9]+$ ]] || value=$1 origin="flag $2"
}

refuse() {
    printf '%s\n' "$origin is '$value'" "  expected: $1" "  fix:      correct $2" >&2
    exit 64
}

# Prints a number: `number_of FLAG LEAST DEFAULT VARIABLES...`
number_of() {
    local value origin names expected="a positive whole number"
    find_value "$1" "${@:3}"
    # five digits are more than any cluster has, and don't overflow
    if [[ ! $value =~ ^0*[0-9]{1,5}$ ]] || ((10#$value < $2)); then
        names=${*:4}
        (($2 > 0)) || expected="0, or $expected"
        refuse "$expected, of at most 5 digits" "$1 or ${names// / or }"
    fi
    printf '%s' "$((10#$value))"
}

# Prints the roles of the workers, as srun_disaggregated.sh's own --role is weaker than the user's.
roles_of() {
    local value origin
    find_value --role disagg
    case $value in
        agg) echo agg ;;
        disagg) echo prefill decode ;;
        *) refuse "agg or disagg" --role ;;
    esac
}

# Prints which variables look misspelt, where the Python that launch needs is here, too: too few nodes are seen only in the job.
warn_of_misspelt() {
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "${PYTHON:-python3}" - <<'END' >&2 2>/dev/null || true
import os
from dynamo_mpi.deploy.settings import unknown
for line in unknown(os.environ):
    print("sbatch_disaggregated.sh: warning:", line)
END
}

submit() {
    local options=() arguments=() dry="" gpus spares nodes roles role flag names each workers command
    root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
    while (($#)); do
        case $1 in
            --)
                shift
                arguments=("$@")
                break
                ;;
            --dry-run) dry=1 ;;
            *) options+=("$1") ;;
        esac
        shift
    done
    warn_of_misspelt
    gpus=$(number_of --gpus-per-node 1 4 NUM_GPUS_PER_NODE)
    spares=$(number_of --spare-nodes 0 0 DYN_MPI_SPARE_NODES NUM_SPARE_NODES)
    nodes=$spares
    roles=$(roles_of)
    for role in $roles; do
        flag=--$role- names=NUM_${role^^}_ each=2
        # srun_disaggregated.sh has defaults for its own roles alone
        [[ $role != agg ]] || flag=-- names=NUM_ each=1
        each=$(number_of "${flag}nodes" 1 "$each" "${names}NODES")
        workers=$(number_of "${flag}workers" 1 1 "${names}WORKERS")
        nodes=$((nodes + each * workers))
    done
    # a lost node ends the worker that uses it, not the job; without spare nodes Slurm ends the job, and requeues it
    if ((spares > 0)); then
        options=(--no-kill "${options[@]}")
        export DYN_MPI_NO_KILL=1 # for launch, which can't ask Slurm
    fi
    command=(
        sbatch --nodes="$nodes" --gpus-per-node="$gpus"
        ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"}
        "${options[@]}" "$root/scripts/sbatch_disaggregated.sh" "${arguments[@]}"
    )
    if [[ -n $dry ]]; then
        printf 'DYN_MPI_CHECKOUT=%q' "$root"
        printf '%s' "${DYN_MPI_NO_KILL:+ DYN_MPI_NO_KILL=1}"
        printf ' %q' "${command[@]}"
        printf '\n'
        exit 0
    fi
    export DYN_MPI_CHECKOUT=$root
    exec "${command[@]}"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    submit "$@"
fi
if [[ ! -x $root/scripts/srun_disaggregated.sh ]]; then
    printf '%s\n' "no scripts/srun_disaggregated.sh in $root" "  expected: the checkout" \
        "  fix:      submit from the checkout, or export DYN_MPI_CHECKOUT=…" >&2
    exit 64
fi

"$root/scripts/srun_disaggregated.sh" "$@" &
launcher=$!
for name in USR2 USR1 TERM INT; do
    # shellcheck disable=SC2064 # both are known now
    trap "kill -s $name $launcher 2>/dev/null || true" "$name"
done
code=0
wait "$launcher" || code=$?
# a trapped signal ends `wait`, not the launcher
while kill -0 "$launcher" 2>/dev/null; do
    code=0
    wait "$launcher" || code=$?
done
# Puts the job back into the queue, without the nodes that launch has excluded; its arguments are launch's. Slurm takes a list of excluded
# nodes only for a job that isn't running: after the requeue, which ends this script by SIGTERM, and KillWait seconds later by SIGKILL.
requeue() {
    local folder=${DYN_MPI_RUN_DIR:-dynamo_mpi-$SLURM_JOB_ID} word previous="" file bad before
    for word in "$@"; do
        [[ $word != -- ]] || break
        [[ $previous != --run-dir ]] || folder=$word
        [[ $word != --run-dir=* ]] || folder=${word#*=}
        previous=$word
    done
    file=$folder/excluded.json
    bad=$(grep -o '"node": *"[A-Za-z0-9._-]*"' "$file" 2>/dev/null | cut -d'"' -f4 | sort -u | paste -sd, -) || true
    before=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' ExcNodeList=[^ ]*' | cut -d= -f2) || true
    [[ $before != "(null)" ]] || before=""
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID" || {
        printf '%s\n' "scontrol requeue $SLURM_JOB_ID failed ($?): the job isn't put back into the queue" \
            "  expected: a job that may be requeued" \
            "  fix:      submit it again${bad:+ with --exclude=$bad}; whether it may be requeued: scontrol show job, Requeue" >&2
        exit "$code"
    }
    [[ -n $bad ]] || return 0
    echo "without $bad (excluded.json)" >&2
    scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}$bad" ||
        echo "scontrol update failed: the nodes aren't excluded by Slurm, but by launch where they are in excluded.json" >&2
}

requeues=${SLURM_RESTART_COUNT:-0}
if ((code == 75 && requeues < ${DYN_MPI_MAX_REQUEUES:-10})); then
    echo "temporary failure (75): back into the queue, for the $((requeues + 1)). time" >&2
    requeue "$@"
elif ((code == 75)); then
    echo "temporary failure (75) after $requeues requeues: the job ends (DYN_MPI_MAX_REQUEUES)" >&2
fi
exit "$code"
