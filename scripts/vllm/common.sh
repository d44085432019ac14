# What slurm.sh and pdsh.sh share: the settings, the commands of each node, their order. Sourced, not run.
# shellcheck shell=bash

# -- settings: set them in the environment, e.g.  MAX_MODEL_LEN=65536 bash scripts/vllm/pdsh.sh ... ------------------
: "${SERVED_MODEL_NAME:=deepseek-sft}" # what requests call the model
: "${TENSOR_PARALLEL:=8}"              # GPUs that share each layer: those of a node
: "${PIPELINE_PARALLEL:=4}"            # stages of layers: nodes. BF16 needs 4 x 8 GPUs of 80 GB, FP8 2 x 8
: "${GPUS_PER_NODE:=8}"
: "${MAX_MODEL_LEN:=32768}"            # tokens of prompt and answer together
: "${REASONING_PARSER:=deepseek_r1}"   # splits <think>...</think> off the answer; empty: no parser
: "${API_PORT:=8000}"
: "${RAY_PORT:=6379}"
: "${DASHBOARD_PORT:=8265}"
: "${RAY_FOLDER:=/tmp/ray_$(id -un)}"  # on each node's own disk; Ray wants a short path
: "${NETWORK_INTERFACE:=}"             # e.g. bond0: what NCCL, gloo, Ray and vLLM connect through; empty: their choice
: "${ACTIVATE:=}"                      # file that each node sources first, e.g. /nfs/vllm/bin/activate
: "${READY_SECONDS:=3600}"             # how long loading may take
: "${POLL_SECONDS:=5}"
: "${QUESTION:=What is 17 * 23?}"      # the check's prompt

usage() {
    cat <<USAGE
usage: $1 [--dry-run] MODEL
  MODEL      directory of the exported weights, at the same path on every node
  --dry-run  print every command that would be run, run none
Settings are environment variables with defaults at the top of scripts/vllm/common.sh.
USAGE
}

