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
PIDS=/tmp/fit-$(id -un).pid # on each node: its torchrun

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

# $1: command; the node's number in place of %n, of which pdsh does not know the order.
on_all_nodes() {
    local rank line jobs=() code=0
    for rank in "${!nodes[@]}"; do
        line="bash -c $(printf '%q' "${1//%n/$rank}")"
        if [[ -n $DRY_RUN ]]; then
            echo "pdsh -S -R ssh -w ${nodes[rank]} $line"
        else
            pdsh -S -R ssh -w "${nodes[rank]}" "$line" &
            jobs+=($!)
        fi
    done
    for rank in "${!jobs[@]}"; do
        # A signal ends `wait`, not the node's command.
        while kill -0 "${jobs[rank]}" 2>/dev/null; do wait "${jobs[rank]}" || code=$?; done
    done
    return "$code"
}

torchrun() {
    echo "cd $(printf '%q' "$PWD") && echo \$\$ >$PIDS && exec env $(environment)$PYTHON -m torch.distributed.run" \
        "--nnodes=${#nodes[@]} --node_rank=%n --nproc_per_node=$GPUS_PER_NODE --master_addr=${nodes[0]}" \
        "--master_port=$MASTER_PORT -m src.cli $(printf '%q ' "$@")"
}

stops=0
stop() {
    stops=$((stops + 1))
    # torchrun itself ends at once of SIGUSR1: it goes to its children, the ranks.
    local command="pkill -USR1 -P \$(cat $PIDS)"
    ((stops == 1)) || command="kill \$(cat $PIDS)"
    (on_all_nodes "$command") || true
}
[[ -n $DRY_RUN ]] || trap stop INT TERM USR1

if [[ $PREFLIGHT != 0 ]]; then
    on_all_nodes "$(torchrun preflight "${FIT[@]}")" || { echo "error: fit was not started" >&2 && exit 1; }
fi
on_all_nodes "$(torchrun fit "${FIT[@]}")"
