"""What is remembered of a model."""

import dataclasses
import gc

import pytest

from funcbayes import _remember
from funcbayes._remember import Remembered


class Model:
    pass


def test_what_was_not_asked_for_longest_is_forgotten_first():
    model, memory, made = Model(), Remembered(most=3), []

    def get(key):
        return memory.get(model, key, lambda: made.append(key) or key.upper())

    for key in "abacad":  # of four keys the last forgets "b"
        assert get(key) == key.upper()
    assert made == [*"abcd"]
    assert [get(key) for key in "acd"] == [*"ACD"]
    assert made == [*"abcd"]
    get("b")
    assert made == [*"abcdb"]
    assert memory.count(model) == 3


def test_what_is_remembered_of_one_model_is_not_of_another():
    memory, one, other = Remembered(), Model(), Model()
    assert memory.get(one, "key", lambda: 1) == 1
    assert memory.get(other, "key", lambda: 2) == 2
    assert memory.get(one, "key", lambda: 3) == 1


@dataclasses.dataclass
class Compared:
    number: int

    def method(self):
        pass


@dataclasses.dataclass(frozen=True)
class Holding:
    values: list


@pytest.mark.parametrize("make", [lambda: Compared(1), lambda: Holding([1])])
def test_a_model_without_a_hash_is_remembered_as_itself_while_it_lives(make):
    gc.collect()
    memory, one, other = Remembered(), make(), make()
    assert one == other
    for _ in range(2):
        assert memory.get(one, "key", lambda: "of one") == "of one"
        assert memory.get(other, "key", lambda: "of the other") == "of the other"
    assert memory.count(one) == memory.count(other) == 1
    before = len(_remember._identities)
    del one, other
    gc.collect()
    assert len(_remember._identities) == before - 2
    assert not memory._values


def test_methods_of_a_model_without_a_hash_are_remembered():
    memory, model = Remembered(), Compared(1)
    assert memory.get(model.method, "key", lambda: 1) == 1
    assert memory.get(model.method, "key", lambda: 2) == 1


class Slotted:
    __slots__ = ("number",)


def test_of_a_model_that_takes_no_weak_references_nothing_is_remembered():
    memory, model = Remembered(), Slotted()
    assert [memory.get(model, "key", lambda n=n: n) for n in range(2)] == [0, 1]
