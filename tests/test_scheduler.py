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
