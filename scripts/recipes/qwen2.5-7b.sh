#!/usr/bin/env bash
# A draft for Qwen2.5-7B-Instruct with the arguments of SpecForge's script. Not run: no weights.
# What was run is one step at these draft shapes on random tensors: python -m bench.recipe_step
# usage: scripts/recipes/qwen2.5-7b.sh TARGET CONVERSATIONS OUT [MORE OF THE SCRIPT'S ARGUMENTS]
# TARGET is a folder or hub id, CONVERSATIONS a JSONL file. One GPU with 80 GB; features take 28 KiB a token.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
target="$1" conversations="$2" out="$3"
shift 3
draft="$here/qwen2.5-7b-draft.json"
eagle3fn extract --target "$target" --device cuda --conversations "$conversations" --draft-config "$draft" \
  --out "$out/features" --max-length 2048
exec torchrun --standalone --nproc-per-node 1 "$here/../train_eagle3_fn.py" --target-model-path "$target" \
  --draft-model-config "$draft" --train-data-path "$conversations" --train-hidden-states-path "$out/features" \
  --output-dir "$out/run" --cache-dir "$out/cache" --chat-template qwen --max-length 2048 --batch-size 1 \
  --num-epochs 10 --learning-rate 1e-4 --warmup-ratio 0.015 --max-grad-norm 0.5 --ttt-length 7 \
  --attention-backend flex_attention "$@"
