#!/bin/sh
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs on them every op of the contract suite,
# forward and backward and at every SIMD level, and the tests of bad data and odd sizes.
# Not the simulator: AddressSanitizer cannot follow its fibers from stack to stack.
# PYTHON is a Python that has jaxkern's dependencies; the sanitized build goes into an environment beside it.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
venv=.venv-sanitize
sites=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ ! -x $venv/bin/python ]; then
  "$python" -m venv $venv
  # A path alone: the .pth files in there, one of which points at the ordinary build, are not followed.
  echo "$sites" >"$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
fi
$venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
  --config-settings=cmake.define.JAXKERN_SANITIZE=ON --config-settings=cmake.define.JAXKERN_CUDA=OFF \
  --config-settings=cmake.define.JAXKERN_SIM=OFF --config-settings=build-dir=build/sanitize .
asan=$("${CXX:-c++}" -print-file-name=libasan.so)
ubsan=$("${CXX:-c++}" -print-file-name=libubsan.so)
# CPython and jaxlib are not clean of leaks; the kernels own no memory that could leak.
LD_PRELOAD="$asan:$ubsan" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONSAFEPATH=1 JAXKERN_TEST_IMPLEMENTATION=none $venv/bin/python -m pytest -n 2 -p no:cacheprovider tests/test_contract.py tests/test_quantize.py \
  tests/test_gemm.py tests/test_linear.py tests/test_mla.py tests/test_kv_cache.py tests/test_moe.py -k "not none and not hopper and (matches_reference or simd_levels_agree or any_shape or \
  zero_sizes or test_grouped_gemm or test_k_grouped_gemm or masked or along_tokens or swiglu or masks_pages or clamps or without_keys or stable_sort or \
  decode_shows or spread_over or test_merge or append or one_slot or long_prompt or prefill_at_every or select_nothing or bad_logits or \
  gradient_is_that or closed_form or frozen_fp8 or grouped_gradients or left_alone or best_groups)"
