#!/usr/bin/env bash
# Trains on nodes that are reached by ssh, without a scheduler: torchrun on each. From the project's root, which every
# node has at the same path:
#   NODES=node0,node1,... bash scripts/pdsh/fit.sh [--dry-run] configs/32n_sp4.yaml [more arguments of fit]
# Ctrl-C once: the ranks save their step and stop. Again: they are ended at once. docs/launching.md explains the rest.
set -euo pipefail
# shellcheck source=scripts/slurm/common.sh
source scripts/slurm/common.sh
DRY_RUN=''
[[ ${1:-} != --dry-run ]] || { DRY_RUN=1 && shift; }
parse_arguments 'NODES=node0,node1 bash scripts/pdsh/fit.sh [--dry-run]' "$@"
: "${NODES:?names of the nodes, e.g. NODES=node0,node1}"
: "${GPUS_PER_NODE:=8}"
: "${CORES_PER_RANK:=12}" # for the optimizer in host memory: a node's cores / GPUS_PER_NODE
: "${MASTER_PORT:=29500}"
IFS=, read -r -a nodes <<<"$NODES"
# On each node, while it runs: its torchrun's number. Nobody can guess the name, and no two runs share it.
PIDS=/tmp/fit-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n').pid

# The environment as a line of shell: exported here in a shell of its own, and read back.
environment() {
    (
        export_environment "$CORES_PER_RANK"
        local name
        for name in OMP_NUM_THREADS NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_DEBUG NCCL_IB_TIMEOUT \
            TORCH_EXTENSIONS_DIR FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED PYTHONUNBUFFERED PYTHONFAULTHANDLER; do
            [[ -z ${!name:-} ]] || printf '%s=%q ' "$name" "${!name}"
        done
    )
}

# $1: a function that prints the command of a node, given its number.
on_all_nodes() {
    local rank command jobs=() code=0
    for rank in "${!nodes[@]}"; do
        command=$("$1" "$rank")
        if [[ -n $DRY_RUN ]]; then
            echo "pdsh -S -R ssh -w ${nodes[rank]} bash -c $(printf '%q' "$command")"
        else
            # As letters and digits, through pdsh, which replaces %n and %h, and through the node's shell, whichever it is.
            command=$(base64 <<<"$command" | tr -d '\n')
            pdsh -S -R ssh -w "${nodes[rank]}" "echo $command | base64 -d | bash" &
            jobs+=($!)
        fi
    done
    for rank in "${!jobs[@]}"; do
        # A signal ends `wait`, not the node's command.
        while kill -0 "${jobs[rank]}" 2>/dev/null; do wait "${jobs[rank]}" || code=$?; done
    done
    return "$code"
}

torchrun() { # $1: the node's number; the rest: arguments of src.cli
    local rank=$1 command
    shift
    command=("$PYTHON" -m torch.distributed.run "--nnodes=${#nodes[@]}" "--node_rank=$rank"
        "--nproc_per_node=$GPUS_PER_NODE" "--master_addr=${nodes[0]}" "--master_port=$MASTER_PORT" -m src.cli "$@")
    echo "cd $(printf '%q' "$PWD") &&" \
        "(umask 077 && echo \$BASHPID >$PIDS && exec env $(environment)$(printf '%q ' "${command[@]}")); code=\$?;" \
        "rm -f $PIDS; exit \$code"
}

preflight() { torchrun "$1" preflight "${FIT[@]}"; }
fit() { torchrun "$1" fit "${FIT[@]}"; }
# torchrun itself ends at once of SIGUSR1: it goes to its children, the ranks.
save() { echo "[ ! -f $PIDS ] || pkill -USR1 -P \$(cat $PIDS)"; }
end() { echo "[ ! -f $PIDS ] || kill \$(cat $PIDS)"; }

stops=0
stop() {
    stops=$((stops + 1))
    if ((stops == 1)); then (on_all_nodes save) || true; else (on_all_nodes end) || true; fi
}
[[ -n $DRY_RUN ]] || trap stop INT TERM USR1

if [[ $PREFLIGHT != 0 ]]; then
    on_all_nodes preflight || { echo "error: fit was not started" >&2 && exit 1; }
fi
on_all_nodes fit
