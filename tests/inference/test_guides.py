"""AmortizedGuide for programs of every shape: plates, supports, global sites, several sites, families."""

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyrogen as pg
from pyrogen.distributions import (
    Bernoulli,
    Delta,
    Flow,
    Mixture,
    MultivariateNormal,
    Normal,
    NormalLikelihood,
    StandardNormal,
    Vamp,
)
from pyrogen.inference import ELBO, IWAE, AmortizedGuide
from pyrogen.inference.checks import check_programs
from pyrogen.inference.programs import Copies
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP

pytestmark = pytest.mark.usefixtures("parameter_store")


def supports(x):
    """A latent of every constrained support, and a global one."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        shift = pyro.sample("shift", dist.Uniform(-2.0, 3.0))
        loc = torch.stack([rate + shift, share, weights[..., 0]], -1)
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def plates_on_both_sides(x):
    """Nested plates to the left and to the right of the data plate, and a matrix-shaped event."""
    with pyro.plate("colours", 4, dim=-3):
        pyro.sample("palette", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-2):
        with pyro.plate("words", 5, dim=-1):
            w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("topics", 4, dim=-3):
            pyro.sample("t", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("x", dist.Normal(w.sum((-1, -2)).sum(-1, keepdim=True), 1.0), obs=x.reshape(-1, 1))


def two_sites(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z2 = pyro.sample("z2", dist.Normal(z1, 0.5).to_event(1))
        pyro.sample("x", dist.Normal(z2, 0.5).to_event(1), obs=x)


def test_sites_are_read_off_the_model():
    guide = AmortizedGuide(supports, nn.Identity())
    assert list(guide.sites) == ["scale", "rate", "share", "weights", "shift"]
    assert guide.sites["scale"].is_global and not guide.sites["rate"].is_global
    assert guide.sites["weights"].shape == (3,)


@pytest.mark.parametrize("family", [Normal, MultivariateNormal, Flow, Delta, partial(Normal)])
def test_draws_lie_in_the_supports_and_densities_agree_with_the_model(family):
    x = torch.rand(7, 3)
    guide = AmortizedGuide(supports, nn.Identity(), family)
    check_programs(supports, guide, x)
    trace = poutine.trace(guide).get_trace(x)
    for name, site in guide.sites.items():
        value = trace.nodes[name]["value"]
        assert site.support.check(value).all()
        assert value.shape == (() if site.is_global else (7, *site.shape))
    assert torch.isfinite(ELBO(3)(supports, guide)(x))


@pytest.mark.parametrize(
    "prior", [dist.Uniform(2.0, 5.0), dist.Pareto(1.0, 3.0), dist.Uniform(torch.zeros(2), torch.tensor([1.0, 4.0]))]
)
def test_bounded_supports_hold_for_any_number_of_rows(prior):
    event = prior.to_event(len(prior.batch_shape)) if prior.batch_shape else prior

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", event)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(event.event_dim), obs=x)

    x = torch.rand(6, *event.event_shape) + 1
    guide = AmortizedGuide(model, nn.Flatten() if event.event_dim else nn.Unflatten(0, (-1, 1)))
    z = guide(x)["z"]
    assert z.shape == x.shape and event.support.check(z).all()
    assert torch.isfinite(IWAE(3)(model, guide)(x))


def test_support_that_differs_between_observations_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0 + torch.arange(len(x))))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="differs from one observation"):
        AmortizedGuide(model, nn.Identity())


def test_density_of_a_mapped_site_counts_the_jacobian():
    """A normal guide on a positive site is a log-normal."""
    x = torch.rand(7, 3)
    guide = AmortizedGuide(supports, nn.Identity())
    node = poutine.trace(guide).get_trace(x).nodes["rate"]
    base = node["fn"].base_dist
    expected = dist.LogNormal(base.loc, base.scale).log_prob(node["value"])
    torch.testing.assert_close(node["fn"].log_prob(node["value"]), expected)


@pytest.mark.parametrize("family", [Normal, Flow, {"w": MultivariateNormal, "palette": Flow}])
def test_nested_plates_stand_where_the_model_has_them(family):
    x = torch.randn(6)
    guide = AmortizedGuide(plates_on_both_sides, nn.Unflatten(0, (-1, 1)), family)
    check_programs(plates_on_both_sides, guide, x)
    draws = guide(x)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "palette": (4, 1, 1, 2),
        "w": (6, 5, 2, 3),
        "t": (4, 6, 1),
    }
    loss = IWAE(3)(plates_on_both_sides, guide)(x)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in guide.parameters())


def test_elements_of_a_nested_plate_have_contexts_of_their_own():
    """The posterior mean of element k is a number that only element k of the data tells."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(u, 0.1), obs=x.T)

    x = torch.randn(500, 3)
    guide = AmortizedGuide(model, nn.Identity(), example=x[:2])
    pg.fit(model, guide, ELBO(), x, steps=1500, learning_rate=1e-2, schedule="linear", progress=False)
    q = poutine.trace(guide).get_trace(x).nodes["u"]["fn"]
    expected = x.T / 1.01
    assert (q.mean - expected).abs().max() < 0.05
    assert (q.stddev - (0.01 / 1.01) ** 0.5).square().mean().sqrt() < 0.01


