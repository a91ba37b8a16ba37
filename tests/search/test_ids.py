"""Ids of an index against a dictionary: what is given, taken, deleted, counted on."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from quernel._errors import QuernelError
from quernel.search._ids import IdTable, as_ids


class Twins(RuleBasedStateMachine):
    """An IdTable beside a list of (id, alive) by slot."""

    def __init__(self):
        super().__init__()
        self.table = IdTable()
        self.slots = []

    def known(self):
        return {i for i, alive in self.slots if alive}

    @rule(n=st.integers(0, 4))
    def add_numbered(self, n):
        first = max((i for i, _ in self.slots), default=-1) + 1
        ids = self.table.checked(n)
        assert ids.tolist() == list(range(first, first + n))
        self.table.append(ids)
        self.slots += [(i, True) for i in ids.tolist()]

    @rule(ids=st.lists(st.integers(-1, 12), max_size=4))
    def add_named(self, ids):
        fits = len(set(ids)) == len(ids) and not set(ids) & self.known() and min(ids, default=0) >= 0
        if not fits:
            with pytest.raises(QuernelError, match="ids"):
                self.table.checked(len(ids), ids)
            return
        self.table.append(self.table.checked(len(ids), ids))
        self.slots += [(i, True) for i in ids]

    @rule(ids=st.lists(st.integers(0, 12), max_size=3))
    def remove(self, ids):
        if not set(ids) <= self.known():
            with pytest.raises(QuernelError, match="nothing was removed"):
                self.table.remove(ids)
            return
        gone = self.table.remove(ids)
        assert sorted(self.slots[s][0] for s in gone.tolist()) == sorted(set(ids))
        for slot in gone.tolist():
            assert self.slots[slot][1]
            self.slots[slot] = (self.slots[slot][0], False)

    @invariant()
    def same(self):
        assert self.table.ids.tolist() == [i for i, _ in self.slots]
        assert self.table.alive.tolist() == [alive for _, alive in self.slots]
        assert len(self.table) == len(self.known()) and self.table.slots == len(self.slots)
        assert self.table.nbytes == 9 * len(self.slots)


TestTwins = Twins.TestCase
TestTwins.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_slots_become_ids():
    table = IdTable(np.array([7, 3]))
    assert table.of_slots(np.array([[1, -1], [0, 0]])).tolist() == [[3, -1], [7, 7]]
    assert IdTable().of_slots(np.array([[-1, -1]])).tolist() == [[-1, -1]]


def test_what_is_taken_back_has_no_id():
    table = IdTable(np.array([7, 3]))
    table.append(table.checked(2, [9, 30]))
    table.truncate(2)
    assert len(table) == table.slots == 2 and table.checked(1).tolist() == [8]
    # A search that began before may still have found it.
    assert table.of_slots(np.array([[3, 1], [-1, 2]])).tolist() == [[-1, 3], [-1, -1]]


def test_what_counts_as_ids():
    assert as_ids(5).tolist() == as_ids([5]).tolist() == as_ids(np.uint8(5)).tolist() == [5]
    assert as_ids([]).dtype == np.int64
    for wrong in ([0.5], [[1, 2]], ["a"], [True]):
        with pytest.raises(QuernelError, match="ids must be a sequence of integers"):
            as_ids(wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.checked(2, [1]), "ids must be 2 integers, one an item; got 1"),
        (lambda t: t.checked(2, [1, 1]), "ids holds 1 more than once"),
        (lambda t: t.checked(1, [-3]), "ids must not be negative; got -3"),
        (lambda t: t.checked(1, [7]), "ids holds 7, which is in the index already; remove it first"),
        (lambda t: t.remove([7, 8]), "ids holds 8, which is not in the index; nothing was removed"),
        (lambda t: IdTable(np.array([2**63 - 1])).checked(1), "leaves the 63 bits of an id"),
        (lambda t: IdTable(np.zeros(2, int), np.ones(3, bool)), "one length"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call(IdTable(np.array([7, 3])))


def test_a_refused_removal_leaves_everything():
    table = IdTable(np.array([7, 3]))
    with pytest.raises(QuernelError):
        table.remove([7, 8])
    assert len(table) == 2


def test_arrays_of_a_file_may_be_read_only():
    ids, alive = np.array([7, 3]), np.ones(2, bool)
    ids.flags.writeable = alive.flags.writeable = False
    table = IdTable(ids, alive)
    table.remove([3])
    assert table.alive.tolist() == [True, False] and alive.all()
