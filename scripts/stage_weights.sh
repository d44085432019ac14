#!/usr/bin/env bash
# Copies a Hugging Face directory to a disk of each node's own, whole or not at all, and checks the copy.
#
#   srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 bash scripts/stage_weights.sh /shared/DeepSeek-V3 /local/DeepSeek-V3
#   srun ... python -m src.cli fit --config CONFIG --model.pretrained /local/DeepSeek-V3
#
# When it pays, and when not: docs/checkpoints.md, "Weights on a local disk". A complete copy of the same files is left
# as it is, so the line may stand in the job's script. JOBS (8) files are copied at a time.
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: stage_weights.sh SOURCE TARGET" >&2
    exit 2
fi
source=$(realpath -e "$1")
target=$2
partial=$target.partial
listing() { (cd "$1" && find -L . -type f -not -path '*/.*' -printf '%P\t%s\n' | LC_ALL=C sort); }
fail() { echo "stage_weights.sh on $(hostname): $1" >&2; exit 1; }

[ -f "$source/config.json" ] || fail "$source has no config.json: give the model's directory"
if [ -e "$target" ]; then
    [ "$(listing "$source")" = "$(listing "$target")" ] \
        || fail "$target holds other files than $source: remove it, or give another directory"
    echo "$(hostname): $target is there already"
    exit 0
fi
mkdir -p "$(dirname "$target")"
exec 9>"$target.lock"  # one copy a node, whatever --ntasks-per-node is
flock 9
[ -e "$target" ] && exit 0
rm -rf "$partial"
needed=$(listing "$source" | awk -F'\t' '{ sum += $2 } END { print sum + 0 }')
free=$(df --output=avail -B1 "$(dirname "$target")" | tail -1 | tr -d ' ')
[ "$free" -ge "$needed" ] || fail "$target takes $needed bytes, and $free are free there: make room, or use another disk"

copy() {  # one file, read once: the checksum of what was read against that of what the disk gives back
    mkdir -p "$(dirname "$2")"
    read_sum=$(tee "$2" <"$1" | sha256sum)
    sync "$2"
    dd if="$2" iflag=nocache count=0 status=none  # so that it comes from the disk
    [ "$(sha256sum <"$2")" = "$read_sum" ] || { echo "stage_weights.sh on $(hostname): $2 is not what was written" >&2; exit 255; }
}
export -f copy
# shellcheck disable=SC2016
listing "$source" | cut -f1 | xargs -d '\n' -P "${JOBS:-8}" -I {} bash -euo pipefail -c 'copy "$1/$3" "$2/$3"' _ "$source" "$partial" {} \
    || fail "the copy to $partial failed; see above"
[ "$(listing "$source")" = "$(listing "$partial")" ] || fail "$source changed while it was copied: start again"
mv "$partial" "$target"
rm -f "$target.lock"
echo "$(hostname): $needed bytes in $target"
