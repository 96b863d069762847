#!/usr/bin/env bash
# The runs that RESULTS.md compares, the most valuable first. The weights of `modern` are shipped, but for
# baseline's: those are of baseline-restarted2. The runs named -cpu and -restarted, whatever number follows,
# were made by hand; their settings are in docs/runs/.
#
#   benchmarks/train_all.sh modern paper paper5 precision   # a GPU, all of Tiny ImageNet
#   benchmarks/train_all.sh ablation
#   TIME_LIMIT=540 benchmarks/train_all.sh modern           # in slices: run it again to go on
#   benchmarks/train_all.sh modern paper precision ablation -- --epochs 1 --limit-train 512   # a try
#
# Groups of runs, then "--" and arguments for every run. A run that was stopped goes on. Of one that is
# done the record is kept in docs/runs/ and RESULTS.md written again; it is not run a second time while
# that record is there, and the runs that it is to teach are left out where its weights are gone. With
# arguments of your own, all of that is in a folder runs/other-* of theirs instead. A run that fails stops no
# other; the exit code is then the last one's that failed. TIME_LIMIT is in seconds, for all together. RUNS,
# RECORDS, RESULTS and FIGURES name other places, PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

groups=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do groups+=("$1"); shift; done
[ $# -eq 0 ] || shift
extra=("$@") failed=0

python=${PYTHON:-python}
compile=() on_gpu=no
! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null ||
    { on_gpu=yes compile=(--compile); }
if [ ${#extra[@]} -eq 0 ]; then
    runs=${RUNS:-runs} records=${RECORDS:-docs/runs}
    results=${RESULTS:-RESULTS.md} figures=${FIGURES:-docs/figures}
else  # a try, or another length: no rows for the tables of the real runs
    other=runs/other-$(printf '%s\n' "${extra[@]}" | cksum | cut -d ' ' -f 1)
    runs=${RUNS:-$other} records=${RECORDS:-$other/records}
    results=${RESULTS:-$other/RESULTS.md} figures=${FIGURES:-$other/figures}
fi

# train NAME ARGUMENTS...: one run, in the time that is left.
train() {
    local name=$1 run=$runs/$1 go_on=("${compile[@]}")
    shift
    if [ -e "$records/$name/result.json" ]; then
        echo "$name: done, its record is $records/$name"
        return
    fi
    local teacher=${*: -1}  # of the runs that have one it is the last argument
    if [[ " $* " == *" --teacher "* && ! -e $teacher/weights.pt ]]; then
        echo "$name is left out: its teacher's weights ($teacher/weights.pt) are gone; remove" \
            "$records/${teacher##*/} to train it again" >&2
        return
    fi
    if [ ! -e "$run/weights.pt" ]; then
        [ ! -e "$run/checkpoint.pt" ] || go_on+=(--resume)
        if [ -n "${TIME_LIMIT:-}" ]; then
            [ "$SECONDS" -lt "$TIME_LIMIT" ] || { echo "out of time before $name"; exit 0; }
            go_on+=(--time-limit $((TIME_LIMIT - SECONDS)))
        fi
        "$python" -m training.fit "$@" "${extra[@]}" --out "$run" "${go_on[@]}" || {
            failed=$?
            [ "$failed" -lt 128 ] || exit "$failed"  # stopped by a signal, as all is meant to be
            echo "$name failed with exit code $failed" >&2
            return 0
        }
        [ -e "$run/weights.pt" ] || { echo "out of time in $name: run this again to go on"; exit 0; }
    fi
    reported || failed=$?
    "$python" -m training.report "$records" --keep "$run" -o "$results" --figures "$figures" >/dev/null &
    reporting=$!
}

# RESULTS.md is written while the next run begins: on a GPU that is a tenth of a short run's time.
reporting=
reported() { [ -z "$reporting" ] || wait "$reporting"; }
trap 'reported || exit $?' EXIT

# The best network first: it teaches the others, and then itself. Three of them are shorter than their
# recipe: all four were to take ten minutes of an NVIDIA H200.
modern() {
    train resnet20-modern --arch resnet20 --epochs 56 --set cutmix=0.4 --set 'sizes=[[0,48],[0.75,64]]'
    local teacher=(--set distill_once=true --teacher "$runs/resnet20-modern")
    train inception-modern --arch inception --epochs 20 --set 'sizes=[[0,48],[0.75,56]]' "${teacher[@]}"
    train alexnet-modern --arch alexnet --epochs 26 --lr 0.15 --set cutmix=0.2 --set dropout=0.3 \
        --set 'sizes=[[0,48],[0.6,56]]' "${teacher[@]}"
    train baseline-modern --arch baseline --epochs 80 --batch-size 1024 --lr 0.6 "${teacher[@]}"
    train resnet20-distilled --arch resnet20 "${teacher[@]}"
}

paper() {
    for arch in resnet20 inception alexnet baseline; do
        train "$arch-paper" --arch "$arch" --recipe paper
    done
}

# As long as the paper's hours suggest that its ten epochs were: each cosine five times through the data.
paper5() {
    for arch in resnet20 inception alexnet baseline; do
        train "$arch-paper5" --arch "$arch" --recipe paper --epochs 50 --set restart_epochs=5
    done
}

# Section 4.2.3 of the paper; fp16 needs a GPU.
precision() {
    local kinds=(fp32 bf16)
    [ $on_gpu = no ] || kinds+=(fp16)
    for kind in "${kinds[@]}"; do
        train "precision-$kind-resnet20" --arch resnet20 --recipe paper --epochs 2 --precision "$kind"
    done
}

# One ingredient of the modern recipe at a time, on images held out of train: on a GPU at the sizes of the
# shipped network, elsewhere on small images, few of them, of which a CPU core does a run in ten minutes to
# an hour.
ablation() {
    if [ $on_gpu = yes ]; then ablation_on_gpu; else ablation_on_cpu; fi
}

ablation_on_gpu() {
    local base=(--holdout 5000 --arch resnet20 --epochs 15 --set 'sizes=[[0,48],[0.75,64]]')
    train ablation-gpu-base "${base[@]}"
    train ablation-gpu-no-shortcuts "${base[@]}" --arch plain20
    train ablation-gpu-no-cutmix "${base[@]}" --set cutmix=0
    train ablation-gpu-mixup "${base[@]}" --set cutmix=0 --set mixup=0.5
    train ablation-gpu-no-averaging "${base[@]}" --set ema=null
    train ablation-gpu-no-smoothing "${base[@]}" --set label_smoothing=0
    train ablation-gpu-no-warmup "${base[@]}" --set warmup=0
    train ablation-gpu-decay-everything "${base[@]}" --set decay_norms_and_biases=true
    train ablation-gpu-plain-crops "${base[@]}" --set crop_area=null --set crop=56
    train ablation-gpu-one-size "${base[@]}" --set 'sizes=[[0,64]]'
    train ablation-gpu-distilled "${base[@]}" --set distill_once=true --teacher "$runs/ablation-gpu-base"
}

ablation_on_cpu() {
    local base=(--holdout 5000 --limit-train 20000 --batch-size 128 --set ema=0.99)
    local resnet=("${base[@]}" --arch resnet20 --epochs 5 --lr 0.1 --set 'sizes=[[0,16],[0.4,24]]')
    local bf16=("${resnet[@]}" --precision bf16) fp32=("${resnet[@]}" --precision fp32)
    train ablation-base "${bf16[@]}"
    train ablation-no-shortcuts "${bf16[@]}" --arch plain20
    train ablation-no-cutmix "${bf16[@]}" --set cutmix=0
    train ablation-mixup "${bf16[@]}" --set cutmix=0 --set mixup=0.5
    train ablation-no-averaging "${bf16[@]}" --set ema=null
    train ablation-no-smoothing "${bf16[@]}" --set label_smoothing=0
    train ablation-plain-crops "${bf16[@]}" --set crop_area=null --set crop=56
    train ablation-one-size "${bf16[@]}" --set 'sizes=[[0,24]]'
    # With a base of their own: they were trained on a processor without bf16.
    train ablation-fp32-base "${fp32[@]}"
    train ablation-fp32-no-warmup "${fp32[@]}" --set warmup=0
    train ablation-fp32-decay-everything "${fp32[@]}" --set decay_norms_and_biases=true
    train ablation-fp32-distilled "${fp32[@]}" --teacher "$runs/ablation-fp32-base"

    # The network that learns most in minutes.
    base+=(--arch baseline --epochs 12 --lr 0.2 --precision fp32)
    train ablation-baseline-base "${base[@]}"
    train ablation-baseline-seed1 "${base[@]}" --seed 1
    train ablation-baseline-no-warmup "${base[@]}" --set warmup=0
    train ablation-baseline-no-averaging "${base[@]}" --set ema=null
    train ablation-baseline-no-smoothing "${base[@]}" --set label_smoothing=0
    train ablation-baseline-plain-crops "${base[@]}" --set crop_area=null --set last_crop_area=null \
        --set crop=56
    train ablation-baseline-same-crops "${base[@]}" --set last_crop_area=null
    train ablation-baseline-cutmix "${base[@]}" --set cutmix=0.5
    train ablation-baseline-no-dropout "${base[@]}" --set dropout=0
    train ablation-baseline-decay-everything "${base[@]}" --set decay_norms_and_biases=true
    train ablation-baseline-distilled "${base[@]}" --teacher "$runs/ablation-baseline-base"
}

for group in "${groups[@]}"; do
    case $group in
        modern | paper | paper5 | precision | ablation) ;;
        *) echo "unknown group $group: modern, paper, paper5, precision or ablation" >&2; exit 2 ;;
    esac
done
[ "${#groups[@]}" -gt 0 ] || { echo "name groups of runs: modern, paper, paper5, precision, ablation" >&2; exit 2; }
for group in "${groups[@]}"; do "$group"; done
exit "$failed"
