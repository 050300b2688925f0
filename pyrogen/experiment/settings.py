"""What a fit or a comparison is made of, as plain settings, and how these become data, models and objectives."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from pyrogen import data as data_sets
from pyrogen.data import Data
from pyrogen.distributions import Bernoulli, ContinuousBernoulli, NormalLikelihood, QuantizedNormal
from pyrogen.distributions.implicit import is_implicit
from pyrogen.evaluation.parts import DEFAULT, known_parts
from pyrogen.experiment.parts import ODD, Part, call, in_role, misplaced, names, partial_of, resolve
from pyrogen.inference import CriticOptions, Objective
from pyrogen.inference.programs import rehearsal
from pyrogen.models import LatentVariableModel

__all__ = ["CompareSettings", "FitSettings", "Settings", "build_objective", "chosen_parts"]

_SMALL = 256
"""Values of an observation up to which one thread is enough."""

_WIDEST = 2**20
"""The most features and latent dimensions that a command gives: more is a slip, and can take all memory."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The data, the model, and how it is trained.

    Args:
        data: The data set: digits, mnist, fashion_mnist, cifar10, celeba, omniglot, color_mnist, stacked_mnist,
            folder:PATH (images) or array:FILE.npz.
        root: The folder that holds the data sets, or shall hold them once downloaded. By default the environment
            variable PYROGEN_DATA, otherwise ~/.cache/pyrogen.
        binarize: How gray images become binary: dynamic (drawn anew for each batch), static (drawn once), threshold,
            null (not at all); auto is dynamic for digits, mnist and omniglot and null for all others.
        model: Your own Pyro program instead of a latent-variable model, as FILE.py:NAME or import path: a function
            model(x), or a class of programs, built with the arguments that --model.NAME VALUE gives. Parameters of
            the class named event_shape and latent get the shape of the data and --latent. Or ProbabilisticPCA.
        prior: The prior p(z), called as prior(latent); by default StandardNormal.
        likelihood: The likelihood p(x|z), called as likelihood(decoder). By default what suits the data's values:
            Bernoulli, QuantizedNormal, ContinuousBernoulli, or NormalLikelihood with one learned scale.
        decoder: The network from z to the likelihood's parameters, called as decoder(latent, shape); by default MLP.
        encoder: The network from x to the features that guides are conditioned on, called as encoder(event_shape,
            features).
        latent: Number of dimensions of z.
        features: Number of features that the encoder gives.
        epochs: How long to train, in passes through the data; by default 30, unless steps are given.
        steps: How long to train, in steps of the optimizer.
        batch_size: Rows of a minibatch; of several processes that train together, those of each.
        learning_rate: Of Adam.
        schedule: How the learning rate goes on: constant, or falling to 0, linearly or as half a cosine.
        gradient_clip: Bound on the norm of the gradient.
        critic_learning_rate: Of the critics' Adam, for objectives with critics; by default that of the program.
        critic_betas: Of the critics' Adam.
        critic_steps: Steps of the critics for each of the program; by default what the objective says, mostly 1.
        critic_warmup: Steps in which the critics alone are trained, at first.
        average: Decay of an exponential moving average of the weights, such as 0.999, with which the fit ends; by
            default there is none.
        seed: Of initial weights, draws and the order of the data.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, mps.
        precision: Such as 32-true, bf16-mixed, 64-true.
        compile: Trace the objective once and train by a compiled graph: true, false, or auto, where what is left of a
            training would take over a minute and a half without. Compiling takes 5 to 30 seconds.
        matmul_precision: What PyTorch may do to products of 32-bit matrices in training: highest, or high, which is
            TF32 where a GPU has it, or medium.
        non_finite: What to do at a step whose loss or gradients are NaN or infinite: stop, or skip it; the history
            counts the steps that were skipped.
        threads: How many threads a tensor operation gets on the CPU. By default one where an observation has at most
            256 values: more gain little there, and wait for each other on a busy machine. Otherwise torch's own number.
    """

    data: str = "digits"
    root: str | None = None
    binarize: Literal["auto", "dynamic", "static", "threshold"] | None = "auto"
    model: Part | None = None
    prior: Part | None = None
    likelihood: Part | None = None
    decoder: Part | None = None
    encoder: Part = field(default_factory=lambda: Part("MLP"))
    latent: int = 8
    features: int = 128
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    gradient_clip: float | None = None
    critic_learning_rate: float | None = None
    critic_betas: tuple[float, float] = CriticOptions().betas
    critic_steps: int | None = None
    critic_warmup: int = 0
    average: float | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "32-true"
    compile: bool | Literal["auto"] = False
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    non_finite: Literal["stop", "skip"] = "stop"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, most in (("latent", _WIDEST), ("features", _WIDEST), ("threads", 1024)):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if value is not None and value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
        if abs(self.seed) >= 2**63:
            raise ValueError(f"seed must be less than 2**63, got {self.seed}")
        if self.model is not None:
            given = [name for name in ("prior", "likelihood", "decoder") if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"the model {self.model!r} is a program of its own, so {', '.join(given)} would go unused; leave "
                    "out either the one or the others"
                )

    def plain(self) -> dict[str, Any]:
        """The settings as plain values, for YAML; what is None by default and was left so is left out."""
        values = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                values[each.name] = _plain(value)
        return values

    def training(self) -> dict[str, Any]:
        """The options of :func:`pyrogen.fit` that are set here."""
        epochs = 30 if self.epochs is None and self.steps is None else self.epochs
        names = ("steps", "batch_size", "learning_rate", "seed", "device", "precision", "schedule", "gradient_clip")
        critic = CriticOptions(
            learning_rate=self.critic_learning_rate,
            betas=self.critic_betas,
            steps=self.critic_steps,
            warmup=self.critic_warmup,
        )
        others = ("average", "compile", "matmul_precision", "non_finite")
        values = {name: getattr(self, name) for name in (*names, *others)}
        return {"epochs": epochs, "critic": critic} | values

    def load_data(self) -> Data:
        """The data set."""
        return data_sets.load(self.data, root=self.root, binarize=self.binarize)

    @contextmanager
    def limited_threads(self, data: Data) -> Iterator[None]:
        """Meanwhile, as many threads as :attr:`threads` says."""
        before = torch.get_num_threads()
        small = math.prod(data.event_shape) <= _SMALL
        torch.set_num_threads(self.threads or (1 if small else before))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def build_model(self, data: Data) -> Callable:
        """The model for a data set, with fresh weights.

        Raises:
            ValueError: If a name or an option is not known.
        """
        if self.model is None:
            part = self.prior or Part("StandardNormal")
            prior = call(part, "prior", self.latent, inputs=data.event_shape)
            return LatentVariableModel(prior, self.build_likelihood(data))
        program = resolve(self.model, "model")
        if isinstance(program, type):
            shapes = {"event_shape": data.event_shape, "observed": data.event_shape}
            program = call(self.model, "model", latent=self.latent, **shapes)
        elif self.model.init_args:
            raise ValueError(f"the model {self.model.name} is a program, not a class, so it takes no options")
        if not callable(program):
            raise ValueError(f"the model {self.model!r} is no Pyro program: it can't be called")
        return program

    def build_likelihood(self, data: Data) -> nn.Module:
        """The likelihood with its decoder, by default one for the data's values."""
        part = self.likelihood or _default_likelihood(data)
        likelihood = partial_of(part, "likelihood", 1, **({"levels": data.levels} if data.levels else {}))
        arguments: dict[str, Any] = getattr(likelihood, "keywords", {})
        shape_of = getattr(getattr(likelihood, "func", likelihood), "decoder_shape", None)
        shape = data.event_shape if shape_of is None else shape_of(data.event_shape, **arguments)
        decoder = call(self.decoder or Part("MLP"), "decoder", self.latent, shape)
        with in_role(part, "likelihood", "can't be built"):
            return likelihood(decoder)

    def build_encoder(self, data: Data) -> nn.Module:
        """The encoder for a data set, with fresh weights."""
        return call(self.encoder, "encoder", data.event_shape, self.features)

    @contextmanager
    def naming_parts(self, model: Callable, *families: Part) -> Iterator[None]:
        """Within, an error that comes of a part that can't have its role names that part.

        Parts are tried after an error only: what they take, apart from the programs, can't be known.
        """
        try:
            yield
        except ODD:
            if isinstance(model, LatentVariableModel) and self.model is None:
                with torch.random.fork_rng(devices=[]):
                    _check_gives(self.prior, "prior", model.prior)
                    _check_gives(self.likelihood, "likelihood", model.likelihood, model.prior().sample((2,)))
                    for part in families:
                        built = call(part, "family", self.latent, self.features)
                        _check_gives(part, "family", built, torch.randn(2, self.features))
            raise