def test_rows_do_not_see_each_other():
    """Each row's distribution follows from that row alone, also in nested plates and for later sites."""
    x = torch.randn(6)
    guide = AmortizedGuide(plates_on_both_sides, nn.Unflatten(0, (-1, 1)))

    def mean(x, name):
        with poutine.seed(rng_seed=0):
            node = poutine.trace(guide).get_trace(x).nodes[name]
        return node["fn"].base_dist.loc if name == "t" else node["fn"].mean

    changed = x.clone()
    changed[2] += 1.0
    moved = (mean(x, "w") != mean(changed, "w")).flatten(1).any(1)
    assert moved.tolist() == [False, False, True, False, False, False]
    loc, other = mean(x, "t"), mean(changed, "t")
    assert (loc != other).any(0).flatten().tolist() == [False, False, True, False, False, False]


def test_two_sites_recover_the_exact_posterior():
    """x = z2 + noise, z2 = z1 + noise: the means are linear in x and, for z2, in z1."""
    torch.manual_seed(0)
    x = torch.randn(2000, 2) * 1.5**0.5
    guide = AmortizedGuide(two_sites, nn.Identity())
    pg.fit(two_sites, guide, ELBO(), x, steps=1500, learning_rate=1e-2, schedule="linear", progress=False)
    trace = poutine.trace(guide).get_trace(x)
    z1, z2 = trace.nodes["z1"], trace.nodes["z2"]
    # z1 | x ~ N(x / 1.5, 1/3);  z2 | z1, x ~ N((z1 + x) / 2, 1/8)
    assert (z1["fn"].mean - x / 1.5).square().mean().sqrt() < 0.05
    assert (z1["fn"].stddev - (1 / 3) ** 0.5).square().mean().sqrt() < 0.02
    assert (z2["fn"].mean - (z1["value"] + x) / 2).square().mean().sqrt() < 0.05
    assert (z2["fn"].stddev - 0.125**0.5).square().mean().sqrt() < 0.02


def test_global_site_recovers_the_exact_posterior():
    """θ ~ N(0, 1), z_i ~ N(θ, 1), x_i ~ N(z_i, 1), from minibatches: the divergence of θ is counted once in all."""

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = 1.0 + 2**0.5 * torch.randn(20)
    guide = AmortizedGuide(model, nn.Unflatten(0, (-1, 1)))
    pg.fit(model, guide, ELBO(8), x, steps=2000, batch_size=5, learning_rate=1e-2, schedule="linear", progress=False)
    q = poutine.trace(guide).get_trace(x).nodes["theta"]["fn"]
    precision = 1 + len(x) / 2
    assert q.mean.item() == pytest.approx(x.sum().item() / 2 / precision, abs=0.08)
    assert q.stddev.item() == pytest.approx(precision**-0.5, rel=0.12)


def test_mixture_prior_of_the_users_own():
    def model(x):
        with pyro.plate("data", len(x)):
            components = dist.Normal(torch.tensor([[-2.0], [2.0]]), 1.0).to_event(1)
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = AmortizedGuide(model, nn.Identity())
    assert torch.isfinite(IWAE(3)(model, guide)(torch.randn(5, 1)))


def test_family_of_each_site():
    guide = AmortizedGuide(two_sites, nn.Identity(), {"z2": Flow})
    assert isinstance(guide.conditionals["z1"], Normal)
    assert isinstance(guide.conditionals["z2"], Flow)


