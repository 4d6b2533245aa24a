#!/bin/sh
# Runs chosen tests under compute-sanitizer, on tiny models: prefill, decode, every type of the KV cache, mixed weight
# types, parity of three families, the choice of tokens.
#   tests/gpu/sanitize.sh memcheck|racecheck|initcheck|synccheck [pytest arguments instead of the chosen tests]
# The exit status is not 0 when the tool finds something or a test fails. Errors that calls return are left out: the code
# asks for things that a device may lack, and handles the answer. Run the tests once without it first, so that kernels
# come from the cache.
set -eu
tool=$1
shift
[ $# -gt 0 ] || set -- \
    tests/gpu/test_kv_types.py tests/gpu/test_mixed_types.py tests/gpu/test_parity.py tests/gpu/test_sampling.py \
    -k 'prefill_and_decode or taller or agree or (draw_is_the_hosts and 300)'
exec compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 --target-processes all \
    "${PYTHON:-python3}" -m pytest -p no:cacheprovider -q -m gpu "$@"
