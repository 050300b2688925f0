import dataclasses

import pytest
import torch

from pyrogen.data import Data, as_float


def make(train, **options):
    options = {"values": "real", **options}
    return Data("mine", train=train, validation=train[:2].clone(), test=train[:3].clone(), **options)


def test_as_float_has_one_meaning_for_each_type():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_float(levels), torch.arange(256) / 255)
    assert torch.equal(as_float(torch.tensor([[True], [False]])), torch.tensor([[1.0], [0.0]]))
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = torch.tensor([-3.0, 0.25], dtype=dtype)
        assert as_float(x) is x


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.complex64])
def test_as_float_refuses_types_without_a_meaning(dtype):
    with pytest.raises(TypeError, match=r"bool, uint8 or floating tensor, got torch\..*uint8\) for 8-bit"):
        as_float(torch.ones(3, dtype=dtype))


def test_as_float_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"expected a tensor, got list.*torch\.as_tensor"):
        as_float([1.0])  # type: ignore[arg-type]


def test_event_shape_and_repr():
    data = make(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), values="levels", levels=256)
    assert data.event_shape == (1, 8, 8)
    assert repr(data) == (
        "Data('mine', values='levels', levels=256, event_shape=(1, 8, 8), "
        "train=5 uint8, validation=2 uint8, test=3 uint8)"
    )


def test_dynamic_binarisation_draws_each_pixel_anew():
    gray = torch.tensor([0, 51, 255], dtype=torch.uint8).repeat(20_000, 1)
    data = Data("gray", train=gray, validation=gray > 99, test=gray > 99, values="binary", binarize="dynamic")
    generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    first, second = data.prepare(gray, generator), data.prepare(gray, generator)
    assert torch.equal(torch.get_rng_state(), before), "a generator was given"
    assert first.dtype == torch.float32 and set(first.unique().tolist()) == {0.0, 1.0}
    assert torch.all(first[:, 0] == 0) and torch.all(first[:, 2] == 1)
    # The middle pixel is Bernoulli(0.2): five standard deviations fail once in 2e6 seeds.
    deviation = (0.2 * 0.8 / 20_000) ** 0.5
    assert abs(first[:, 1].mean().item() - 0.2) < 5 * deviation
    # Independent draws differ at 2 * 0.2 * 0.8 of all rows.
    different = (first[:, 1] != second[:, 1]).double().mean().item()
    assert abs(different - 0.32) < 5 * (0.32 * 0.68 / 20_000) ** 0.5
    again = torch.Generator().manual_seed(0)
    assert torch.equal(data.prepare(gray, again), first)


def test_dynamic_binarisation_draws_from_the_global_state_by_default():
    gray = torch.full((4, 100), 0.5)
    data = Data("gray", train=gray, validation=gray > 0, test=gray > 0, values="binary", binarize="dynamic")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = data.prepare(gray), data.prepare(gray)
        torch.manual_seed(3)
        assert torch.equal(data.prepare(gray), first)
    assert not torch.equal(first, second)


def test_dynamic_binarisation_leaves_binary_rows_alone():
    gray = torch.full((40, 10), 0.5)
    rows = torch.rand(40, 10, generator=torch.Generator().manual_seed(0)) > 0.5
    data = Data("gray", train=gray, validation=rows, test=rows, values="binary", binarize="dynamic")
    assert torch.equal(data.prepare(data.test), rows.float())


def test_prepare_without_binarisation_only_converts():
    data = make(torch.arange(12, dtype=torch.uint8).reshape(4, 3), values="levels", levels=256)
    assert torch.equal(data.prepare(data.train), torch.arange(12).reshape(4, 3) / 255)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dynamic_binarisation_draws_on_the_device():
    gray = torch.full((100, 50), 128, dtype=torch.uint8)
    data = Data("gray", train=gray, validation=gray > 0, test=gray > 0, values="binary", binarize="dynamic")
    x = data.prepare(gray.cuda(), torch.Generator("cuda").manual_seed(0))
    again = data.prepare(gray.cuda(), torch.Generator("cuda").manual_seed(0))
    assert x.device.type == "cuda" and torch.equal(x, again)
    assert set(x.unique().tolist()) == {0.0, 1.0}


x = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": torch.zeros(4, 2)}, r"event shape of train, \(3,\), got \(2,\) in test"),
        ({"validation": torch.zeros(0, 3)}, r"at least one row in validation, got shape \(0, 3\)"),
        ({"train_labels": torch.zeros(3)}, r"one label a row, shape \(4,\), in train_labels, got \(3,\)"),
        ({"values": "colour"}, r"values to be one of .*'colour'"),
        ({"levels": 256}, r"levels.*values='real', levels=256"),
        ({"values": "levels"}, r"levels.*values='levels', levels=None"),
        ({"values": "binary", "binarize": "sometimes"}, r"binarize to be None or one of .*'sometimes'"),
        ({"binarize": "static"}, r"values='binary' with binarize='static', got 'real'"),
        ({"test": x > 0}, r"test is bool, so values must be 'binary'"),
        ({"test": x.to(torch.uint8), "values": "unit interval"}, r"test is uint8.*levels=256"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Data(**{"name": "mine", "train": x, "validation": x, "test": x, "values": "real", **change})


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        make(torch.zeros(4, 3, dtype=torch.int64))


def test_data_is_frozen_and_can_be_replaced():
    data = make(torch.zeros(4, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(data, "name", "other")  # noqa: B010
    assert dataclasses.replace(data, name="other").name == "other"