def test_ready_made_conditional_distribution_is_used_as_it_is():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, context=None):
            return dist.StudentT(5.0, self.linear(context), 1.0).to_event(1)

    mine = Mine()
    guide = AmortizedGuide(two_sites, nn.Identity(), {"z1": mine})
    assert guide.conditionals["z1"] is mine
    assert torch.isfinite(ELBO()(two_sites, guide)(torch.randn(4, 2)))


def test_the_models_parameters_are_not_the_guides():
    model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, 9)))
    guide = AmortizedGuide(model, MLP(9, 8))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}
    assert not any("model" in name for name in guide.state_dict())


def test_building_a_guide_leaves_no_mark():
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 9), scale="optimal"))
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    encoder = MLP(9, 8)
    torch.manual_seed(1)
    Normal(2, 8)  # the only random numbers that the guide itself may use
    expected = torch.rand(1)
    torch.manual_seed(1)
    AmortizedGuide(model, encoder)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_encoder_runs_once_for_each_row_whatever_the_particles():
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = []

        def forward(self, x):
            self.rows.append(len(x))
            return x

    spy = Spy()
    guide = AmortizedGuide(two_sites, spy)
    spy.rows.clear()
    IWAE(11)(two_sites, guide)(torch.randn(4, 2))
    assert spy.rows == [4]


def test_particles_share_the_parameters_that_follow_from_features_alone(monkeypatch, float64):
    guide = AmortizedGuide(two_sites, MLP(2, 8))
    x, seen = torch.randn(4, 2), list[list[int]]()
    for conditional in guide.conditionals.children():
        conditional.parameters_of.linear.register_forward_hook(lambda _, given, __: seen[-1].append(len(given[0])))

    def gradients():
        seen.append([])
        torch.manual_seed(1)
        return torch.autograd.grad(IWAE(11)(two_sites, guide)(x), [*guide.parameters()])

    shared = gradients()
    monkeypatch.delattr(Copies, "_pyro_linear")
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(shared, gradients(), strict=True))
    assert seen == [[4, 44], [44, 44]]


