#!/usr/bin/env bash
# The works of the README's table, whet and its peers one after another on one GPU, with one run id.
#
#   bench/fused.sh OUT [WORK ...]      without WORK: all of them, in this order
#
# OUT/fused.jsonl gets each line as soon as its run is done, OUT/trace two profiled steps of whet and of Unsloth within
# 21 GiB, OUT/logs what they said. A run that fails or outlasts its time is said at the end; the exit status is then 1.
# RUN_ID: of another call in the same command, for engines that need other packages.
set -uo pipefail
out=$(realpath -m "${1:?usage: bench/fused.sh OUT [WORK ...]}"); shift
cd "$(dirname "$0")/.."
mkdir -p "$out/logs"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" TQDM_DISABLE=1
run=${RUN_ID:-$(date +%s)}
failed=()

one() { # seconds, engine, name, arguments of finetune.py
  local limit=$1 engine=$2 name=$3; shift 3
  timeout "$limit" python bench/finetune.py --engine "$engine" --run-id "$run" --out "$out/fused.jsonl" "$@" \
    > "$out/logs/$name.log" 2>&1 || failed+=("$name")
  echo "$SECONDS s: $name"
}

qlora="--model 8b --bs 2 --ga 4 --seq 2048"
works=("${@:-}")
[ -n "${works[0]}" ] || works=(8b-21 8b-6.77 8b-11.25 8b-fp8 8b-16bit 16k mixed 1b 1b-full 64k unsloth-8b hf-8b unsloth-1b hf-1b)
for work in "${works[@]}"; do
  case $work in
    8b-21)      one 120 whet $work $qlora --gpu-memory 21 ;;
    8b-trace)   one 150 whet $work $qlora --gpu-memory 21 --trace "$out/trace" ;;
    8b-6.77)    one 120 whet $work $qlora --gpu-memory 6.77 ;;
    8b-11.25)   one 120 whet $work $qlora --gpu-memory 11.25 ;;
    8b-fp8)     one 120 whet $work $qlora --gpu-memory 21 --compute fp8 ;;
    8b-16bit)   one 120 whet $work $qlora --gpu-memory 16.2 --bits 16 ;;
    16k)        one 150 whet $work --model 8b --bs 1 --ga 1 --seq 16384 --gpu-memory 8.8 ;;
    64k)        one 300 whet $work --model 8b --bs 1 --ga 1 --seq 65536 --gpu-memory 17.4 --steps 8 --warm 1 ;;
    mixed)      one 120 whet $work --model 8b --bs 8 --ga 1 --seq 2048 --gpu-memory 21 --mixed --packing ;;
    1b)         one 90 whet $work --model 1b --bs 2 --ga 4 --seq 2048 --gpu-memory 3 ;;
    1b-full)    one 90 whet $work --model 1b --full --bs 4 --ga 2 --seq 2048 --gpu-memory 10 ;;
    unsloth-8b) one 180 unsloth $work $qlora --trace "$out/trace" ;;
    unsloth-1b) one 120 unsloth $work --model 1b --bs 2 --ga 4 --seq 2048 ;;
    hf-8b)      one 180 hf $work $qlora ;;
    hf-1b)      one 120 hf $work --model 1b --bs 2 --ga 4 --seq 2048 ;;
    *)          echo "no such work: $work" >&2; failed+=("$work") ;;
  esac
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
