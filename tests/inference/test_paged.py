"""Blocks: who has which, what is shared, what comes back."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fms_parallel.inference.paged import GONE, BlockPool, Table, most_blocks


def begun(pool: BlockPool, tokens: list[int], expected: int = 0) -> tuple[Table, int]:
    found = pool.begin(tokens, expected)
    assert found is not None
    return found


def kept_of(pool: BlockPool) -> int:
    return sum(kind.kept for kind in pool.kinds)


def places_of(pool: BlockPool, table: Table, start: int, stop: int, kind: int = 0) -> Sequence[int]:
    return pool.where(table, start, stop)[kind].places


def test_rows_with_the_same_beginning_have_the_same_full_blocks() -> None:
    pool = BlockPool(8, 4)
    first, found = begun(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert found == 0
    pool.computed(first, [1, 2, 3, 4, 5, 6, 7, 8, 9], 9)
    second, found = begun(pool, [1, 2, 3, 4, 5, 6, 7, 8, 10, 11])
    assert found == 8
    assert second.held[0].blocks[:2] == first.held[0].blocks[:2]
    assert second.held[0].blocks[2] != first.held[0].blocks[2]
    assert pool.in_use == 4


def test_last_token_is_always_computed_anew() -> None:
    pool = BlockPool(8, 4)
    table, _ = begun(pool, list(range(8)))
    pool.computed(table, list(range(8)), 8)
    assert begun(pool, list(range(8)))[1] == 4
    assert begun(pool, list(range(9)))[1] == 8


def test_block_is_known_by_all_that_is_before_it() -> None:
    pool = BlockPool(8, 2)
    table, _ = begun(pool, [1, 1, 2, 2, 3])
    pool.computed(table, [1, 1, 2, 2, 3], 5)
    assert begun(pool, [2, 2, 3])[1] == 0
    assert begun(pool, [9, 9, 2, 2, 3])[1] == 0


def test_content_outlives_its_row_until_memory_is_needed_oldest_first() -> None:
    pool = BlockPool(4, 2)
    for tokens in ([1, 1, 0], [2, 2, 0]):
        table, _ = begun(pool, tokens)
        pool.computed(table, tokens, 2)
        pool.end(table)
    assert (pool.in_use, kept_of(pool), pool.available) == (0, 2, 4)
    full, _ = begun(pool, [7, 7, 7, 7, 7])  # the two free ones, and the older kept one
    assert kept_of(pool) == 1
    pool.end(full)
    assert begun(pool, [1, 1, 0])[1] == 0
    assert begun(pool, [2, 2, 0])[1] == 2


def test_too_few_blocks_change_nothing() -> None:
    pool = BlockPool(3, 2)
    table, _ = begun(pool, [1, 2, 3])
    pool.computed(table, [1, 2, 3], 2)
    assert pool.begin([1, 2, 3, 4, 5, 6, 7]) is None
    assert pool.in_use == 2
    assert not pool.grow(table, 7)
    assert len(table.held[0].blocks) == 2


def test_row_grows_behind_itself_and_is_one_run() -> None:
    pool = BlockPool(16, 4)
    first, _ = begun(pool, list(range(5)), expected=24)
    second, _ = begun(pool, list(range(50, 55)), expected=24)
    for length in range(6, 25):
        assert pool.grow(first, length)
        assert pool.grow(second, length)
    assert len(pool.where(first, 0, 24)[0].runs) == 1
    assert pool.where(second, 0, 22)[0].runs[0][1] >= 16
    assert sum(count for _, count in pool.where(second, 0, 22)[0].runs) == 22


def test_fork_shares_full_blocks_and_copies_the_rest() -> None:
    pool = BlockPool(8, 4)
    table, _ = begun(pool, [1, 2, 3, 4, 5, 6])
    pool.computed(table, [1, 2, 3, 4, 5, 6], 6)
    forked = pool.fork(table, 6)
    assert forked is not None
    other, copied = forked
    assert other.held[0].blocks[0] == table.held[0].blocks[0]
    assert copied == [(0, table.held[0].blocks[1] * 4, other.held[0].blocks[1] * 4, 2)]
    assert other.held[0].blocks[1] != table.held[0].blocks[1]
    pool.end(table)
    assert pool.in_use == 2
    pool.end(other)
    assert pool.in_use == 0


def test_whole_rows_are_single_blocks_without_sharing() -> None:
    pool = BlockPool(2, 64, share=False)
    first, _ = begun(pool, [1, 2, 3])
    pool.computed(first, [1] * 64, 64)
    second, found = begun(pool, [1] * 60)
    assert found == 0
    assert pool.where(second, 0, 60)[0].runs == [(second.held[0].blocks[0] * 64, 60)]
    assert pool.begin([1]) is None


def test_row_gives_back_what_no_later_query_sees() -> None:
    pool = BlockPool({6: 8}, 4)
    table, _ = begun(pool, list(range(20)))
    assert len(table.held[0].blocks) == 1  # it grows as it goes on
    assert pool.grow(table, 20)
    pool.computed(table, list(range(20)), 13)
    pool.slide(table, 13)  # token 13 sees 8 .. 13
    assert table.held[0].blocks[:3] == [GONE, GONE, 2] and pool.in_use == 3
    assert pool.where(table, 8, 20)[0].runs == [(8, 12)] and places_of(pool, table, 8, 10) == [8, 9]
    assert (kept_of(pool), pool.available) == (2, 5)  # what others may share is kept while there is room
    other, found = begun(pool, list(range(20)))
    assert found == 12 and other.held[0].blocks[:3] == [GONE, 1, 2]
    forked = pool.fork(table, 16)
    assert forked is not None and forked[0].held[0].gone == 2
    for one in (table, other, forked[0]):
        pool.end(one)
    assert pool.in_use == 0


def test_a_windowed_row_is_found_by_its_last_blocks_when_the_first_are_overwritten() -> None:
    pool, tokens = BlockPool({6: 5}, 4), list(range(24))
    table, _ = begun(pool, tokens)
    for done in range(4, 25, 4):
        assert pool.grow(table, done)
        pool.computed(table, tokens, done)
        pool.slide(table, done)
    pool.end(table)
    again, found = begun(pool, [*tokens, 99])
    assert found == 24 and again.held[0].blocks[:4] == [GONE] * 4
    pool.end(again)
    assert begun(pool, [*tokens[:4], 99])[1] == 0  # six blocks were written into five


def test_most_blocks_are_those_of_the_worst_place() -> None:
    for size in (1, 3, 4):
        for window in range(1, 12):
            for chunk in range(1, 6):
                spans = [(start + chunk - 1) // size - max(0, start - window + 1) // size + 1 for start in range(60)]
                assert most_blocks(1000, size, window, chunk) == max(spans)
    assert most_blocks(9, 4, None) == most_blocks(9, 4, 100) == 3


def test_random_rows_behind_a_window_read_what_was_written_and_all_blocks_come_back() -> None:
    draw, window = random.Random(1), 7
    pool, memory = BlockPool({window: 18}, 4), {}
    rows: list[tuple[Table, list[int], int]] = []
    found = 0
    for _ in range(4000):
        if rows and draw.random() < 0.08:
            pool.end(rows.pop(draw.randrange(len(rows)))[0])
        elif rows and draw.random() < 0.8:
            at = draw.randrange(len(rows))
            table, tokens, done = rows[at]
            stop = min(len(tokens), done + draw.randrange(1, 6))
            if not pool.grow(table, stop):
                continue
            for place, position in zip(places_of(pool, table, done, stop), range(done, stop), strict=True):
                memory[place] = tuple(tokens[: position + 1])
            pool.computed(table, tokens, stop)
            pool.slide(table, stop)
            rows[at] = table, [*tokens, draw.randrange(2)], stop
        elif (new := pool.begin(tokens := [draw.randrange(2) for _ in range(draw.randrange(1, 30))], 40)) is not None:
            rows.append((new[0], tokens, new[1]))
            found += new[1]
        for table, tokens, done in rows:
            first = max(0, done - window + 1)
            assert [memory[p] for p in places_of(pool, table, first, done)] == [
                tuple(tokens[: n + 1]) for n in range(first, done)
            ]
            assert len(table.held[0].blocks) - table.held[0].gone <= most_blocks(10**6, 4, window, 6)
    for table, _, _ in rows:
        pool.end(table)
    assert pool.in_use == 0 and found > 0


def test_random_rows_never_share_what_differs_and_all_blocks_come_back() -> None:
    """Against a memory that is written and read in full: each place holds its token and all before it."""
    draw = random.Random(0)
    pool, memory = BlockPool(24, 4), {}
    rows: list[tuple[Table, list[int], int]] = []
    for _ in range(3000):
        if rows and draw.random() < 0.4:
            table, tokens, done = rows.pop(draw.randrange(len(rows)))
            pool.end(table)
        elif rows and draw.random() < 0.6:
            at = draw.randrange(len(rows))
            table, tokens, done = rows[at]
            if not pool.grow(table, len(tokens)):
                continue
            for place, position in zip(
                places_of(pool, table, done, len(tokens)), range(done, len(tokens)), strict=True
            ):
                memory[place] = tuple(tokens[: position + 1])
            pool.computed(table, tokens, len(tokens))
            rows[at] = table, [*tokens, draw.randrange(2)], len(tokens)
        else:
            tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 30))]
            if (found := pool.begin(tokens, 30)) is not None:
                rows.append((found[0], tokens, found[1]))
        for table, tokens, done in rows:
            held = [memory[place] for place in places_of(pool, table, 0, done)]
            assert held == [tuple(tokens[: n + 1]) for n in range(done)]
    for table, _, _ in rows:
        pool.end(table)
    assert pool.in_use == 0
    assert pool.shared_tokens > 0
