#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build, tests, compute-sanitizer, the C++ harness, whole training steps.
#   bash benchmarks/device_check.sh [build] [tests] [harness] [races] [sanitize] [steps] [targets] [merge] [serving]
# (default: all but targets). races: the fused kernels alone, from the C++ harness, in seconds; sanitize: every operator, in minutes.
# Logs go to $OUT (default: build/device_check); a short summary is printed last.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/device_check}
mkdir -p "$OUT"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} PYTHONUNBUFFERED=1
[ $# -gt 0 ] || set -- build tests harness races sanitize steps merge serving
summary=()

run() { # name, log, command...
  local name=$1 log=$OUT/$2 start=$SECONDS
  shift 2
  "$@" > "$log" 2>&1
  local rc=$?
  summary+=("$(printf '%-28s rc %d  %4d s  %s' "$name" "$rc" "$((SECONDS - start))" "$(tail -n 1 "$log" | cut -c1-110)")")
}

for stage in "$@"; do
  case $stage in
    build) run "build (sm_90a)" build.log env MAX_JOBS="$(nproc)" python3 setup.py build_ext --inplace ;;
    tests) run "pytest" pytest.log env OMP_NUM_THREADS=1 python3 -m pytest -q -n 14 --dist worksteal -p no:cacheprovider python_tests ;;
    sanitize)
      run "compute-sanitizer memcheck" memcheck.log env PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool memcheck --error-exitcode 3 python3 benchmarks/exercise_ops.py
      # 16-bit calls only. No kernel filter: with one, whichever kernels it names, racecheck (CUDA 13.0) ends in an internal error.
      run "compute-sanitizer racecheck" racecheck.log env PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool racecheck --error-exitcode 3 python3 benchmarks/exercise_ops.py --short
      wheel=$(python3 -c 'import nvidia.cu13 as m; print(list(m.__path__)[0])' 2> /dev/null)
      nvcc -std=c++20 -O3 --expt-relaxed-constexpr -arch=native -Icsrc ${wheel:+-I$wheel/include} -DALORE_WITH_CUDA \
        -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__ \
        -o "$OUT/axial_shift_check" benchmarks/axial_shift_check.cu csrc/kernels/axial_shift.cu csrc/kernels/axial_shift_cpu.cpp &&
        run "memcheck, axial shifts" memcheck_axial.log \
          compute-sanitizer --tool memcheck --error-exitcode 3 "$OUT/axial_shift_check"
      rm -f "$OUT/axial_shift_check" ;;
    races)
      # Odd and small shapes for memcheck; for racecheck tokens for three rounds and more, in which every stage of shared
      # memory is filled again.
      run "memcheck, quick suite" memcheck_quick.log \
        compute-sanitizer --tool memcheck --error-exitcode 3 build/harness/alore_bench --suite quick --dtype bf16 --check-only
      rm -rf "$OUT/racecheck" && mkdir -p "$OUT/racecheck"
      for op in "layer_norm_alore" "alore" "masked_lora_linear --experts 1 --rank 8"; do
        for pass in "" --backward; do
          for case in "128 40000" "256 40000" "384 26000" "512 20000" "768 13000" "1024 8500"; do
            echo "--op $op $pass --dim ${case% *} --tokens ${case#* } --dtype bf16 --check-only"
          done
        done
      done > "$OUT/racecheck/cases"
      # Eight at a time: most of racecheck's work is the host's.
      nl -w2 -s' ' "$OUT/racecheck/cases" | xargs -P 8 -L 1 bash -c 'n=$0; timeout 500 compute-sanitizer --tool racecheck \
        --error-exitcode 3 build/harness/alore_bench "$@" > "'"$OUT"'/racecheck/$n.log" 2>&1; echo "rc $? $n $*"' > "$OUT/racecheck/ended"
      {
        sort -n -k3 "$OUT/racecheck/ended"
        cat "$OUT"/racecheck/[0-9]*.log
        echo "$(grep -c '^rc [03] ' "$OUT/racecheck/ended") of $(wc -l < "$OUT/racecheck/cases") cases ran to the end"
      } > "$OUT/racecheck_rounds.log"
      rm -rf "$OUT/racecheck"
      PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --error-exitcode 3 \
        python3 benchmarks/exercise_ops.py --only layer_norm_mlae_linear >> "$OUT/racecheck_rounds.log" 2>&1
      summary+=("$(printf '%-28s %s' "racecheck, norm and linear" "$(grep 'calls of' "$OUT/racecheck_rounds.log")")")
      run "memcheck, norm and linear" memcheck_norm.log env PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool memcheck --error-exitcode 3 python3 benchmarks/exercise_ops.py --only layer_norm_mlae_linear
      # cuBLAS's own kernels (nvjet) race by racecheck's lights: their copies are ordered by barriers that it does not follow.
      summary+=("$(printf '%-28s %s; races in this library: %s, in cuBLAS: %s' "racecheck, many rounds" \
        "$(grep "ran to the end" "$OUT/racecheck_rounds.log")" "$(grep 'Race reported' "$OUT/racecheck_rounds.log" | grep -vc nvjet)" \
        "$(grep 'Race reported' "$OUT/racecheck_rounds.log" | grep -c nvjet)")") ;;
    harness)
      cmake -S . -B build/harness -DCMAKE_CUDA_ARCHITECTURES=90a -DALORE_CUDA_WHEEL="$(python3 -c 'import nvidia.cu13 as m; print(list(m.__path__)[0])' 2> /dev/null)" > "$OUT/cmake.log" 2>&1 &&
        cmake --build build/harness -j "$(nproc)" >> "$OUT/cmake.log" 2>&1
      run "harness ctest" harness_ctest.log ctest --test-dir build/harness --output-on-failure
      for suite in vit_b swin_b; do
        run "harness $suite" "harness_$suite.log" build/harness/alore_bench --suite $suite --json "$OUT/harness_$suite.json"
      done ;;
    steps) run "train_step" steps.log env PYTHONPATH=. python3 benchmarks/train_step.py --out "$OUT" ;;
    targets)
      # What RESULTS.md holds against DESIGN.md's table, row by row.
      while read -r name arguments; do
        # shellcheck disable=SC2086
        run "$name" "target_$name.log" env PYTHONPATH=. timeout 150 python3 benchmarks/train_step.py --seconds 0.8 --out "$OUT/$name" $arguments
        grep -E "^ +[0-9]+ (eager|graph|compile)" "$OUT/target_$name.log" | sed "s/^/$name /"
      done <<'ROWS'
vit_eager --batch 32 256 --interleave --methods floor full alore mlae peft_lora
vit_graph --batch 32 --mode graph --methods floor alore mlae peft_lora
swin_b --model swin_base_patch4_window7_224 --batch 128 --methods floor alore mlae peft_lora
convnext_128 --model convnext_base --batch 128 --methods floor alore
convnext_32 --model convnext_base --batch 32 --methods floor alore
vit_autocast --batch 256 --autocast --interleave --methods floor alore mlae
vit_compile --batch 256 --mode compile --methods floor alore mlae
ROWS
      ;;
    merge) run "merge_model" merge.log env PYTHONPATH=. python3 benchmarks/merge_model.py --json "$OUT/merge_model.json" ;;
    serving)
      run "serving" serving.log env PYTHONPATH=".:${PYTHONPATH:-}" python3 benchmarks/serving.py --parts merged,swap,mixed,memory,server \
        --seconds "${SERVING_SECONDS:-1}" --json "$OUT/serving.json" --plot "$OUT/serving.png" ;;
    *) echo "no stage $stage" >&2; exit 2 ;;
  esac
done
printf '%s\n' "${summary[@]}"
