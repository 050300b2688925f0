"""Precision, recall, density and coverage against the reference implementation, and copies against fresh draws."""

import contextlib
import io
import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from pyrogen.evaluation import neighbours
from pyrogen.evaluation.neighbours import data_copying, nearest_neighbours, precision_recall


def reference(samples, data, k):
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):
        return compute_prdc(data.double().numpy(), samples.double().numpy(), k)


@pytest.mark.parametrize("width", [2, 40])
def test_the_reference_implementation(width, monkeypatch):
    monkeypatch.setattr(neighbours, "PAIRS", 10_000)  # many blocks, the last of them smaller
    samples, data = 0.2 + 1.2 * torch.randn(700, width), torch.randn(501, width)
    found = precision_recall(samples, data, neighbours=3, density_neighbours=5)
    by_three, by_five = reference(samples, data, 3), reference(samples, data, 5)
    assert found.precision == pytest.approx(by_three["precision"], abs=1e-4)
    assert found.recall == pytest.approx(by_three["recall"], abs=1e-4)
    assert found.density == pytest.approx(by_five["density"], abs=1e-4)
    assert found.coverage == pytest.approx(by_five["coverage"], abs=1e-4)
    assert 0 < found.precision < 1 and 0 < found.coverage < 1
    assert "(k = 5); 700 samples, 501 observations" in str(found)


@pytest.mark.parametrize("most", [2000, 100])
def test_errors_of_shares_are_the_spread_over_fresh_draws(most, monkeypatch):
    """The deviation over 150 draws, known to 6 %, beside the root mean square of what each says of itself.

    With one side held, as the errors of shares of rows alone, it were 0.61, 0.77 and 0.61 times as much.
    """
    monkeypatch.setattr(neighbours, "SPLIT_ROWS", most)
    drawn = [precision_recall(0.5 + 1.5 * torch.randn(180, 3), torch.randn(180, 3)) for _ in range(150)]
    for name in ("precision", "recall", "coverage"):
        values = torch.tensor([getattr(found, name) for found in drawn], dtype=torch.float64)
        errors = torch.tensor([getattr(found, f"{name}_error") for found in drawn], dtype=torch.float64)
        assert 0.8 < errors.square().mean().sqrt() / values.std() < 1.25, name


def test_errors_of_shares_of_none_and_of_few():
    u, v = torch.randn(300, 2), torch.randn(500, 2)
    far = precision_recall(u + 100, v)
    assert far.precision == 0 and far.precision_error == pytest.approx(math.sqrt(0.5) / 300, rel=0.01)
    assert "precision 0.000 ± 0.002, recall 0.000 ± 0.001 (k = 3)" in str(far)
    for found in (precision_recall(u, v[:11]), precision_recall(u, v, splits=None)):
        errors = (found.precision_error, found.recall_error, found.coverage_error)
        assert all(math.isnan(error) for error in errors) and "±" not in str(found)
    state = torch.get_rng_state()
    assert precision_recall(u, v) == precision_recall(u, v)
    assert torch.equal(torch.get_rng_state(), state)


def test_features_are_what_is_compared():
    samples, data = torch.rand(2, 300, 1, 4, 4)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    h, g = (network(x).detach() for x in (samples, data))
    assert precision_recall(samples, data, network) == precision_recall(h, g) != precision_recall(samples, data)


def test_one_law():
    """Density 1 and coverage 1 − 2⁻⁵, to four deviations: those of 20 sets of this size were 0.013 and 0.0026."""
    found = precision_recall(*torch.randn(2, 3000, 4))
    assert found.density == pytest.approx(1, abs=0.05)
    assert found.coverage == pytest.approx(31 / 32, abs=0.011)


def test_far_and_collapsed_samples():
    data = torch.randn(200, 2)
    far = precision_recall(100 + torch.randn(200, 2), data)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    one = precision_recall(data[:1].expand(200, 2), data)
    assert one.precision == 1 and one.recall == 0 and one.coverage < 0.1


def test_rows_at_the_radius_are_outside():
    """Evenly on a line the second nearest other row is one step away, so that a ball holds its own row alone.

    At the two ends it is two steps away, and the ball holds another row. Rounding leaves no two steps equal.
    """
    data = 0.1 + torch.arange(40, dtype=torch.float64).unsqueeze(1) / 255
    found = precision_recall(data, data, density_neighbours=2)
    assert found.density == (38 + 2 * 2) / (2 * 40) and found.coverage == 1


