#!/bin/sh
# Runs chosen tests under compute-sanitizer, on tiny models: prefill, decode, every type of the KV cache, mixed weight
# types, parity of three families, the choice of tokens. racecheck, which takes far longer, gets fewer: steps of 1 to 40
# rows, each launch by itself and as a graph, and the choice of tokens. It follows bulk copies to shared memory, and takes a
# wait at their barrier for their end, so a report means that something is read before its copy has arrived, or written over
# while it is read. Barriers at which one lane arrives for its warp it does not understand; all lanes do so here.
#   tests/gpu/sanitize.sh memcheck|racecheck|initcheck|synccheck [pytest arguments instead of the chosen tests]
# The exit status is not 0 when the tool finds something or a test fails. Errors that calls return are left out: the code
# asks for things that a device may lack, and handles the answer. Run the tests once without it first, so that kernels
# come from the cache.
set -eu
tool=$1
shift
plugin=
[ "$tool" != racecheck ] || plugin="-p tests.support.racecheck"
if [ $# -eq 0 ] && [ "$tool" = racecheck ]; then
    set -- tests/gpu/test_graphs.py tests/gpu/test_parity.py tests/gpu/test_mixed_types.py tests/gpu/test_sampling.py \
        -k 'trace or wide-1] or model-12] or taller or (draw_is_the_hosts and 300)'
elif [ $# -eq 0 ]; then
    set -- tests/gpu/test_kv_types.py tests/gpu/test_mixed_types.py tests/gpu/test_parity.py tests/gpu/test_sampling.py \
        -k 'prefill_and_decode or taller or agree or (draw_is_the_hosts and 300)'
fi
exec compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 --target-processes all \
    "${PYTHON:-python3}" -m pytest -p no:cacheprovider $plugin -q -m gpu "$@"
