"""Who is admitted when: in order, within ``batch_size``, and no reading that keeps others waiting for long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specrej_eval.scheduler import READ_A_TURN, Scheduler


@given(
    st.lists(st.integers(1, 3 * READ_A_TURN), max_size=12),
    st.integers(1, 5),
    st.lists(st.integers(0, 5), min_size=40, max_size=40),
)
def test_all_are_admitted_in_order_and_long_prompts_take_turns(
    lengths: list[int], batch_size: int, finishing: list[int]
) -> None:
    scheduler = Scheduler(enumerate(lengths), batch_size=batch_size, tokens=lambda item: item[1])
    seen: list[int] = []
    running = 0
    for finished in finishing:
        waiting = len(lengths) - len(seen)
        admitted = scheduler.admit(running)
        assert len(admitted) <= batch_size - running
        assert admitted or not waiting or running == batch_size, "whoever has room is let in"
        if running and len(admitted) > 1:
            assert sum(length for _, length in admitted) <= READ_A_TURN
        if not running:
            assert len(admitted) == min(batch_size, waiting), "nobody waits for them"
        seen += [index for index, _ in admitted]
        running = max(0, running + len(admitted) - finished)
    assert seen == sorted(seen)
    scheduler.put_back([(index, 1) for index in seen[-2:]])
    seen = seen[:-2]
    for _ in lengths:
        seen += [index for index, _ in scheduler.admit(0)]
    assert seen == list(range(len(lengths)))


@given(
    st.lists(st.integers(1, 3 * READ_A_TURN), max_size=12),
    st.integers(1, 5),
    st.lists(st.sets(st.integers(0, 11)), min_size=1, max_size=12),
)
def test_who_may_not_begin_is_put_off_and_keeps_nobody_waiting(
    lengths: list[int], batch_size: int, held: list[set[int]]
) -> None:
    asked: list[int] = []
    others: set[int] = set()

    def may_begin(item: tuple[int, int]) -> bool:
        asked.append(item[0])
        return item[0] not in others

    scheduler = Scheduler(enumerate(lengths), batch_size=batch_size, tokens=lambda item: item[1], may_begin=may_begin)
    seen: list[int] = []
    for others in held:  # may_begin reads it
        free = set(range(len(lengths))) - others - {*seen}
        asked.clear()
        admitted = [index for index, _ in scheduler.admit(0)]
        assert len(admitted) == min(batch_size, len(free)) and set(admitted) <= free
        assert len(asked) == len(set(asked)), "nobody is asked twice in a turn"
        seen += admitted
    assert sorted([*seen, *(index for index, _ in scheduler.waiting)]) == list(range(len(lengths)))
    gone = {index for index, _ in scheduler.waiting if index % 2}
    scheduler.remove(lambda item: item[0] in gone)
    assert not gone & {index for index, _ in scheduler.waiting} and scheduler.num_waiting == len(scheduler.waiting)
