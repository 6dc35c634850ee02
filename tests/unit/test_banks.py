"""The first-in-first-out memory: order, wrap-around, steps and rows that are left out."""

import torch

from mmssl.banks import Fifo


def offered(bank, values, position=0.0, valid=None):
    rows = torch.tensor(values, dtype=torch.float32)[:, None]
    there = torch.ones(len(values), dtype=torch.bool) if valid is None else torch.tensor(valid)
    bank.offer(rows, 10 * rows[:, 0].nan_to_num().long(), there, position)


def entries(bank):
    return bank.rows_K[:, 0].tolist()


def test_the_oldest_rows_go_first_whatever_divides_what():
    bank = Fifo(5, (1,))
    for step, values in enumerate([[1, 2], [3, 4], [5, 6]]):
        offered(bank, values, step)
        bank.write()
    assert entries(bank) == [6, 2, 3, 4, 5]
    assert bank.source_K.tolist() == [60, 20, 30, 40, 50]
    assert (int(bank.filled), int(bank.next)) == (5, 1)
    offered(bank, list(range(20, 27)), 9)  # more than there is room for: the newest stay
    bank.write()
    assert sorted(entries(bank)) == [22, 23, 24, 25, 26]


def test_nothing_changes_before_the_step_is_over():
    bank = Fifo(3, (1,))
    offered(bank, [1, 2])
    assert entries(bank) == [0, 0, 0]
    offered(bank, [3])  # of another micro-batch
    bank.write()
    assert entries(bank) == [1, 2, 3]
    bank.write()
    assert int(bank.next) == 0


def test_what_a_step_that_was_left_out_offered_is_forgotten():
    bank = Fifo(4, (1,))
    offered(bank, [1, 2], position=0.1)
    offered(bank, [3], position=0.2)
    bank.write()
    assert entries(bank) == [3, 0, 0, 0]
    assert int(bank.filled) == 1


def test_absent_rows_and_rows_that_are_not_finite_stay_out():
    bank = Fifo(4, (1,))
    offered(bank, [1, float("nan"), 3, 4], valid=[True, True, False, True])
    bank.write()
    assert entries(bank) == [1, 4, 0, 0]
    assert bank.source_K.tolist() == [10, 40, -1, -1]


def test_all_state_is_saved():
    names = {"rows_K", "source_K", "filled", "next"}
    assert set(Fifo(2, (3,)).state_dict()) == names
    assert all(v.ndim > 0 for v in Fifo(2, (3,)).state_dict().values())
