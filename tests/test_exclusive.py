from __future__ import annotations

import gc
import weakref

from graphopt.exclusive import exclusive


class _Node:
    def __init__(self) -> None:
        self.itself = self


def test_garbage_of_a_long_call_is_collected_without_a_walk_over_what_was_there() -> None:
    before, often = _Node(), gc.get_threshold()
    with exclusive():
        walked = {id(thing) for thing in gc.get_objects()}
        made = weakref.ref(_Node())
        gc.collect()
        assert made() is None
        assert id(before) not in walked
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == often
    gone = weakref.ref(before)
    del before
    gc.collect()
    assert gone() is None


def test_what_the_caller_has_frozen_stays_so() -> None:
    frozen = _Node()
    gc.freeze()
    try:
        young = _Node()
        with exclusive():
            pass
        walked = {id(thing) for thing in gc.get_objects()}
        # not by their number: what is frozen may die meanwhile
        assert id(frozen) not in walked
        assert id(young) in walked
    finally:
        gc.unfreeze()
