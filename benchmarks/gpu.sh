#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, on a fresh machine with torch >= 2.11, triton and nvcc and without a network.
#
#   benchmarks/gpu.sh [all|check|sanitize|sweep|tune] [--minutes 9] [arguments of the part]
#   benchmarks/gpu.sh prepare [--seconds 700]     on a machine without a GPU, with the lent one's triton and nvcc
#   benchmarks/gpu.sh lease [--seconds 540] [--rehearse]
#
# prepare builds the library for Hopper, fills Triton's cache with what will be timed, packs both into build/lease/lease.tar.xz
# lease   unpacks them, then by their worth: first calls, the tests that failed before, whole networks, all tests with
#         compute-sanitizer beside them, tuning, the sweep; page.txt and results.tar.gz under $OUT after each
# check   a first call of every kernel, pytest -m gpu (arguments: pytest's), then compute-sanitizer's memcheck, racecheck
#         and synccheck on the CUDA C++ kernels
# sweep   the figures: python -m benchmarks.gpu.run; --part 1/3 … 3/3 split it, --op, --only REGIME choose, --resume goes on
# tune    configurations and dispatch tables: python -m inherit_kernels.tune --device cuda; names of ops choose
# all     check in at most a third of the time, the sweep's most important cases in the rest
#
# Results go to $OUT if it is set, else to benchmarks/results/<device>/ (logs: build/gpu/). --rehearse runs the same on a CPU
# with tiny cases. PYTHON names the interpreter. It keeps --minutes, and what it prints last is the table of figures.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/python:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# ptxas 12.8, which triton 3.6 and 3.7 run for Hopper, computes wrong gradients (inherit_kernels/testing/machine_code.py);
# the one that they bring for Blackwell is newer. Caches that were filled ahead must have been filled with the same one.
if [ -z "${TRITON_PTXAS_PATH:-}" ]; then
  newer=$("$PYTHON" -c 'import pathlib, triton.backends.nvidia.compiler as c
old = c.get_ptxas(90)
if tuple(map(int, old.version.split(".")[:2])) < (12, 9): print(pathlib.Path(old.path).with_name("ptxas-blackwell"))' 2>/dev/null)
  [ -x "$newer" ] && export TRITON_PTXAS_PATH=$newer && echo "TRITON_PTXAS_PATH=$newer"
fi

case "${1:-}" in
  prepare)
    TORCH_CUDA_ARCH_LIST=9.0a INHERIT_KERNELS_BUILD=cuda "$PYTHON" setup.py native >/dev/null || exit 1
    exec "$PYTHON" -m benchmarks.gpu.lease "$@"
    ;;
  lease) shift && exec "$PYTHON" -m benchmarks.gpu.lease run "$@" ;;
esac

part=all minutes=9 rehearse="" rest=()
case "${1:-}" in all | check | sanitize | sweep | tune) part=$1 && shift ;; esac
while [ $# -gt 0 ]; do
  case "$1" in
    --minutes) minutes=$2 && shift 2 ;;
    --rehearse) rehearse=1 && shift ;;
    -h | --help) sed -n '2,21s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) rest+=("$1") && shift ;;
  esac
done
budget=$("$PYTHON" -c "print(int(60 * float('$minutes')))") || exit 2
left() { echo $((budget - SECONDS > 0 ? budget - SECONDS : 0)); }
within() { # seconds command…: the command, ended when its time is over
  local seconds=$1 && shift
  timeout -k 10 "$seconds" "$@"
}

gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv,noheader 2>/dev/null | head -1)
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
arch=${capability:-8.0;9.0a}
[ "$arch" = 9.0 ] && arch=9.0a
slug=$(echo "${gpu%%,*}" | tr 'A-Z ' 'a-z-')
[ -n "$rehearse" ] && slug=rehearsal && gpu="none: a rehearsal"
results=${OUT:-benchmarks/results/${slug:-none}} logs=${OUT:-build/gpu}
mkdir -p "$logs"
failed=0

build() {
  [ -n "$rehearse" ] && return
  local log
  log=$(mktemp)
  # For this device alone: images set TORCH_CUDA_ARCH_LIST to lists that reach back to what has no bfloat16.
  if TORCH_CUDA_ARCH_LIST=$arch INHERIT_KERNELS_BUILD=cuda within 200 "$PYTHON" setup.py native >"$log" 2>&1; then
    echo "built with CUDA in $SECONDS s: $(ls -l inherit_kernels/_C.abi3.so | awk '{print $5}') bytes"
  else
    failed=1
    echo "the build with CUDA failed:" && tail -n 25 "$log"
    INHERIT_KERNELS_BUILD=auto within 120 "$PYTHON" setup.py native >"$log" 2>&1 || tail -n 5 "$log"
  fi
  "$PYTHON" -c "import inherit_kernels as ik, torch
print(ik.status())
print('self-test:', torch.ops.inherit_kernels_C.cuda_self_test() if ik._native.load() else ik._native.error)"
}

first_calls() { # what hangs or is wrong at once shows here, not after minutes
  local backend code
  [ -n "$rehearse" ] && return
  for backend in native triton; do
    within 60 "$PYTHON" -m benchmarks.gpu.sanitize "$backend" 2>&1 | tail -n 6 | cut -c1-200
    code=${PIPESTATUS[0]}
    case $code in 0 | 3) ;; *) failed=1 && echo "first calls of $backend: exit $code" ;; esac
  done
}

