"""What is remembered of a model."""

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
