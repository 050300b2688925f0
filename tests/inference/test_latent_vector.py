"""All latents as one vector and back, on a program with constrained, nested, global and multivariate sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.autograd.functional import jacobian

from pyrogen.inference.latent_vector import LatentVector
from pyrogen.inference.programs import latent_sites, prototype, sample_sites


def program(x):
    """The nested plate leaves a dimension of size one between itself and the rows."""
    scales = pyro.sample("scales", dist.Gamma(torch.ones(2), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-1):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("parts", 2, dim=-3):
            part = pyro.sample("part", dist.Normal(torch.zeros(2), scales).to_event(1))
        pyro.sample("x", dist.Normal(part.sum((0, 1, 3)) + share[..., 0], 1.0), obs=x)


def made(rows=None):
    trace = prototype(program, torch.zeros(2))
    return LatentVector(latent_sites(trace), sample_sites(trace), rows)


@pytest.fixture
def nodes():
    return sample_sites(poutine.trace(program).get_trace(torch.zeros(5)))


def test_names_are_those_of_unconstrained_values():
    parts = [f"part[{p},0,{u}]" for p in range(2) for u in range(2)]
    assert made().names == ["scales[0]", "scales[1]", "share[0]", "share[1]", *parts]


def test_values_come_back_with_any_leading_axes(nodes):
    latents = made()
    vectors = torch.randn(3, 5, 8)
    values = latents.values(vectors)
    shapes = {"scales": (3, 5, 2), "share": (3, 5, 3), "part": (3, 5, 2, 1, 2)}
    assert {name: tuple(value.shape) for name, value in values.items()} == shapes
    torch.testing.assert_close(latents.vectors(values), vectors, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents.vectors(values)[1, 2], latents.vectors({k: v[1, 2] for k, v in values.items()}))


def test_what_a_program_draws_goes_back_to_where_it_was(nodes):
    latents = made(rows=5)
    drawn = latents.drawn(nodes)
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {
        "scales": (2,), "share": (5, 3), "part": (5, 2, 1, 2)
    }  # fmt: skip
    vector = latents.vectors(drawn)
    assert vector.shape == (2 + 5 * 2 + 5 * 4,)
    for name, value in latents.placed(latents.values(vector)).items():
        torch.testing.assert_close(value, nodes[name]["value"])
    local = {name: latents.drawn(nodes)[name] for name in ("share", "part")}
    assert latents.placed(local)["part"].shape == nodes["part"]["value"].shape


def test_volume_is_the_determinant_of_the_jacobian():
    """Of two of the three shares, the third being what is left."""
    latents = made()
    vectors = torch.randn(4, 8).double()

    def free(vector):
        values = latents.values(vector)
        return torch.cat([values["scales"], values["share"][:2], values["part"].flatten()])

    expected = torch.stack([torch.linalg.slogdet(jacobian(free, vector)).logabsdet for vector in vectors])
    torch.testing.assert_close(latents.log_volume(vectors, latents.values(vectors)), expected)


def test_some_of_the_sites(nodes):
    trace = prototype(program, torch.zeros(2))
    latents = LatentVector({"share": latent_sites(trace)["share"]}, sample_sites(trace))
    assert latents.names == ["share[0]", "share[1]"] and [*latents.drawn(nodes)] == ["share"]
    assert latents.vectors(latents.drawn(nodes)).shape == (5, 2)
