#!/usr/bin/env bash
# Run the measurements that need a GPU: tests, scoring at 1B and 8B, a training step at 1B.
#
#     benchmarks/gpu.sh carry FOLDER 3.12
#                                       with a network: download the wheels (2 MB) that a GPU machine
#                                       with torch, transformers, accelerate, peft, pandas and
#                                       pyarrow lacks, for its version of Python
#     benchmarks/gpu.sh [FOLDER]        on that machine, without a network; ten minutes at most
#     benchmarks/gpu.sh cpu             the same in tiny shapes on a CPU, to test this script
#
# The checkout is used without installing it; only the downloaded wheels are installed, into a
# temporary folder. PYTHON names the interpreter. It stops at the first step that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"

if [ "${1:-}" = carry ]; then
  # datasets limits the versions of dill and multiprocess.
  "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "${2:?name a folder}" \
    --python-version "${3:?name the version of Python there}" \
    "datasets>=4.8" "trl>=1.9,<2" "multiprocess<0.70.20" "dill<0.4.2"
  du -ch "$2"/*.whl
  exit
fi

device=cuda dtype=bfloat16 shapes="1b 8b" train_shape=1b length=2048 responses=32 rounds=4
if [ "${1:-}" = cpu ]; then
  device=cpu dtype=float32 shapes=tiny train_shape=tiny length=64 responses=2 rounds=1
  shift
fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
if [ -n "${1:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$1"/*.whl
fi
export PYTHONPATH="$PWD:$PWD/integrations:$PWD/tests:$work/site${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false STAR_DSS_CACHE="$work/cache"
export STAR_DSS_TEST_DEVICE="$device"
say() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

say "machine and versions"
[ "$device" = cpu ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
"$python" - <<'PY'
import importlib.util as util
from importlib.metadata import version

for name in ("torch", "transformers", "accelerate", "peft", "datasets", "trl"):
    print(name, version(name))
for name in ("liger_kernel", "cut_cross_entropy", "flash_attn", "deepspeed"):
    print(name, "importable" if util.find_spec(name) else "not there")
PY

say "tests of the engine and of training on $device"
"$python" -u -m pytest -q -p no:cacheprovider tests/project/test_gpu.py

for shape in $shapes; do
  say "scoring at $shape against one pass per prefix"
  "$python" -u benchmarks/scoring.py W2 --shape "$shape" --device "$device" --dtype "$dtype" \
    --responses "$responses" --rounds "$rounds" --per-prefix 1
done

for finetuning in lora full; do
  say "a training step at $train_shape, $length tokens, $finetuning"
  "$python" -u benchmarks/training.py "$finetuning" --shape "$train_shape" --device "$device" \
    --dtype "$dtype" --length "$length" --batch 1 --rounds 5 --arms stock precomputed \
    --checkpointing
done

say "memory where logits are most of it"
"$python" -u benchmarks/training.py logits --device "$device" --length "$length"
say "done"