tests() { # seconds arguments of pytest…
  local files extra=() code seconds=$1 && shift
  mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)
  if [ -n "$rehearse" ]; then
    extra+=(--gpu-rehearsal)
  elif "$PYTHON" -c 'import xdist' 2>/dev/null; then # the time goes into compiling Triton kernels: so many at a time
    extra+=(-n "$(($(nproc) < 16 ? $(nproc) : 16))" --max-worker-restart 100)
  fi
  # A thread ends the process: a signal does not reach one that waits for the device.
  "$PYTHON" -c 'import pytest_timeout' 2>/dev/null && extra+=(--timeout 90 --timeout-method=thread)
  # The repository's own options are replaced, so that a plugin which is not here cannot matter.
  OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=2 timeout -s INT -k 45 "$seconds" "$PYTHON" -m pytest -o addopts= \
    --import-mode=importlib -m gpu -p no:cacheprovider -v --tb=short -rfE \
    "${extra[@]}" "$@" "${files[@]}" >"$logs/check.txt" 2>&1
  code=$?
  tail -n 40 "$logs/check.txt" | cut -c1-300
  [ $code -eq 0 ] || [ $code -eq 124 ] || failed=1
  [ $code -eq 124 ] && echo "tests: stopped after $seconds s, the rest was not run"
  echo "tests: exit $code, skipped: $(grep -Eo '[0-9]+ skipped' "$logs/check.txt" | tail -1)"
}

reported() { # log: whether compute-sanitizer reported an error
  grep -qE '(ERROR|RACECHECK) SUMMARY: [1-9]' "$1"
}

sanitize() {
  local tool folder code check seconds
  if [ -n "$rehearse" ]; then
    "$PYTHON" -m benchmarks.gpu.sanitize unfused --device cpu --dtype float32 || failed=1
    return
  fi
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2>/dev/null | head -1)
  [ -z "$tool" ] && echo "compute-sanitizer: not run: it is not installed" && return
  folder=$(mktemp -d)
  PATH="$PATH:/usr/local/cuda/bin" nvcc -O1 -o "$folder/planted" benchmarks/gpu/planted.cu >"$folder/log" 2>&1
  for check in memcheck racecheck synccheck; do
    within 60 "$tool" --tool $check "$folder/planted" $check >"$folder/log" 2>&1
    if ! reported "$folder/log"; then
      echo "$check: not run: it does not find a planted error here: $(grep -v '^$' "$folder/log" | tail -1)"
      continue
    fi
    [ "$(left)" -lt 30 ] && echo "$check: not run: no time left" && continue
    seconds=$(($(left) - 10))
    [ $check = memcheck ] && seconds=$((seconds / 2))
    [ $check = racecheck ] && seconds=$((seconds * 2 / 3))
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within "$seconds" "$tool" --tool $check --print-limit 5 --report-api-errors no \
      "$PYTHON" -m benchmarks.gpu.sanitize native --forward --dtype bfloat16 float32 >"$folder/log" 2>&1
    code=$?
    cat "$folder/log" >>"$logs/check.txt"
    if reported "$folder/log"; then
      failed=1 && echo "$check: ERRORS" && grep '=========' "$folder/log" | head -20
    elif [ $code -eq 0 ]; then
      echo "$check: no error; $(grep 'cases ran' "$folder/log")"
    elif [ $code -eq 3 ]; then
      echo "$check: not run: the native backend serves nothing here"
    elif [ $code -eq 124 ]; then
      echo "$check: not run to its end in $seconds s"
    else
      failed=1 && echo "$check: ended with $code" && tail -n 5 "$folder/log"
    fi
  done
}

tune() { # seconds
  local before code op ops seconds end=$((SECONDS + $1))
  [ -n "$rehearse" ] && echo "tune: not rehearsed: it would write tables of this CPU" && return
  before=$(mktemp)
  ops=("${rest[@]}")
  [ ${#ops[@]} -gt 0 ] || ops=(lowrank_linear gated_lowrank_linear lowrank_conv2d gated_lowrank_conv2d)
  while [ ${#ops[@]} -gt 0 ]; do # a process each: a kernel that hangs or ends it costs the others nothing
    op=${ops[0]} seconds=$(((end - SECONDS) / ${#ops[@]})) ops=("${ops[@]:1}")
    timeout -k 20 "$seconds" "$PYTHON" -m inherit_kernels.tune "$op" --device cuda --minutes "$("$PYTHON" -c "print(($seconds - 20) / 60)")"
    code=$?
    [ $code -eq 0 ] || { failed=1 && echo "tune $op: exit $code"; }
  done
  if [ -n "${OUT:-}" ]; then
    find inherit_kernels/configs -newer "$before" -name '*.json' -print0 | tar czf "$OUT/configs.tar.gz" --null -T -
  fi
}

sweep() { # seconds
  "$PYTHON" -m benchmarks.gpu.run --results "$results" --minutes "$("$PYTHON" -c "print($1 / 60)")" \
    ${rehearse:+--rehearse} "${rest[@]}" || failed=1
  "$PYTHON" -m benchmarks.gpu.summary --markdown "$results" >"$logs/summary.md"
}

main() {
  echo "${gpu:-no NVIDIA GPU was found}; $(date -u +%FT%TZ)"
  echo "results go to $results"
  [ "$part" = sanitize ] || build
  case $part in
    check)
      first_calls
      tests $(($(left) * 3 / 5)) "${rest[@]}"
      sanitize
      ;;
    sanitize) sanitize ;;
    tune) tune "$(left)" ;;
    sweep) sweep "$(left)" ;;
    all)
      first_calls
      tests $(($(left) / 3))
      sweep "$(left)"
      ;;
  esac
  return $failed
}

main 2>&1 | tee "$logs/log.txt"
exit "${PIPESTATUS[0]}"