def test_covariates_reach_model_and_encoder():
    class Both(nn.Module):
        def forward(self, x, label):
            return torch.cat([x, nn.functional.one_hot(label, 3).float()], -1)

    embedding = nn.Embedding(3, 2)

    def model(x, label):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(embedding(label), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x, label = torch.randn(30, 2), torch.arange(30) % 3
    guide = AmortizedGuide(model, Both(), example=(x[:2], label[:2]))
    run = pg.fit(model, guide, IWAE(4), (x, label), epochs=2, progress=False)
    assert guide(x, label)["z"].shape == (30, 2)
    assert any("embedding" in name for name, _ in run.model.named_parameters())


class TestVamp:
    def model(self, likelihood=None):
        return LatentVariableModel(Vamp(2, (1, 3, 3), components=5), likelihood or Bernoulli(MLP(2, (1, 3, 3))))

    @pytest.mark.parametrize("family", [Normal, MultivariateNormal, Flow, Mixture])
    def test_prior_is_the_mixture_of_the_posteriors_at_the_pseudo_inputs(self, family):
        model = self.model()
        guide = AmortizedGuide(model, MLP((1, 3, 3), 8), family)
        z = torch.randn(4, 2)
        with torch.no_grad():
            components = poutine.trace(guide).get_trace(model.prior.pseudo_inputs).nodes["z"]["fn"]
            each = torch.stack([components.log_prob(row.expand(5, 2)) for row in z])
            torch.testing.assert_close(model.prior().log_prob(z), each.logsumexp(1) - torch.tensor(5.0).log())

    def test_pseudo_inputs_and_encoder_learn_through_the_prior(self):
        model = self.model()
        guide = AmortizedGuide(model, MLP((1, 3, 3), 8))
        model.prior().log_prob(torch.zeros(2)).backward()
        assert model.prior.pseudo_inputs.grad.abs().sum() > 0
        assert guide.encoder.layers[0].weight.grad.abs().sum() > 0

    def test_without_a_guide_it_says_what_to_do(self):
        with pytest.raises(RuntimeError, match="AmortizedGuide"):
            self.model()(torch.zeros(2, 1, 3, 3))

    def test_pseudo_inputs_start_at_the_data(self):
        rows = torch.rand(3, 1, 3, 3)
        prior = Vamp(2, rows, components=5)
        assert torch.equal(prior.pseudo_inputs[:3], rows) and torch.equal(prior.pseudo_inputs[3:], rows[:2])

    def test_later_site_is_refused(self):
        prior = Vamp(2, (2,), components=5)

        def model(x):
            with pyro.plate("data", len(x)):
                z1 = pyro.sample("z1", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                z2 = pyro.sample("z2", prior())
                pyro.sample("x", dist.Normal(z1 + z2, 1.0).to_event(1), obs=x)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.prior = prior

            def forward(self, x):
                return model(x)

        with pytest.raises(ValueError, match="first latent site"):
            AmortizedGuide(Model(), nn.Identity())


@pytest.mark.parametrize("name", ["items", "type", "a.b", "a%2Eb"])
def test_any_site_name_will_do(name):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    assert AmortizedGuide(model, nn.Identity())(torch.zeros(3, 2))[name].shape == (3, 2)


class TestErrors:
    def test_subsampling_plate_other_than_data(self):
        def model(x):
            with pyro.plate("items", 100, subsample_size=10, dim=-2):
                w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(w.mean(), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(ValueError, match="'items', which subsamples 10 of 100"):
            AmortizedGuide(model, nn.Unflatten(0, (-1, 1)))

    def test_support_that_depends_on_another_draw(self):
        def model(x):
            u = pyro.sample("u", dist.Gamma(2.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Uniform(0.0, u))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(ValueError, match="'z' depends on what was drawn before"):
            AmortizedGuide(model, nn.Unflatten(0, (-1, 1)))

    def test_discrete_latent(self):
        def model(x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.ones(3)))
                pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)

        with pytest.raises(ValueError, match="'k' is discrete"):
            AmortizedGuide(model, nn.Identity())

    def test_no_latent(self):
        def model(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

        with pytest.raises(ValueError, match="no latent site"):
            AmortizedGuide(model, nn.Identity())

    def test_unknown_site_in_family(self):
        with pytest.raises(ValueError, match=r"\['zz'\].*\['z1', 'z2'\]"):
            AmortizedGuide(two_sites, nn.Identity(), {"zz": Flow})

    def test_model_that_needs_an_example(self):
        def model(x):
            flat = x.reshape(len(x), 4)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=flat)

        with pytest.raises(ValueError, match="example="):
            AmortizedGuide(model, nn.Flatten())
        guide = AmortizedGuide(model, nn.Flatten(), example=torch.zeros(2, 2, 2))
        assert guide(torch.zeros(5, 2, 2))["z"].shape == (5, 4)

    @pytest.mark.parametrize(
        ("family", "message"),
        [
            (Normal(3, context=2), r"'z1' has event shape \(3,\), expected \(2,\)"),
            (Normal(2), r"built without a context but got one of shape \(2, 2\)"),
            (Normal(2, context=5), r"expected a context of shape \(..., 5\), got shape \(2, 2\)"),
            (StandardNormal, r"site 'z1' is called as family\(features, context\), as Normal is: .* 2 positional"),
            (nn.ReLU(), r"site 'z1' must be, .* got one that returns a tensor of shape \(2, 2\)"),
            (lambda features, context: 3, r"site 'z1' must be, .* such as Normal; got 3"),
        ],
    )
    def test_a_family_that_does_not_fit(self, family, message):
        with pytest.raises((ValueError, TypeError), match=message):
            AmortizedGuide(two_sites, nn.Identity(), {"z1": family})(torch.zeros(2, 2))


def test_a_copied_guide_is_trained_by_the_same_estimate():
    # A copied support is another object; the closed form must not give way to draws for that.
    torch.manual_seed(0)
    model = LatentVariableModel(StandardNormal(2), NormalLikelihood(MLP(2, 3, hidden=(4,))))
    guide, x = AmortizedGuide(model, MLP(3, 8, hidden=(4,))), torch.randn(5, 3)
    losses = []
    for each in (guide, copy.deepcopy(guide)):
        torch.manual_seed(1)
        losses.append(ELBO()(model, each)(x).item())
    assert losses[0] == losses[1]
