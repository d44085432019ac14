#!/usr/bin/env bash
# Serves an exported model with vLLM on nodes that are reached by ssh, without a scheduler. From any machine:
#   NODES=node0,node1,node2,node3 bash scripts/vllm/pdsh.sh [--dry-run] MODEL
# The first node is the head. Ctrl-C stops Ray, and with it the server, on all of them.
set -euo pipefail
# shellcheck source=scripts/vllm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_arguments pdsh.sh "$@"
: "${NODES:?names of the nodes, e.g. NODES=node0,node1,node2,node3}"

IFS=, read -r -a nodes <<<"$NODES"
HEAD=${nodes[0]}
workers=$(IFS=,; echo "${nodes[*]:1}")

# The login shell there need not be bash.
on_nodes() { launch pdsh -S -R ssh -w "$1" "bash -c $(quoted "$2")"; }
on_head() { on_nodes "$HEAD" "$1"; }
on_workers() { on_nodes "$workers" "$1"; }
stop() {
    (on_nodes "$NODES" "$(environment) ray stop") || true
    # shellcheck disable=SC2046  # several process ids
    kill $(jobs -p) 2>/dev/null || true
}

[[ -n $DRY_RUN ]] || trap stop EXIT
deploy "${#nodes[@]}"
