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

  IMAGE=/images/dynamo.sqsh MODEL_PATH=/models/M MOUNTS=/models:/models scripts/sbatch_disaggregated.sh --time=04:00:00

Environment: that of srun_disaggregated.sh (--help), its NUM_SPARE_NODES are asked for too, and
  PARTITION, ACCOUNT      of the job (Slurm's defaults)
  DYN_MPI_MAX_REQUEUES    how often it goes back into the queue after 75 (10)
END
}

# Slurm runs a copy of this file from its spool folder: there the checkout is where it was submitted from, unless we said where.
root=${DYN_MPI_CHECKOUT:-${SLURM_SUBMIT_DIR:-.}}

submit() {
    local options=() arguments=() dry="" name nodes command
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
    for name in NUM_PREFILL_NODES NUM_PREFILL_WORKERS NUM_DECODE_NODES NUM_DECODE_WORKERS NUM_GPUS_PER_NODE; do
        if [[ ! ${!name:-1} =~ ^[1-9][0-9]*$ ]]; then
            printf '%s\n' "environment $name is '${!name}'" "  expected: a positive whole number" >&2
            exit 64
        fi
    done
    if [[ ! ${NUM_SPARE_NODES:-0} =~ ^[0-9]+$ ]]; then
        printf '%s\n' "environment NUM_SPARE_NODES is '$NUM_SPARE_NODES'" "  expected: a whole number, 0 or more" >&2
        exit 64
    fi
    nodes=$((${NUM_PREFILL_NODES:-2} * ${NUM_PREFILL_WORKERS:-1} + ${NUM_DECODE_NODES:-2} * ${NUM_DECODE_WORKERS:-1}))
    nodes=$((nodes + 10#${NUM_SPARE_NODES:-0}))
    # a lost node ends the worker that uses it, not the job; without spare nodes Slurm ends the job, and requeues it
    if ((10#${NUM_SPARE_NODES:-0} > 0)); then
        options=(--no-kill "${options[@]}")
        export DYN_MPI_NO_KILL=1 # for launch, which can't ask Slurm
    fi
    command=(
        sbatch --nodes="$nodes" --gpus-per-node="${NUM_GPUS_PER_NODE:-4}"
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
    printf '%s\n' "no scripts/srun_disaggregated.sh in $root" "  fix:      submit from the checkout, or export DYN_MPI_CHECKOUT=…" >&2
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
