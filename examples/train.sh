#!/usr/bin/env bash
# The tutorial's command for Atom-7B-Chat. Further flags go on behind it: bash examples/train.sh --num_train_epochs 3
#
#   MODEL    the base: a folder, or its name on the hub (HF_ENDPOINT chooses a mirror)
#   DATASET  a JSONL of instruction, input, output
#   OUTPUT   where the adapter goes
#
# 120,000 steps of 16 are 515 passes over 3,729 records, as the tutorial has it; three passes (--max_steps -1
# --num_train_epochs 3) are a good first try.
set -euo pipefail

atomtune train \
    --dataset_path "${DATASET:-dataset/huanhuan.jsonl}" \
    --model_path "${MODEL:-FlagAlpha/Atom-7B-Chat}" \
    --lora_rank 8 \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 1 \
    --max_steps 120000 \
    --save_steps 40000 \
    --save_total_limit 3 \
    --learning_rate 1e-4 \
    --fp16 \
    --remove_unused_columns false \
    --logging_steps 10 \
    --output_dir "${OUTPUT:-output}" \
    "$@"
