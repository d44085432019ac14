# What the launchers of scripts/slurm and scripts/pdsh share: the environment of every rank. Sourced, not run.
# shellcheck shell=bash

# -- settings: set them in the environment, e.g.  NETWORK_INTERFACE=bond0 sbatch scripts/slurm/fit.sbatch ... ------------
: "${PYTHON:=python}"         # the project's own where there is one, see below
: "${NETWORK_INTERFACE:=}"    # e.g. bond0: what NCCL and gloo connect through; empty: their choice
: "${PREFLIGHT:=1}"           # 0: start `fit` without looking at the nodes
[[ $PYTHON != python || ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python

# $1: CPU cores for each rank. A value that is set already is kept.
export_environment() {
    # Threads of DeepSpeedCPUAdam, which steps 2.6e9 parameters a rank with offload_optimizer: all of the rank's cores.
    # torchrun sets 1 where nothing is set.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$1}
    # The rendezvous goes over TCP, by the first interface that has an address, which may lead nowhere; gloo, which
    # gathers small Python objects, does so for all it sends. Gradients and parameters take InfiniBand in any case.
    if [[ -n $NETWORK_INTERFACE ]]; then
        export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
    fi
    # Errors and nothing else; INFO tells which transport and which NICs each rank has chosen.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # A link that goes down for a moment is waited for (4 us x 2^22 = 17 s a try, 7 tries), the job lives on.
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
    # Compiled attention kernels of flash-attn-4 are kept on the disk.
    export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=${FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED:-1}
    # Lines as they come, and the stack of a process that dies in C++.
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
}

usage() {
    cat <<USAGE
usage: $1 CONFIG [more arguments of fit]
  e.g. $1 configs/32n_sp4.yaml --model.pretrained /nfs/DeepSeek-V3
Where the run's folder (trainer.default_root_dir) holds checkpoints, it continues with the newest of them.
USAGE
}

# Sets FIT to the arguments that preflight and fit share.
parse_arguments() {
    local name=$1
    shift
    case ${1:-} in
        -h | --help) usage "$name" && exit 0 ;;
        '' | -*) usage "$name" >&2 && exit 2 ;;
    esac
    [[ -f $1 ]] || { echo "error: there is no config $PWD/$1" >&2 && exit 2; }
    [[ -f src/cli.py ]] || { echo "error: $PWD is not the project's root; start from there" >&2 && exit 2; }
    # Last given counts: `--ckpt_path` among the arguments is obeyed.
    # shellcheck disable=SC2034  # used where this file is sourced
    FIT=(--config "$1" --ckpt_path auto "${@:2}")
}