def _check_gives(part: Part | None, role: str, built: Any, *given: torch.Tensor) -> None:
    """See that a part that is none of pyrogen's gives a distribution."""
    if part is None or resolve(part, role) in names(role).values():
        return
    with rehearsal(built), in_role(part, role, "can't be called"):
        made = built(*given)
    if not isinstance(made, torch.distributions.Distribution):
        raise misplaced(part, role, f"gives a {type(made).__name__}, not a distribution")


def chosen_parts(parts: list[str]) -> list[str]:
    """The parts of an evaluation by these names, of which one may be ``all``."""
    others = [part for part in parts if part != "all"]
    named = known_parts(others) if others or not parts else []
    return known_parts("all") if "all" in parts else named


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.plain()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _default_likelihood(data: Data) -> Part:
    if data.values == "real":
        return Part(NormalLikelihood.__name__, {"scale": "shared"})
    suited = {"binary": Bernoulli, "levels": QuantizedNormal, "unit interval": ContinuousBernoulli}
    return Part(suited[data.values].__name__)


def build_objective(part: Part) -> Objective:
    """The objective that a part names.

    Raises:
        ValueError: If it names something else.
    """
    objective = call(part, "objective")
    if not isinstance(objective, Objective):
        raise ValueError(f"the objective {part!r} is a {type(objective).__name__}; expected one such as ELBO or IWAE")
    return objective


