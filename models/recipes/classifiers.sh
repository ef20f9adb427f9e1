#!/bin/sh
# Make models/classifiers again, with the public trainer only: models/recipes/classifiers.sh [DIRECTORY]
# Run from the repository's root, with lora-edge[train] installed. One thread: the bytes depend on it.
set -eu
out=${1:-models/classifiers}
data=$(mktemp -d)
trap 'rm -rf "$data"' EXIT
export OMP_NUM_THREADS=1

python models/recipes/classes.py "$data" models/data/classes

train() {
  name=$1
  shift
  python -m lora_edge train models/tiny-bert "$data/$name.jsonl" -o "$out/$name" \
    --batch-size 32 --force "$@"
}

# Plain LoRA, by names; 2 labels.
train claims --rank 8 --alpha 16 --target-modules query,key,value,dense --lr 2e-3 --epochs 1 --seed 1

# rsLoRA of two ranks on every linear layer, the pooler included; 4 labels.
train letters --rank 12 --alpha 12 --rslora --rank-pattern value=4 --lr 1e-3 --epochs 10 --seed 2
