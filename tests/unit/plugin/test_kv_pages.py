"""Pages of the KV cache: what forks, cuts, known prefixes and a full pool do."""

from __future__ import annotations

import threading

import pytest

from mortice.core.errors import DoesNotFitError, InputError
from mortice.core.plugin.kv_pages import PAGE_TOKENS, PagedSequence
from tests.support.kv_pages import fed, is_whole, pages

T = PAGE_TOKENS
PROMPT = [number % 7 for number in range(3 * T + 5)]


# forks ---------------------------------------------------------------------------------------------------------------


def test_a_fork_takes_no_page_until_it_writes() -> None:
    runtime = pages(8)
    parent = fed(runtime, PROMPT)
    child = runtime.fork(parent)
    assert (runtime.free_pages, runtime.copies) == (4, 0)
    runtime.feed((child, [1]))
    assert (runtime.free_pages, runtime.copies) == (3, 1)
    is_whole(runtime, parent, PROMPT)
    is_whole(runtime, child, [*PROMPT, 1])


def test_a_parent_that_writes_first_is_the_one_that_copies() -> None:
    runtime = pages(8)
    parent = fed(runtime, PROMPT)
    child = runtime.fork(parent)
    runtime.feed((parent, [2]))
    runtime.feed((child, [1]))
    assert runtime.copies == 1
    is_whole(runtime, parent, [*PROMPT, 2])
    is_whole(runtime, child, [*PROMPT, 1])


def test_two_that_share_a_page_write_in_one_step_with_room_for_one_copy() -> None:
    runtime = pages(5)
    parent = fed(runtime, PROMPT)
    child = runtime.fork(parent)
    runtime.feed((parent, [2]), (child, [1]))
    assert runtime.free_pages == 0
    is_whole(runtime, parent, [*PROMPT, 2])
    is_whole(runtime, child, [*PROMPT, 1])


def test_a_copy_for_which_there_is_no_page_is_refused_before_anything_is_written() -> None:
    runtime = pages(4)
    parent = fed(runtime, PROMPT)
    child = runtime.fork(parent)
    with pytest.raises(InputError, match="1 more page of KV cache is needed, 0 are free"):
        runtime.feed((child, [1]))
    is_whole(runtime, child, PROMPT)
    parent.close()
    runtime.feed((child, [1]))
    assert runtime.copies == 0
    is_whole(runtime, child, [*PROMPT, 1])


def test_pages_beyond_the_tokens_are_not_shared() -> None:
    runtime = pages(8)
    parent = fed(runtime, PROMPT[: 2 * T])
    parent.reserve(2 * T + 1)  # as for a step that is launched ahead
    child = runtime.fork(parent)
    assert len(child.pages) == 2
    runtime.feed((child, [1]), (parent, [2]))
    assert runtime.copies == 0
    is_whole(runtime, child, [*PROMPT[: 2 * T], 1])
    is_whole(runtime, parent, [*PROMPT[: 2 * T], 2])


def test_a_fork_has_to_tell_the_device_its_pages_even_where_it_takes_none() -> None:
    runtime = pages(8)
    parent = fed(runtime, PROMPT)
    child = runtime.fork(parent)
    parent.close()
    assert child.reserve(child.length + 1)
    assert not child.reserve(child.length + 1)


# cutting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, T - 1, T, T + 1, 3 * T])
def test_what_is_written_after_a_cut_leaves_the_other_owner_alone(length: int) -> None:
    runtime = pages(16)
    parent = fed(runtime, PROMPT)
    child = runtime.fork(parent)
    child.truncate(length)
    runtime.feed((child, [9] * T))
    is_whole(runtime, parent, PROMPT)
    is_whole(runtime, child, [*PROMPT[:length], *[9] * T])


def test_a_page_that_is_overwritten_is_not_found_any_more() -> None:
    runtime = pages(8)
    sequence = fed(runtime, PROMPT)
    sequence.truncate(T + 3)
    assert runtime.cached_prefix(PROMPT) == 3 * T, "nothing is lost by cutting alone"
    runtime.feed((sequence, [9]))
    assert runtime.cached_prefix(PROMPT) == T
    assert runtime.copies == 0, "its only owner writes in place"


@pytest.mark.parametrize("length", [-1, 6])
def test_a_sequence_is_cut_only_to_what_it_has(length: int) -> None:
    sequence = fed(pages(1), [1, 2, 3, 4, 5])
    with pytest.raises(InputError, match=f"cannot truncate a sequence of 5 tokens to {length}"):
        sequence.truncate(length)


# prefixes ------------------------------------------------------------------------------------------------------------


def test_a_prompt_takes_over_whole_pages_of_an_open_sequence() -> None:
    runtime = pages(8)
    first = fed(runtime, PROMPT)
    second = runtime.new_sequence()
    assert runtime.adopt_prefix(second, [*PROMPT[: 2 * T + 9], 8]) == 2 * T
    assert second.pages == first.pages[:2]
    runtime.feed((second, [*PROMPT[2 * T : 2 * T + 9], 8]))
    is_whole(runtime, second, [*PROMPT[: 2 * T + 9], 8])
    is_whole(runtime, first, PROMPT)


