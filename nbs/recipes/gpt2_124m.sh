#!/bin/sh
# GPT-2 with 124M parameters on 10 billion tokens of FineWeb-Edu; nbs/19_train.ipynb explains it.
# Run it again after any interruption, also on another machine that sees the same two folders, and it
# goes on where it stopped. Settings come from the environment:
#
#   DATA          folder for the shards, 20 GB          (data/finewebedu10B-gpt2)
#   OUT           folder of the run                      (runs/gpt2_124m)
#   GPUS          processes on this machine              (as many as nvidia-smi lists)
#   REVISION      commit of the data set on the Hub      (the newest, or that of DATA)
#   SAVE_MINUTES  minutes between extra checkpoints      (15)
#   FLAGS         more flags for gpt2_train
set -e
DATA=${DATA:-data/finewebedu10B-gpt2}
OUT=${OUT:-runs/gpt2_124m}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

if ! gpt2_prepare --verify "$DATA" > /dev/null 2>&1; then
    gpt2_prepare --dataset finewebedu10B-gpt2 --out "$DATA" ${REVISION:+--revision "$REVISION"}
fi
python -c 'import hashlib, sys; print("manifest", hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
    "$DATA/manifest.json"

# the micro-batch is what the memory of the smallest card holds; a step has 524,288 tokens on any machine
set -- --preset gpt2 --data "$DATA" --out "$OUT" --resume --save_minutes "${SAVE_MINUTES:-15}" ${FLAGS:-}
if [ "$GPUS" -gt 1 ]; then
    exec torchrun --standalone --nproc_per_node "$GPUS" --max-restarts 3 -m gpt2_nb.train "$@"
fi
exec gpt2_train "$@"
