"""Data of every kind as minibatches."""

import dataclasses
import threading
import tracemalloc

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import pyrogen as pg
from pyrogen.inference import batches as module
from pyrogen.inference.batches import as_batch, training_and_validation

CPU = torch.device("cpu")


class Single(Dataset):
    """A data set of single tensors."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


class Pairs(Single):
    """A data set of a tensor and a plain number."""

    def __getitem__(self, index):
        return self.x[index], index


class Stream(IterableDataset):
    """Data without a length."""

    def __iter__(self):
        return iter([torch.zeros(3)])


def batches_of(data, size=4, seed=0):
    return training_and_validation(data, size, seed)[0]


def epoch_of(data, number=0, size=4, seed=0, skip=0):
    return list(batches_of(data, size, seed).epoch(number, CPU, skip))


KINDS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "list": lambda x: [x],
    "tensor data set": TensorDataset,
    "data set": Single,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_data_gives_the_same_batches(kind):
    x = torch.randn(10, 3)
    batches = epoch_of(kind(x))
    assert [len(batch) for (batch,) in batches] == [4, 4, 2]
    joined = torch.cat([batch for (batch,) in batches])
    assert torch.equal(joined, torch.cat([batch for (batch,) in epoch_of(x)]))
    assert torch.equal(joined.sort(0).values, x.sort(0).values) and not torch.equal(joined, x)
    assert all(map(torch.equal, batches_of(kind(x)).first(), (x[:2],)))


@pytest.mark.parametrize("kind", [lambda x, y: (x, y), TensorDataset, lambda x, y: Pairs(x)])
def test_labels_come_along_with_their_rows(kind):
    x, y = torch.randn(10, 3), torch.arange(10)
    for batch, labels in epoch_of(kind(x, y)):
        assert labels.dtype == torch.int64 and torch.equal(batch, x[labels])


def test_epochs_differ_and_follow_from_the_seed():
    x = torch.arange(50.0)
    first, again, second, other = (
        torch.cat([batch for (batch,) in epoch_of(x, number, seed=seed)])
        for number, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first, other)
    epoch_of(x, seed=-3), epoch_of(x, seed=2**62)  # any whole number is a seed


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_an_epoch_is_taken_up_in_the_middle_without_any_draw(kind):
    x = torch.randn(10, 3)
    state = torch.get_rng_state()
    whole, rest = epoch_of(kind(x)), epoch_of(kind(x), skip=1)
    assert len(rest) == 2 and all(torch.equal(a, b) for (a,), (b,) in zip(whole[1:], rest, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rows", [48, 49, 53, 50])
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_the_rows_of_each_minibatch(rows, ranks):
    """Together they see what one with so many times the batch sees; nobody is left without a row."""
    x = torch.arange(float(rows))
    whole = [batch for (batch,) in epoch_of(x, size=4 * ranks)]
    shared = [dataclasses.replace(batches_of(x), rank=rank, ranks=ranks) for rank in range(ranks)]
    epochs = [[batch for (batch,) in each.epoch(0, CPU)] for each in shared]
    assert {each.per_epoch for each in shared} == {len(whole)} == {len(epoch) for epoch in epochs}
    for position, (batch, *parts) in enumerate(zip(whole, *epochs, strict=True)):
        counts = [each.rows_at(position) for each in shared]
        assert max(own for own, _ in counts) - min(own for own, _ in counts) <= 1
        assert [count for _, count in counts] == [len(batch)] * ranks
        assert [len(part) for part in parts] == [own or 1 for own, _ in counts]
        assert torch.equal(torch.cat([part[:own] for part, (own, _) in zip(parts, counts, strict=True)]), batch)
    skipped = [batch for (batch,) in shared[1].epoch(0, CPU, skip=2)]
    assert all(map(torch.equal, skipped, epochs[1][2:])) and len(skipped) == len(whole) - 2
    own = torch.cat([batch for each in shared for (batch,) in each.in_order(CPU, 5, own=True)])
    assert torch.equal(own, x)


def test_stored_types_become_floats():
    levels, bits = torch.tensor([[0], [51], [255]], dtype=torch.uint8), torch.tensor([[True], [False]])
    assert torch.equal(epoch_of(levels)[0][0].sort(0).values, torch.tensor([[0.0], [0.2], [1.0]]))
    assert torch.equal(epoch_of(bits)[0][0].sort(0).values, torch.tensor([[0.0], [1.0]]))
    assert torch.equal(as_batch([levels, torch.tensor([7, 8, 9])])[1], torch.tensor([7, 8, 9]))
    converted = batches_of(torch.randn(4, 2, dtype=torch.float64)).to(CPU, torch.float32)
    assert next(converted.epoch(0, CPU))[0].dtype == torch.float32
    assert next(batches_of(Single(bits)).to(CPU, torch.float64).epoch(0, CPU))[0].dtype == torch.float64


def test_dynamic_binarisation_draws_anew_and_follows_from_the_random_state():
    data = pg.data.load("digits")

    def sorted_rows(number, seed):
        torch.manual_seed(seed)
        batches = batches_of(data, 500)
        drawn = torch.empty(data.train.shape)
        order, start = batches.order(number), 0
        for (batch,) in batches.epoch(number, CPU):
            drawn[order[start : start + len(batch)]] = batch
            start += len(batch)
        return drawn

    first, again, second = sorted_rows(0, 3), sorted_rows(0, 3), sorted_rows(1, 3)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    certain = (data.train == 0) | (data.train == 1)
    assert torch.equal(first[certain], data.train[certain]) and torch.equal(second[certain], data.train[certain])
    state = torch.get_rng_state()
    batches_of(data).first()
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_rows_come_from_named_data_only():
    data = pg.data.load("digits")
    validation = training_and_validation(data, 4, 0)[1]
    assert validation is not None
    assert torch.equal(torch.cat([x for (x,) in validation.in_order(CPU, 50)]), data.validation.float())
    assert training_and_validation(data.train, 4, 0)[1] is None


def dynamic(x):
    bits = torch.zeros(2, 3, dtype=torch.bool)
    return pg.data.Data("mine", train=x, validation=bits, test=bits, values="binary", binarize="dynamic")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(0, 3), ValueError, "the data are empty"),
        (torch.zeros(3, 0), ValueError, "the data are empty"),
        (Single(torch.zeros(0, 3)), ValueError, "the data are empty"),
        (torch.tensor(1.0), ValueError, "got a single number"),
        (torch.tensor([[0.0], [torch.nan]]), ValueError, "NaN or infinity, first in row 1 of tensor 0"),
        ((torch.zeros(5000, 1), torch.cat([torch.zeros(4500), torch.full((500,), torch.inf)])), ValueError, "row 4500"),
        ((torch.zeros(3), torch.zeros(4)), ValueError, r"different lengths \[3, 4\]"),
        (dynamic(torch.full((3, 3), 2.0)), ValueError, r"expected pixels in \[0, 1\]"),
        ("digits", TypeError, "expected data as a tensor .* got str"),
        ((), TypeError, "got tuple"),
        (Stream(), TypeError, "got Stream"),
        ([1.0, 2.0], TypeError, "got list"),
    ],
)
def test_bad_data_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        training_and_validation(data, 4, 0)


def test_integers_stay_as_they_are_stored_until_a_program_sees_them():
    x = torch.arange(40, dtype=torch.uint8).reshape(10, 4)
    batches = batches_of((x, torch.arange(10))).to(CPU, torch.float64)
    assert isinstance(batches.rows, tuple) and [each.dtype for each in batches.rows] == [torch.uint8, torch.int64]
    for batch, number in batches.epoch(0, CPU):
        assert batch.dtype == torch.float64 and number.dtype == torch.int64
        torch.testing.assert_close(batch, (x.float() / 255).double()[number])


def test_tensors_that_a_gpu_has_no_room_for_stay_where_they_are(monkeypatch):
    rows = (torch.zeros(1000), torch.zeros(1000, dtype=torch.uint8))  # 5000 bytes
    for free, fits in ((10_000, True), (9999, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert module._fits(rows, torch.device("cuda:0")) is fits
        assert module._fits(rows, CPU)


def test_batches_brought_one_ahead_are_the_same(monkeypatch):
    """Gathered by one other thread, prepared, which may draw, by this one."""
    data = pg.data.load("digits")
    threads, before = set(), threading.active_count()
    original = module.Batches._gathered

    def watched(self, index, device):
        threads.add(threading.current_thread())
        return original(self, index, device)

    monkeypatch.setattr(module.Batches, "_gathered", watched)
    found = []
    for ahead in (False, True):
        threads.clear()
        torch.manual_seed(3)
        batches = dataclasses.replace(batches_of(data, 200), ahead=ahead)
        found.append([batch for (batch,) in batches.epoch(1, CPU, skip=1)])
        assert len(threads) == 1 and (threading.current_thread() in threads) is not ahead
    assert all(map(torch.equal, *found)) and len(found[0]) == batches.per_epoch - 1
    begun = batches.epoch(0, CPU)
    next(begun)
    begun.close()  # an epoch that is cut short leaves no thread
    assert threading.active_count() == before


class Broken(Single):
    """A data set that fails at one row."""

    def __getitem__(self, index):
        if index == 5:
            raise OSError("row 5 is gone")
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_that_read_a_data_set_change_nothing():
    x = torch.randn(10, 3)
    batches = dataclasses.replace(batches_of(Pairs(x)), workers=2)
    state = torch.get_rng_state()
    for (batch, number), (other, other_number) in zip(batches.epoch(0, CPU), epoch_of(Pairs(x)), strict=True):
        assert torch.equal(batch, other) and torch.equal(number, other_number)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(OSError, match="row 5 is gone"):
        list(dataclasses.replace(batches_of(Broken(x)), workers=1).epoch(0, CPU))


class Endless(Dataset):
    """Rows that are made when they are read."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.full((4,), float(index))


def test_a_data_set_needs_no_memory_for_its_rows():
    """Of Python's own memory, in which a list of row numbers would take 36 bytes for each."""
    peaks = []
    for count in (1000, 10_000, 1_000_000):  # the first time modules are imported
        batches = batches_of(Endless(count), 64)
        tracemalloc.start()
        for (batch,), _ in zip(batches.epoch(0, CPU), range(5), strict=False):
            assert batch.shape == (64, 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 100_000


def test_integers_of_unknown_levels_and_odd_items_are_refused():
    with pytest.raises(TypeError, match="expected a bool, uint8 or floating tensor"):
        epoch_of(torch.arange(5))
    with pytest.raises(TypeError, match="expected a Dataset whose items are tensors"):
        epoch_of(Single([{"image": torch.zeros(3)}] * 5))