def test_a_closed_sequence_is_found_until_its_room_is_needed() -> None:
    runtime = pages(4)
    fed(runtime, PROMPT).close()
    assert (runtime.free_pages, runtime.cached_prefix(PROMPT)) == (4, 3 * T)
    fed(runtime, [8] * (2 * T))  # the page that was not full, and the last one that was
    assert runtime.cached_prefix(PROMPT) == 2 * T, "the end of a chain goes before its beginning"
    fed(runtime, [9] * (2 * T))
    assert runtime.cached_prefix(PROMPT) == 0


def test_what_was_used_last_is_kept_longest() -> None:
    runtime = pages(3)
    for token in (1, 2, 1):
        sequence = runtime.new_sequence()
        prompt = [token] * (T + 1)
        runtime.feed((sequence, prompt[runtime.adopt_prefix(sequence, prompt) :]))
        sequence.close()
    fed(runtime, [3] * (2 * T))
    assert [runtime.cached_prefix([token] * (T + 1)) for token in (1, 2)] == [T, 0]


@pytest.mark.parametrize(("tokens", "found"), [(T - 1, 0), (T, 0), (T + 1, T), (2 * T, T), (2 * T + 1, 2 * T)])
def test_the_last_token_of_a_prompt_is_always_left_to_compute(tokens: int, found: int) -> None:
    runtime = pages(8)
    fed(runtime, PROMPT)
    assert runtime.cached_prefix(PROMPT[:tokens]) == found


def test_the_same_page_after_another_beginning_is_not_taken_for_it() -> None:
    runtime = pages(8)
    fed(runtime, [1] * T + [2] * T)
    assert runtime.cached_prefix([3] * T + [2] * T + [0]) == 0
    assert runtime.cached_prefix([2] * T + [0]) == 0


def test_a_beginning_that_was_forgotten_does_not_come_back_with_what_followed_it() -> None:
    runtime = pages(8)
    first = fed(runtime, [1] * T)
    second = runtime.new_sequence()
    runtime.feed((second, [1] * T + [2] * T))  # the first page twice; the second one hangs on the first one's
    first.truncate(T - 1)
    runtime.feed((first, [3]))
    assert runtime.cached_prefix([1] * T + [2] * T + [0]) == 0
    assert runtime.cached_prefix([1] * (T - 1) + [3] + [2] * T + [0]) == T


def test_equal_hashes_of_other_tokens_are_no_match() -> None:
    one, other = [-1] * T, [-2] * T
    assert hash(tuple(one)) == hash(tuple(other)), "as CPython has it"
    runtime = pages(4)
    fed(runtime, one)
    assert runtime.cached_prefix([*other, 0]) == 0
    assert runtime.cached_prefix([*one, 0]) == T


def test_only_an_empty_sequence_takes_over_a_prefix() -> None:
    runtime = pages(4)
    sequence = fed(runtime, [1])
    with pytest.raises(InputError, match="a sequence of 1 token cannot take over a prefix"):
        runtime.adopt_prefix(sequence, PROMPT)


def test_a_pool_without_prefix_cache_shares_forks_only() -> None:
    runtime = pages(8, prefix_cache=False)
    parent = fed(runtime, PROMPT)
    assert runtime.cached_prefix(PROMPT) == 0
    child = runtime.fork(parent)
    parent.close()
    child.close()
    assert (runtime.free_pages, runtime.cached_prefix(PROMPT)) == (8, 0)


# room ----------------------------------------------------------------------------------------------------------------


def test_a_sequence_prefers_pages_that_follow_each_other() -> None:
    runtime = pages(8)
    first, second = fed(runtime, [1] * (2 * T)), runtime.new_sequence()
    runtime.feed((second, [2] * (3 * T)))
    first.close()
    runtime.feed((second, [2] * T))
    assert second.pages == [2, 3, 4, 5]


def test_whether_one_more_token_has_room() -> None:
    runtime = pages(2)
    sequence = fed(runtime, [1] * T)
    assert sequence.has_room
    other = fed(runtime, [2])
    assert not sequence.has_room
    assert other.has_room
    child = runtime.fork(other)
    assert not child.has_room, "it would have to copy"
    sequence.close()
    assert child.has_room
    sequence = PagedSequence(runtime.pool, 3, runtime.copy_page)
    runtime.feed((sequence, [1, 2, 3]))
    assert not sequence.has_room, "its context is full"


def test_too_many_tokens_are_refused() -> None:
    runtime = pages(2)
    sequence = PagedSequence(runtime.pool, 5, runtime.copy_page)
    with pytest.raises(InputError, match="6 tokens do not fit the context of 5"):
        sequence.reserve(6)
    with pytest.raises(
        DoesNotFitError, match=r"the KV cache of 2 pages is full; close a sequence or raise executor\.kv_tokens"
    ):
        runtime.new_sequence().reserve(2 * T + 1)


def test_threads_that_open_and_close_leave_all_pages_free() -> None:
    runtime = pages(64)

    def work(first: int) -> None:
        for number in range(200):
            sequence = runtime.new_sequence()
            prompt = [first if number % 3 else 7] * (T + 2)
            sequence.adopt(prompt)
            sequence.reserve(T + 2)
            sequence.advance(prompt[sequence.length :])
            runtime.fork(sequence).close()
            sequence.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runtime.free_pages == 64
    assert all(runtime.pool.owners(page) == 0 for page in range(64))