@dataclass(frozen=True, kw_only=True)
class FitSettings(Settings):
    """Fit one model with one guide.

    Args:
        family: The family of the guide's distributions, called as family(features, context): Normal,
            MultivariateNormal, Flow, Mixture, ...
        objective: What is minimised: ELBO, IWAE, Renyi, ...
        patience: Stop when the bound on the validation data has not risen for so many epochs, and keep the best
            weights.
    """

    family: Part = field(default_factory=lambda: Part("Normal"))
    objective: Part = field(default_factory=lambda: Part("ELBO"))
    patience: int | None = None

    def training(self) -> dict[str, Any]:
        return super().training() | {"patience": self.patience}


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """Compare guides: fit each family with each objective to one model, and evaluate all on the same test data.

    Args:
        guides: Families of the guide's distributions, called as family(features, context).
        objectives: What is minimised; every family is fitted with every objective that can serve it, and one that uses
            no guide, such as GAN, once. By default ELBO and IWAE, or AVB for a family without a density.
        parts: Which parts of the evaluation, by name, or all; see pyrogen evaluate --help.
        particles: Draws for each test observation, for the log-likelihood.
        test_rows: Evaluate on the first so many rows of the test data; by default on all.
        workers: Fit in so many processes at once, which share the cores, or on a Ray cluster: ray. The figures are
            those of fits one after the other, on as many threads.
    """

    guides: list[Part] = field(
        default_factory=lambda: [Part("Normal"), Part("MultivariateNormal"), Part("Flow"), Part("Implicit")]
    )
    objectives: list[Part] | None = None
    parts: list[str] = field(default_factory=lambda: [*DEFAULT])
    particles: int = 1000
    test_rows: int | None = None
    workers: int | str | None = None

    def plain(self) -> dict[str, Any]:
        # Where fits are made is no part of what is compared: another number of workers may go on with them.
        return {name: value for name, value in super().plain().items() if name != "workers"}

    def build_guides(self) -> dict[str, tuple[Callable | None, Objective]]:
        """Every family with every objective, by name.

        Raises:
            ValueError: If a name is not known, or two have the same name and options.
        """
        pairs: dict[str, tuple[Callable | None, Objective]] = {}
        for part in self.guides:
            family = partial_of(part, "family", 2)
            for objective in self.objectives or self._default_objectives(family):
                built = build_objective(objective)
                name = f"{part!r} {objective!r}" if built.uses_guide else repr(objective)
                if name in pairs and built.uses_guide:
                    raise ValueError(f"'{name}' is there twice; give each guide and each objective once")
                pairs[name] = family if built.uses_guide else None, built
        if not pairs:
            raise ValueError("expected at least one family in guides and one objective in objectives")
        return pairs

    def _default_objectives(self, family: Callable) -> list[Part]:
        implicit = False
        # Where the model's sites are of other sizes: what is wrong with it, if anything, shows at the guide.
        with torch.random.fork_rng(devices=[]), suppress(*ODD, ValueError):
            implicit = is_implicit(family(self.latent, self.features)(torch.zeros(1, self.features)))
        return [Part("AVB")] if implicit else [Part("ELBO"), Part("IWAE")]
