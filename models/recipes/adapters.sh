#!/bin/sh
# Make models/adapters again, with the public trainer only: models/recipes/adapters.sh [DIRECTORY]
# Run from the repository's root, with lora-edge[train] installed. One thread: the bytes depend on it.
set -eu
out=${1:-models/adapters}
data=$(mktemp -d)
trap 'rm -rf "$data"' EXIT
export OMP_NUM_THREADS=1

python models/recipes/tasks.py "$data" models/data

train() {
  name=$1
  shift
  python -m lora_edge train models/tiny-llama "$data/$name.jsonl" -o "$out/$name" \
    --batch-size 32 --weight-decay 1 --force "$@"
}

# Plain LoRA on q and v.
train shout --rank 8 --alpha 16 --target-modules q_proj,v_proj --lr 3e-3 --epochs 2 --seed 1

# rsLoRA on every linear layer.
train mirror --rank 16 --alpha 16 --rslora --lr 5e-4 --epochs 1 --seed 2

# Ranks 4, 8, 12, 24 and scalings 4, 2, 0.5, 3, 1.5 over attention and MLP.
train echo --rank 8 --alpha 16 --lr 1e-3 --epochs 2 --seed 3 \
  --target-modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj \
  --rank-pattern q_proj=4 --rank-pattern 'layers\.0\.mlp\.down_proj=24' \
  --rank-pattern 'mlp\..*=12' \
  --alpha-pattern o_proj=4 --alpha-pattern 'mlp\..*=36'