# Sets DRY_RUN and MODEL.
parse_arguments() {
    DRY_RUN='' MODEL=''
    local name=$1 argument
    shift
    for argument; do
        case $argument in
            --dry-run) DRY_RUN=1 ;;
            -h | --help) usage "$name" && exit 0 ;;
            -*) usage "$name" >&2 && exit 2 ;;
            *) MODEL=$argument ;;
        esac
    done
    [[ -n $MODEL ]] || { usage "$name" >&2 && exit 2; }
    [[ $MODEL == /* ]] || MODEL=$PWD/$MODEL
}

# -- what runs on the nodes: one line of shell each ------------------------------------------------------------------

# Words as any shell reads them again: in single quotes where they need it.
quoted() {
    local word words=()
    for word; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) words+=("'${word//\'/\'\\\'\'}'") ;;
            *) words+=("$word") ;;
        esac
    done
    echo "${words[*]}"
}

# The beginning of every node's line.
environment() {
    [[ -z $ACTIVATE ]] || echo -n "source $(quoted "$ACTIVATE") && "
    if [[ -n $NETWORK_INTERFACE ]]; then
        local address
        address="ip -4 -o addr show dev $(quoted "$NETWORK_INTERFACE") | sed -E \"s|.* inet ([0-9.]+)/.*|\\1|;q\""
        echo -n "export VLLM_HOST_IP=\$($address) && "
        echo -n "export NCCL_SOCKET_IFNAME=$(quoted "$NETWORK_INTERFACE") && "
        echo -n "export GLOO_SOCKET_IFNAME=$(quoted "$NETWORK_INTERFACE") && "
    fi
}

# Lets a command begin when the head answers, in place of sleeping for as long as that usually takes.
await_ray() {
    local loop="until ray status --address=$HEAD:$RAY_PORT >/dev/null 2>&1; do sleep $POLL_SECONDS; done"
    echo -n "timeout $READY_SECONDS bash -c $(quoted "$loop") && "
}

ray_start() {
    # shellcheck disable=SC2016  # expanded on the node
    local address=${NETWORK_INTERFACE:+'--node-ip-address=$VLLM_HOST_IP '}
    echo "exec ray start --block $address--num-gpus=$GPUS_PER_NODE $(quoted "$@")"
}

# Ends a node's line where the weights are not there.
need_model() {
    local missing="error: on \$(hostname) $MODEL has no config.json; give an exported model's directory that all nodes see"
    echo -n "{ test -f $(quoted "$MODEL/config.json") || { echo \"${missing//\"/}\" >&2; exit 2; }; } && "
}

head_line() {
    environment
    need_model
    ray_start --head "--port=$RAY_PORT" "--dashboard-port=$DASHBOARD_PORT" "--temp-dir=$RAY_FOLDER"
}

worker_line() {
    environment
    need_model
    await_ray
    ray_start "--address=$HEAD:$RAY_PORT"
}

serve_line() {
    local arguments=(
        "$MODEL"
        --served-model-name "$SERVED_MODEL_NAME"
        --tensor-parallel-size "$TENSOR_PARALLEL"
        --pipeline-parallel-size "$PIPELINE_PARALLEL"
        --distributed-executor-backend ray
        --max-model-len "$MAX_MODEL_LEN"
        --port "$API_PORT"
    )
    [[ -z $REASONING_PARSER ]] || arguments+=(--reasoning-parser "$REASONING_PARSER")
    environment
    need_model
    await_ray
    echo "export RAY_ADDRESS=$HEAD:$RAY_PORT && exec vllm serve $(quoted "${arguments[@]}")"
}

# -- the order --------------------------------------------------------------------------------------------------------

# Runs a command, or prints it as it could be pasted.
run() {
    if [[ -n $DRY_RUN ]]; then
        quoted "$@"
    else
        "$@"
    fi
}

# The same in the place of this shell, which must be one in the background: ending it then ends the command.
launch() {
    if [[ -n $DRY_RUN ]]; then
        quoted "$@"
    else
        exec "$@"
    fi
}

check_sizes() {
    local gpus=$((TENSOR_PARALLEL * PIPELINE_PARALLEL)) there=$(($1 * GPUS_PER_NODE))
    if ((gpus != there)); then
        echo "error: TENSOR_PARALLEL $TENSOR_PARALLEL x PIPELINE_PARALLEL $PIPELINE_PARALLEL is $gpus GPUs, but $1 nodes" \
            "x GPUS_PER_NODE $GPUS_PER_NODE are $there: change one of them" >&2
        exit 2
    fi
}

# A string of one line in JSON.
json() {
    local text=${1//\\/\\\\}
    echo "\"${text//\"/\\\"}\""
}

# Waits until the server with process id $1 answers, then asks it something.
check() {
    local url=http://$HEAD:$API_PORT request
    request="{\"model\": $(json "$SERVED_MODEL_NAME"), \"messages\": [{\"role\": \"user\", \"content\": $(json "$QUESTION")}]}"
    SECONDS=0
    until run curl --silent --fail --output /dev/null "$url/health"; do
        if ! kill -0 "$1" 2>/dev/null || ((SECONDS > READY_SECONDS)); then
            echo "error: no answer from $url after $SECONDS s; what the server said is above" >&2
            return 1
        fi
        sleep "$POLL_SECONDS"
    done
    run curl --silent --show-error --fail-with-body "$url/v1/chat/completions" \
        --header 'Content-Type: application/json' --data "$request"
    [[ -n $DRY_RUN ]] || echo
}

# $1: number of nodes. The script has defined HEAD, on_head and on_workers, which run a line of shell there.
deploy() {
    check_sizes "$1"
    if [[ -n $DRY_RUN ]]; then
        on_head "$(head_line)"
        (($1 == 1)) || on_workers "$(worker_line)"
        on_head "$(serve_line)"
        check 0
        return
    fi
    on_head "$(head_line)" &
    if (($1 > 1)); then on_workers "$(worker_line)" & fi
    on_head "$(serve_line)" &
    local server=$!
    check "$server"
    wait "$server"
}
