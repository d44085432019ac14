#!/usr/bin/env bash
# Serves an exported model with vLLM on the nodes of a Slurm job: 4 nodes of 8 GPUs by default. From the project's root:
#   sbatch scripts/vllm/slurm.sh MODEL
#   bash scripts/vllm/slurm.sh --dry-run MODEL
# Another number of nodes:  PIPELINE_PARALLEL=2 sbatch --nodes=2 scripts/vllm/slurm.sh MODEL
#SBATCH --job-name=vllm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --output=vllm-%j.log
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[[ -f $here/common.sh ]] || here=$SLURM_SUBMIT_DIR/scripts/vllm # sbatch runs a copy of this file
# shellcheck source=scripts/vllm/common.sh
source "$here/common.sh"
parse_arguments slurm.sh "$@"

if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
elif [[ -n $DRY_RUN ]]; then
    mapfile -t nodes < <(seq -f 'node%.0f' 0 $((TENSOR_PARALLEL * PIPELINE_PARALLEL / GPUS_PER_NODE - 1)))
else
    echo "error: this is no Slurm job: submit it with sbatch, or look at it with --dry-run" >&2
    exit 2
fi
HEAD=${nodes[0]}
workers=$(IFS=,; echo "${nodes[*]:1}")

# Steps share the node's GPUs: Ray's processes use them, the server's own process only looks at them.
on_head() { launch srun --overlap --nodes=1 --ntasks=1 --gres="gpu:$GPUS_PER_NODE" --nodelist="$HEAD" bash -c "$1"; }
on_workers() {
    local count=$((${#nodes[@]} - 1))
    launch srun --overlap --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --gres="gpu:$GPUS_PER_NODE" \
        --nodelist="$workers" bash -c "$1"
}

# shellcheck disable=SC2046  # several process ids
[[ -n $DRY_RUN ]] || trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # with srun its step ends on every node
deploy "${#nodes[@]}"
