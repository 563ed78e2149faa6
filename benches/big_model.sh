#!/usr/bin/env bash
# Compiles models of several gigabytes and prints wall time, megabytes a second and peak memory of each run, beside what
# the disk does alone. Needs GNU time, and Python with onnx and numpy (PYTHON=...); about three times MIB on the disk.
#
#     benches/big_model.sh [FOLDER]           # a new folder below TMPDIR unless given; what it wrote is removed
#     MIB=1024 benches/big_model.sh           # smaller
set -euo pipefail
cd "$(dirname "$0")/.."

mib=${MIB:-4096}
python=${PYTHON:-python3}
compile=${COMPILE:-target/release/compile}
[ -x "$compile" ] || cargo build --release --bin compile
folder=$(mktemp -d "${1:-${TMPDIR:-/tmp}}/big_model.XXXXXX")
trap 'rm -rf "$folder"' EXIT

# measure LABEL COMMAND...: writes a line; the plan's bytes count for the speed, or the file's named plan.
measure() {
    local label=$1
    shift
    rm -f "$folder/plan"
    if ! /usr/bin/time -f '%e %M %U %S' -o "$folder/time" "$@" >"$folder/log" 2>&1; then
        cat "$folder/log" >&2
        exit 1
    fi
    local seconds kib user system bytes
    read -r seconds kib user system <"$folder/time"
    bytes=$(stat -c %s "$folder/plan")
    awk -v l="$label" -v s="$seconds" -v k="$kib" -v u="$user" -v y="$system" -v b="$bytes" 'BEGIN {
        printf "%-34s %8.0f MB %7.1f s %6.0f MB/s %6.0f MiB peak %6.1f s cpu\n",
            l, b / 1e6, s, b / 1e6 / (s > 0 ? s : 0.01), k / 1024, u + y }'
}

heading() { printf '\n%s\n' "$1"; }

heading "$(nproc) cores, $(date -u +%F), $("$compile" --version)"

"$python" fixtures/big_model.py "$folder/model" products --mib "$mib" >/dev/null
model=$folder/model/model.onnx
sync
measure "dd: copy and sync, no compiler" dd if="$folder/model/weights.bin" of="$folder/plan" bs=16M conv=fsync
measure "products, f32" "$compile" "$model" -o "$folder/plan"
measure "products, --dtype bf16" "$compile" "$model" -o "$folder/plan" --dtype bf16
measure "products, --dtype f16" "$compile" "$model" -o "$folder/plan" --dtype f16
measure "products, --mesh tensor=2" "$compile" "$model" -o "$folder/plan" --mesh tensor=2
measure "products, tensor=2, bf16" "$compile" "$model" -o "$folder/plan" --mesh tensor=2 --dtype bf16
rm -rf "$folder/model"

"$python" fixtures/big_model.py "$folder/model" table --mib "$((mib / 2))" >/dev/null
sync
measure "transposed table, f32" "$compile" "$model" -o "$folder/plan"
measure "transposed table, --dtype bf16" "$compile" "$model" -o "$folder/plan" --dtype bf16
measure "transposed table, --mesh tensor=2" "$compile" "$model" -o "$folder/plan" --mesh tensor=2
rm -rf "$folder/model"

heading "graphs of many small weights: time must grow with their number, not its square"
for count in 2500 5000 10000; do
    "$python" fixtures/big_model.py "$folder/model" many --count "$count" >/dev/null
    measure "$count weights" "$compile" "$model" -o "$folder/plan"
    rm -rf "$folder/model"
done
