#!/usr/bin/env bash
# What users see on machines that lack something: each case must end with the exit code and words that are stated here.
#
#     tests/gpu/bad_machines.sh FOLDER-OF-BINARIES [WORK-FOLDER]
#
# Needs one or two CUDA GPUs of architecture sm_90 with everything in place, which it then takes away piece by piece, and
# python3 with torch to fill the memory of a GPU. Models come from fixtures/onnx.
set -uo pipefail
binaries=$(cd "$1" && pwd)
work=${2:-$(mktemp -d)}
cd "$(dirname "$0")/../.."
absent=/nonexistent/library.so
failures=0

# expect NAME CODE WORDS COMMAND…: runs the command, shows what it says, and compares.
expect() {
    local name=$1 code=$2 words=$3 output found
    shift 3
    output=$("$@" 2>&1)
    found=$?
    printf -- '-- %s (exit %s)\n%s\n' "$name" "$found" "$output"
    if [[ $found != "$code" ]]; then
        printf 'FAILED: exit code %s, not %s\n' "$found" "$code"
        failures=$((failures + 1))
    elif ! grep -qi -- "$words" <<<"${output//$'\n'/ }"; then
        printf 'FAILED: does not say "%s"\n' "$words"
        failures=$((failures + 1))
    fi
}

model() { printf 'fixtures/onnx/%s/model.onnx --like fixtures/onnx/%s/test_data_set_0' "$1" "$1"; }

# shellcheck disable=SC2046
build() { "$binaries/compile" $(model "$1") --target "${3:-h200x4}" --mesh "tensor=$2" -o "$work/$1.$2.plan" >/dev/null; }

build tiny_bert 1 && build tiny_resnet 1 && build tiny_llama 2 || exit 1
sed 's/sm_90a/sm_80/' fixtures/targets/h200x4.json >"$work/ampere.json"
build tiny_gpt2 1 "$work/ampere.json" || exit 1

run=("$binaries/plan" run)
expect "no driver" 5 "driver" env PLANWRIGHT_CUDA_DRIVER=$absent "${run[@]}" "$work/tiny_bert.1.plan"
expect "no driver, on the CPU" 0 "last_hidden_state" \
    env PLANWRIGHT_CUDA_DRIVER=$absent "${run[@]}" --devices cpu "$work/tiny_bert.1.plan"
expect "no cuBLASLt" 5 "cuBLASLt" env PLANWRIGHT_CUBLASLT=$absent "${run[@]}" "$work/tiny_bert.1.plan"
expect "no cuDNN" 5 "cuDNN" env PLANWRIGHT_CUDNN=$absent "${run[@]}" "$work/tiny_resnet.1.plan"
expect "no cuDNN where none is needed" 0 "last_hidden_state" \
    env PLANWRIGHT_CUDNN=$absent "${run[@]}" "$work/tiny_bert.1.plan"
# shellcheck disable=SC2046
expect "no NVRTC" 5 "NVRTC" env PLANWRIGHT_NVRTC=$absent PLANWRIGHT_CACHE="$work/empty" \
    "$binaries/compile" $(model tiny_bert) --target h200x4 -o "$work/none.plan"
# shellcheck disable=SC2046
expect "no NVRTC where none is needed" 0 "wrote" env PLANWRIGHT_NVRTC=$absent PLANWRIGHT_CACHE="$work/empty" \
    "$binaries/compile" $(model tiny_bert) --target cpu -o "$work/cpu.plan"
expect "another architecture" 5 "sm_80" "${run[@]}" "$work/tiny_gpt2.1.plan"
expect "fewer GPUs than the plan needs" 5 "GPU" env CUDA_VISIBLE_DEVICES=0 "${run[@]}" "$work/tiny_llama.2.plan"
expect "the same GPU twice" 2 "twice" "${run[@]}" --devices cuda:0,0 "$work/tiny_llama.2.plan"
expect "a GPU that is not there" 5 "63" "${run[@]}" --devices cuda:63 "$work/tiny_bert.1.plan"
if [[ $(nvidia-smi -L | wc -l) -ge 2 ]]; then
    expect "no NCCL" 5 "NCCL" env PLANWRIGHT_NCCL=$absent "${run[@]}" "$work/tiny_llama.2.plan"
else
    echo "-- no NCCL: not run, it needs two GPUs"
fi

python3 - "$work/filled" <<'FILL' &
import pathlib, sys, time, torch
held = []
size = 1 << 33
while size >= 1 << 21:
    try:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda:0"))
    except torch.OutOfMemoryError:
        size //= 2
pathlib.Path(sys.argv[1]).touch()
time.sleep(300)
FILL
filler=$!
for _ in $(seq 120); do [[ -e $work/filled ]] && break; sleep 0.5; done
expect "memory taken by another process" 5 "memory" "${run[@]}" "$work/tiny_resnet.1.plan"
kill "$filler" && wait "$filler" 2>/dev/null

echo
echo "$failures failures"
[[ $failures == 0 ]]
