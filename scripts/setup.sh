#!/usr/bin/env bash
# Makes .venv in the project's root: CPU PyTorch, the project and its demo and development tools at exact versions.
#   bash scripts/setup.sh                    a second call with nothing changed returns at once
#   bash scripts/setup.sh --gpu              with PyTorch for CUDA 13 and flash-attn-4, and DeepSpeed's optimizer built
#   PYTHON=python3.12 bash scripts/setup.sh  with this interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1 # pip's lines as they come

CONSTRAINTS=constraints/cpu.txt EXTRAS=demo,dev
STAMP=.venv/.setup-stamp
LOG=.venv/setup.log
NEED_GB=4 # .venv takes 2 GB, the download and DeepSpeed's operators the rest

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

case "$*" in
    "") ;;
    --gpu) CONSTRAINTS=constraints/gpu.txt EXTRAS=gpu,demo,dev NEED_GB=16 ;; # CUDA's libraries: 8 GB, and their download
    *) fail "$* is not an option; usage: bash scripts/setup.sh [--gpu]" ;;
esac

# Prints `$1`, then runs the rest: its output goes to the log, its latest line to a terminal, its end to both on failure.
step() {
    local title=$1 begin=$SECONDS line
    shift
    printf 'setup: %s\n' "$title"
    printf '== %s\n' "$title" >>"$LOG"
    if ! "$@" 2>&1 | while IFS= read -r line; do
        printf '%s\n' "$line" >>"$LOG"
        if [[ -t 1 ]]; then printf '\r\033[K  %3ds  %.90s' "$((SECONDS - begin))" "$line"; fi
    done; then
        if [[ -t 1 ]]; then printf '\r\033[K'; fi
        return 1
    fi
    if [[ -t 1 ]]; then printf '\r\033[K'; fi
    printf 'setup: done in %d s\n' "$((SECONDS - begin))"
}

must() {
    step "$@" && return
    tail -n 25 "$LOG" >&2
    fail "failed: $1" "the whole log is in $LOG"
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null
}

has_venv() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

header() {
    "$1" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")'
}

[[ $(uname -s) == Linux ]] || fail "this is $(uname -s); the project runs on Linux (on Windows: in WSL2)."

# One set-up at a time: another call waits here until the first has finished.
if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock 9
fi

state=$(cat pyproject.toml "$CONSTRAINTS" scripts/setup.sh | sha256sum | cut -d ' ' -f 1)
# The path is part of the state: neither a virtual environment nor an editable install survives a move.
state="$state $PWD $EXTRAS"
if [[ -f $STAMP && $(<"$STAMP") == "$state" ]] && supported .venv/bin/python; then
    exit 0
fi

# 1. What only the system's package manager can bring.
compiler=
for candidate in "${CXX:-}" c++ g++ clang++; do
    if [[ -n $candidate ]] && command -v "${candidate%% *}" >/dev/null; then
        compiler=$candidate
        break
    fi
done
[[ -n $compiler ]] || fail \
    "no C++ compiler (g++ or clang++) found; DeepSpeed builds its CPU optimizer with one on first use." \
    "Debian, Ubuntu, WSL2:  sudo apt-get install g++" \
    "Fedora, RHEL:          sudo dnf install gcc-c++"

# The first that has everything; 3.11 leads, since continuous integration runs on it.
candidates=${PYTHON:-python3.11 python3.12 python3 python3.13 python3.14}
python=
for candidate in $candidates; do
    if supported "$candidate" && has_venv "$candidate" && [[ -f $(header "$candidate") ]]; then
        python=$candidate
        break
    fi
done
if [[ -z $python ]]; then
    for candidate in $candidates; do # say what the first usable one lacks
        supported "$candidate" || continue
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        has_venv "$candidate" || fail \
            "$candidate has no venv module." \
            "Debian, Ubuntu, WSL2:  sudo apt-get install python$version-venv"
        fail \
            "$candidate has no C headers ($(header "$candidate") is missing); DeepSpeed's CPU optimizer needs them." \
            "Debian, Ubuntu, WSL2:  sudo apt-get install python$version-dev" \
            "Fedora, RHEL:          sudo dnf install python$version-devel"
    done
    fail \
        "no Python 3.11 to 3.14 found${PYTHON:+ (PYTHON=$PYTHON)}; python3 is $(python3 --version 2>/dev/null || echo missing)." \
        "Debian, Ubuntu, WSL2:  sudo apt-get install python3.11 python3.11-venv python3.11-dev" \
        "Fedora, RHEL:          sudo dnf install python3.11 python3.11-devel" \
        "Or name one:           PYTHON=/path/to/python3.11 bash scripts/setup.sh"
fi

free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024 / 1024))
((free_gb >= NEED_GB)) || fail \
    "$free_gb GB free in $PWD, $NEED_GB GB are needed: free some space, or clone to another disk."

# 2. The environment; one that works is kept and brought up to date.
echo "setup: $("$python" --version), $compiler, $free_gb GB free; about two minutes"
if ! supported .venv/bin/python || [[ $(.venv/bin/python -c 'import sys; print(sys.prefix)') != "$PWD/.venv" ]]; then
    "$python" -m venv --clear .venv
fi
: >"$LOG"
pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input)

# 3. PyTorch before all else, from its CPU index: PyPI's wheel brings several GB of CUDA. Where that index cannot be
#    reached, --timeout and --retries let the set-up go on at once to the pip sources of the machine.
torch=$(grep -E '^torch==' "$CONSTRAINTS")
if [[ $EXTRAS != gpu* && $(.venv/bin/python -m pip freeze 2>/dev/null | grep -E '^torch==' | cut -d + -f 1) != "$torch" ]]; then
    step "PyTorch for CPU ($torch, about 200 MB)" \
        "${pip[@]}" install --progress-bar off --no-deps "$torch" \
        --index-url https://download.pytorch.org/whl/cpu --timeout 5 --retries 0 ||
        must "PyTorch's CPU index gave none: the ordinary package index instead (its build may bring several GB of CUDA)" \
            "${pip[@]}" install --progress-bar off --no-deps "$torch"
fi
must "the project and its tools (about 100 packages)" \
    "${pip[@]}" install --progress-bar off --no-compile -c "$CONSTRAINTS" -e ".[$EXTRAS]"

# 4. What DeepSpeed would build at this machine's first start; other nodes build their own, for their processors.
if [[ $EXTRAS == gpu* ]]; then
    must "DeepSpeed's optimizer for host memory" .venv/bin/python -m src.strategies.operators
fi

printf '%s\n' "$state" >"$STAMP"
echo "setup: ready. To use it in this shell:  source .venv/bin/activate"
