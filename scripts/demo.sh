#!/usr/bin/env bash
# Trains a tiny DeepSeek-V3 over two CPU processes until it knows 36 short answers by heart, exports it, and asks the export.
#   bash scripts/demo.sh [more arguments of fit]     each run has a folder of its own, runs/demo-<time>
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
# shellcheck source=/dev/null
source .venv/bin/activate

# On CPU also where there is a GPU; the two processes share the cores; nothing is looked up on the network.
cores=$(nproc)
export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}

mkdir -p runs
run=runs/demo-$(date +%Y%m%d-%H%M%S)
mkdir "$run" 2>/dev/null || run=$(mktemp -d "$run-XXXX")

echo "== train"
python -m src.cli fit --config configs/demo.yaml --trainer.default_root_dir "$run" "$@"
echo "== export to the Hugging Face format"
python -m src.cli export --ckpt "$run/checkpoints/last.ckpt" --out "$run/export"
echo "== the loss curve"
python scripts/plot_loss.py "$run"
echo "== what it has learned, by transformers from the export; the last question it has never seen"
python scripts/sample.py "$run/export" --learned data/demo/facts.jsonl --prompt "What is the capital of Peru?"
echo "== everything of this run is in $run"
