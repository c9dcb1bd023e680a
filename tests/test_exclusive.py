from __future__ import annotations

import gc
import weakref

import pytest

from graphopt.exclusive import exclusive, patched


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


class _Owner:
    value = 1

    @classmethod
    def name(cls) -> str:
        return cls.__name__


class _Heir(_Owner):
    pass


def test_patched_parts_are_what_they_were_after_an_error() -> None:
    before = dict(vars(_Owner))

    def fails() -> None:
        with patched(_Owner, value=2, name=staticmethod(str)):
            assert (_Owner.value, _Owner.name()) == (2, "")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert dict(vars(_Owner)) == before
    assert _Heir.name() == "_Heir"


def test_nothing_is_patched_where_a_part_is_missing_or_another_class_has_it() -> None:
    with pytest.raises(KeyError), patched(_Owner, value=2, gone=3):
        pass
    with pytest.raises(KeyError), patched(_Heir, value=2):
        pass
    assert (_Owner.value, _Heir.value) == (1, 1)