def test_nearest_neighbours_of_the_reference():
    samples, training = torch.randn(50, 6), torch.randn(400, 6)
    distances, indices = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(training).kneighbors(samples)
    found = nearest_neighbours(samples, training, count=3)
    assert torch.equal(found.indices, torch.from_numpy(indices))
    torch.testing.assert_close(found.distances.float(), torch.from_numpy(distances).float())
    assert "(50 samples, 400 training rows)" in str(found)
    copies = nearest_neighbours(1e3 + training[:9], 1e3 + training)
    assert copies.indices.flatten().tolist() == [*range(9)] and copies.distances.eq(0).all()


def test_copies_are_flagged_and_fresh_draws_are_not():
    """|z| < 3.5 fails for one of 2000 sets of fresh draws; the smallest z of copies is expected at −12."""
    training, held_out, fresh = torch.randn(3, 1000, 5)
    found = data_copying(fresh, training, held_out)
    assert abs(found.z) < 3.5 and not found.copied and found.closer == pytest.approx(0.5, abs=0.05)
    assert "no sign of copied training rows" in str(found)
    for copies in (training[:500], training + 1e-3 * torch.randn(1000, 5), torch.cat([training[:300], fresh[:700]])):
        found = data_copying(copies, training, held_out)
        assert found.copied and found.z < -8 and found.closer > 0.6
        assert str(found).startswith("samples copy training rows: z = -")
    off = data_copying(3 * fresh, training, held_out)
    assert off.z > 8 and off.closer < 0.2


def test_z_is_standard_normal_for_fresh_draws():
    """Over 200 sets mean and deviation of z have deviations of 0.07 and 0.05 where z is N(0, 1)."""
    z = torch.tensor([data_copying(*torch.randn(3, 60, 3)).z for _ in range(200)])
    assert abs(z.mean()) < 0.36 and 0.8 < z.std() < 1.25


def test_cells_find_copies_that_a_wrong_share_of_modes_hides():
    """Nearly all samples lie closer than held-out rows of their own mode do, but most are of the wider mode."""

    def draw(tight, wide):
        return torch.cat([1e-3 * torch.randn(tight, 2), 100 + torch.randn(wide, 2)])

    training, held_out = draw(200, 200), draw(200, 200)
    samples = torch.cat([training[:40], training[200:] + 0.02, training[200:] - 0.02])
    assert not data_copying(samples, training, held_out).copied
    found = data_copying(samples, training, held_out, cells=2)
    assert found.copied and found.cells == 2 and "z = -" in str(found) and "in 2 cells" in str(found)
    assert data_copying(samples[:40], training, held_out, cells=2).cells == 1  # in the other are no samples


def test_ties():
    """Binary rows are often as far from the training rows as others are; all at once say nothing."""
    training, held_out, fresh = (torch.rand(3, 400, 6) > 0.5).unbind()
    assert abs(data_copying(fresh, training[:20], held_out).z) < 3.5
    same = torch.ones(50, 2)
    assert data_copying(same, same, same).z == 0


def test_errors():
    samples, data = torch.rand(30, 3), torch.rand(5, 3)
    with pytest.raises(ValueError, match="needs more than 5 rows of both sides, got 30 samples and 5 rows of data"):
        precision_recall(samples, data)
    assert precision_recall(samples, data, density_neighbours=4).observations == 5
    with pytest.raises(ValueError, match="at least count=6 training rows, got 5"):
        nearest_neighbours(samples, data, count=6)
    with pytest.raises(ValueError, match="at least 20 samples and 20 held-out rows in a cell, got 30 and 5 in 1 cells"):
        data_copying(samples, samples, data)
    with pytest.raises(ValueError, match="one training row a cell, got 5 for cells=6"):
        data_copying(samples, data, samples, cells=6)
    with pytest.raises(ValueError, match="expected held_out to be finite"):
        data_copying(samples, samples, samples / 0)
    with pytest.raises(ValueError, match="one event shape"):
        precision_recall(samples, data.unsqueeze(1))
    with pytest.raises(ValueError, match="neighbours must be a whole number of at least 1, got 0"):
        precision_recall(samples, samples, neighbours=0)
    with pytest.raises(ValueError, match="splits must be a whole number of at least 1, got 0"):
        precision_recall(samples, samples, splits=0)
