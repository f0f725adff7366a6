#!/usr/bin/env bash
# Level skipping in a U-Net (Giladi, Meir, Kawar and Elad) on the digits: trains six networks, prints the three tables of
# their report in small, and says whether leaving early beats fewer DDIM steps at equal seconds.
#   bash scripts/digits_levels.sh [FOLDER [FLAGS of scripts.digits_levels]]
# TUNED_STEPS=2 CONFIG=configs/digits_levels_tiny.py:quick in front tries the control flow (then with flags such as
# --steps 4 --ours 4 --ddim 2 4 --images 8). What is finished is not done again.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

CONFIG=${CONFIG:-configs/digits_levels_tiny.py}
FOLDER=${1:-runs/levels}
FULL="--config.train.depths=schedule --config.exit.levels.c=0.0"      # every batch at full depth: DDPM's own training
MATCHED="--config.train.depths=schedule --config.exit.levels.c=2.0"   # their second scheme
read -ra FLAGS <<< "${FLAGS:-}"                                       # of every training

train() { # NAME FLAGS...
    python train.py --config="$CONFIG" --workdir="$FOLDER/$1" "${FLAGS[@]}" "${@:2}"
}

tune() { # NAME FLAGS...: on from the plain network, for half as many steps
    train "$1" --pretrained_weight="$FOLDER/plain/last.ckpt" --config.train.n_steps="${TUNED_STEPS:-500}" "${@:2}"
}

train plain $FULL
tune control $FULL
for missing in zero duplicate interpolate; do
    tune $missing --config.nnet.missing=$missing # their first scheme: depths at random
done
tune matched $MATCHED
python -m scripts.digits_levels "$FOLDER" "${@:2}"
