#!/usr/bin/env bash
# The CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
#
#   PYTHON=.venv/bin/python bash scripts/sanitize.sh [pytest arguments]
#
# The library goes to build/sanitize-lib, and N3_LIBRARY names it to the package: the working tree's stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra python <<< "${PYTHON:-python3}"
out=build/sanitize-lib

N3_CUDA=OFF N3_SANITIZE=ON "${python[@]}" setup.py -q build_ext --build-lib "$out"

# Python itself is not instrumented, so the runtime must be there before it. libstdc++ too: the runtime looks for the
# real __cxa_throw at its start, when Python has not loaded it yet, and the first C++ exception would end the process.
compiler=${CXX:-g++}
runtime=$($compiler -print-file-name=libasan.so):$($compiler -print-file-name=libstdc++.so.6)
if [ $# -eq 0 ]; then
  set -- tests/nvfp4 tests/mamba tests/moe tests/mtp --ignore tests/moe/test_expert_parallel.py -m "not slow" \
    -k "cpu and not compile and not triton and not law"
fi
# Python and torch keep memory for good: leaks are not looked for. An illegal access aborts the process, and its report
# goes to the file descriptor that pytest would otherwise have taken.
exec env LD_PRELOAD="$runtime" N3_LIBRARY="$PWD/$out/n3kernels/_C.so" OMP_NUM_THREADS=2 \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
  "${python[@]}" -m pytest -p no:cacheprovider -p no:xdist --capture=sys "$@"
