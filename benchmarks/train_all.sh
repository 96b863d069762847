#!/usr/bin/env bash
# Every run that the shipped weights and the paper's table need, the most valuable first.
#
#   benchmarks/train_all.sh                                    # a GPU, all of Tiny ImageNet
#   benchmarks/train_all.sh --epochs 1 --limit-train 2000      # a try on a CPU
#
# Arguments go to every run. A run that was stopped goes on; one that is done stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

for recipe in modern paper; do
    for arch in resnet20 inception alexnet baseline; do
        run=runs/$arch-$recipe
        [ -e "$run/weights.pt" ] && continue
        resume=()
        [ -e "$run/checkpoint.pt" ] && resume=(--resume)
        python -m training.fit --arch "$arch" --recipe "$recipe" --out "$run" "${resume[@]}" "$@"
        if [ "$recipe" = modern ]; then python -m training.export "$run" -o exported/; fi
    done
done
