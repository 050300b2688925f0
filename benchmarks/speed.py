"""The time of a training step beside hand-written PyTorch, Pyro's SVI, Pythae and Pixyz, in one process.

    python benchmarks/speed.py --chart speed.png

Each contender trains a task's networks from the same first weights, on the same binary images in memory, in float32, by
Adam: pyrogen by ``pyrogen.fit``, Pythae by its trainer, the others step by step over ``torch.randperm``. A round goes
through all tasks and trains all contenders afresh, one after the other, each round beginning with another; the first
epoch is warm-up and compilation, the others give the milliseconds of a step. Tables have median and quartiles over the
rounds, and the same of the ratio to "hand-written" within a round: what slows the machine for a while slows both.
Seconds of compilation are the first round's, from an empty cache; for a hand-written loss, what its first epoch takes
more than later ones.

- The loss is the last epoch's mean, without the critics', to show that all do the same work; on MLPs seeds differ by 30
  nats, so fast does it fall. Pyro's ``RenyiELBO`` weighs particles for a whole batch at once, Pythae's IWAE shows
  another sum of the same weights, and its flow does not look at the image. A GAN's loss says little.
- ``SVI`` runs as Pyro has it, with its validation on; ``fit`` has checked programs before and turns that off.
- Pyro has no objective with a critic, Pythae no AVB and no WGAN-GP, Pixyz as a ready model only the VAE.
- "hand-written, compiled" is ``torch.compile`` of the loss at its defaults, without CUDA graphs, and a fused Adam;
  "hand-written, CUDA graph" is that step, gradients and Adam included, as one CUDA graph, on a GPU alone.
- AVB has pyrogen's 8 particles and 32 draws for moments; "avb-plain" has one particle and no adaptive contrast. A step
  of WGAN-GP has five of the critic. Validation, and what ``fit`` reports of latent units after an epoch, is in nobody's
  time.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms as T
from pyro.infer import SVI, RenyiELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn import functional as F

import pyrogen as pg
from pyrogen.distributions import Bernoulli, Flow, Implicit, Normal, StandardNormal
from pyrogen.inference import AVB, ELBO, GAN, IWAE, AmortizedGuide
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, ConvDecoder, ConvEncoder, Critic

RATE, BETAS = 1e-3, ((0.9, 0.999), (0.5, 0.999))  # of programs and of critics
LAYERS, MOMENT_DRAWS = 4, 32  # pyrogen's defaults for flows and for AVB
STEPS_ON_GPU = 300  # of an epoch at least, for they are short


@dataclass(frozen=True)
class Task:
    """What is trained, by whom besides pyrogen and by hand, and on how much; ``steps`` are those of an epoch."""

    written: "type[nn.Module]"
    programs: "Callable[[Task], tuple[Any, Any, Any]]"
    peers: tuple[str, ...] = ()
    pythae: Any = ()  # names of a model and its configuration, and options of this
    batch: int = 128
    steps: int = 100
    shape: tuple[int, ...] = (784,)
    hidden: tuple[int, ...] = (400, 400)
    latent: int = 50
    particles: int = 1
    critic_steps: int = 1

    def networks(self) -> tuple[Any, nn.Module]:
        """The encoder to means and log-variances in two parts, the second linear, and the decoder; always the same."""
        torch.manual_seed(0)
        if len(self.shape) == 3:
            trunk: nn.Module
            decoder: nn.Module
            trunk = ConvEncoder(self.shape, 256, hidden=())
            width, decoder = 256, ConvDecoder(self.latent, self.shape)
        else:
            trunk = MLP(self.shape, self.hidden[-1], self.hidden[:-1]).layers
            width, decoder = self.hidden[-1], MLP(self.latent, self.shape, self.hidden[::-1]).layers
        return nn.Sequential(nn.Sequential(trunk, nn.ReLU()), nn.Linear(width, 2 * self.latent)), decoder

    def data(self, device: str) -> Tensor:
        """Images with something in common: their logits are a linear map of ten numbers."""
        generator = torch.Generator().manual_seed(0)
        causes = torch.randn(self.batch * self.steps, 10, generator=generator)
        logits = causes @ torch.randn(10, math.prod(self.shape), generator=generator)
        return torch.bernoulli(logits.sigmoid(), generator=generator).reshape(-1, *self.shape).to(device)


class VAE(nn.Module):
    """Written by hand: called with a batch it gives the loss to be differentiated and the one to be shown."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.particles = task.particles
        self.encoder, self.decoder = task.networks()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_variance = self.encoder(x).chunk(2, -1)
        z = loc + torch.randn_like(loc) * (0.5 * log_variance).exp()
        distortion = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        kl = 0.5 * (loc.square() + log_variance.exp() - 1 - log_variance).sum()
        loss = (distortion + kl) / len(x)
        return loss, loss.detach()

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        loc, log_variance = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, (0.5 * log_variance).exp()).to_event(1)


class ImportanceWeighted(VAE):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_variance = self.encoder(x).chunk(2, -1)
        noise = torch.randn(self.particles, *loc.shape, device=x.device)
        z = loc + noise * (0.5 * log_variance).exp()
        log_w = 0.5 * (noise.square() + log_variance - z.square()).sum(-1) - distortions(self.decoder(z), x)
        loss = math.log(self.particles) - log_w.logsumexp(0).mean()
        return loss, loss.detach()


class FlowVAE(nn.Module):
    """Pyro's networks, for its transforms as such don't compile into one graph."""

    orders: Tensor

    def __init__(self, task: Task) -> None:
        super().__init__()
        (trunk, head), self.decoder = task.networks()
        sizes = task.latent, head.in_features, [2 * task.latent] * 2
        layers = nn.ModuleList(T.conditional_affine_autoregressive(*sizes) for _ in range(LAYERS))
        self.encoder = nn.ModuleList([trunk, head, layers])
        self.register_buffer("orders", torch.stack([torch.randperm(task.latent) for _ in range(LAYERS)]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        context, loc, log_variance, layers = self.encoded(x)
        z = noise = torch.randn_like(loc)
        log_det = 0.5 * log_variance.sum(-1)
        for layer, order in layers:
            shift, log_scale = layer.nn(z, context)
            log_scale = 2 * (log_scale / 2).tanh()
            z, log_det = (log_scale.exp() * z + shift)[..., order], log_det + log_scale.sum(-1)
        z = loc + z * (0.5 * log_variance).exp()
        rate = 0.5 * (z.square() - noise.square()).sum(-1) - log_det
        loss = (distortions(self.decoder(z), x) + rate).mean()
        return loss, loss.detach()

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        context, loc, log_variance, layers = self.encoded(x)
        steps = [step for layer, order in layers for step in (layer.condition(context), T.Permute(order))]
        steps.append(T.AffineTransform(loc, (0.5 * log_variance).exp(), event_dim=1, cache_size=1))
        return dist.TransformedDistribution(dist.Normal(torch.zeros_like(loc), 1.0).to_event(1), steps)

    def encoded(self, x: Tensor) -> Any:
        trunk, head, layers = self.encoder.children()
        context = trunk(x)
        return context, *head(context).chunk(2, -1), list(zip(layers.children(), self.orders, strict=True))


class AdversarialVB(nn.Module):
    """With adaptive contrast unless there is a single particle; program and critic share their draws and one backward
    pass."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.particles = task.particles
        (self.trunk, head), self.decoder = task.networks()
        guide, self.critic = Implicit(task.latent, head.in_features), Critic(task.latent, head.in_features)
        self.guide, self.noise = guide.default, guide.noises

    def draws(self, context: Tensor, count: int) -> Tensor:
        context = context.expand(count, *context.shape)
        return self.guide(torch.cat([context, torch.randn(*context.shape[:-1], self.noise, device=context.device)], -1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        context = self.trunk(x)
        z = self.draws(context, self.particles)
        mean, scale = torch.zeros_like(z[0]), torch.ones_like(z[0])
        if self.particles > 1:
            with torch.no_grad():
                scale, mean = torch.std_mean(torch.cat([z, self.draws(context, MOMENT_DRAWS - self.particles)]), 0)
        white, given = (z - mean) / scale, context.detach().expand(self.particles, *context.shape)
        rate = scored(self.critic, white, given) - scale.log().sum(-1) + 0.5 * (z.square() - white.square()).sum(-1)
        loss = (distortions(self.decoder(z), x) + rate).mean()
        of_draws, of_normal = self.critic(white.detach(), given), self.critic(torch.randn_like(white), given)
        return loss + F.softplus(-of_draws).mean() + F.softplus(of_normal).mean(), loss.detach()


class WassersteinGAN(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.latent = task.latent
        self.generator, self.critic = nn.Sequential(task.networks()[1], nn.Sigmoid()), Critic(task.shape)

    def forward(self, x: Tensor, alone: bool = False) -> tuple[Tensor, Tensor]:
        """With the critic ``alone``, its loss; else the generator's too."""
        with torch.set_grad_enabled(not alone):
            samples = self.generator(torch.randn(len(x), self.latent, device=x.device))
        fakes = samples.detach()
        between = fakes.lerp(x, torch.rand(len(x), 1, device=x.device))
        if torch.compiler.is_compiling():  # a graph of torch.compile is not differentiated twice
            slopes = torch.func.grad(lambda each: self.critic(each).sum())(between)
        else:
            between.requires_grad_()
            (slopes,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = 10.0 * (slopes.norm(dim=-1) - 1).square().mean()
        contrast = self.critic(fakes).mean() - self.critic(x).mean() + penalty
        if alone:
            return contrast, contrast.detach()
        loss = -scored(self.critic, samples).mean()
        return loss + contrast, loss.detach()


def distortions(logits: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def scored(critic: nn.Module, *inputs: Tensor) -> Tensor:
    """What a critic says, its weights held."""
    held = {name: weight.detach() for name, weight in critic.named_parameters()}
    return torch.func.functional_call(critic, held, inputs)


def vae(task: Task, objective: Callable[[], Any] = ELBO, family: Any = Normal) -> tuple[Any, Any, Any]:
    """Model, guide and objective as pyrogen has them."""
    (trunk, _), decoder = task.networks()
    model = LatentVariableModel(StandardNormal(task.latent), Bernoulli(decoder))
    return model, AmortizedGuide(model, trunk, family), objective()


def gan(task: Task) -> tuple[Any, Any, Any]:
    generator = nn.Sequential(task.networks()[1], nn.Sigmoid())
    shown = Implicit(task.shape, task.latent, noise=0, network=generator)
    return LatentVariableModel(StandardNormal(task.latent), shown), None, GAN("wasserstein-gp")


PEERS = ("Pyro SVI", "Pythae", "Pixyz")
plain: Any = partial(Task, VAE, vae, PEERS, ("VAE", "VAEConfig", {}))
iwae, plain_avb = partial(vae, objective=partial(IWAE, 50)), partial(AVB, 1, contrast="none")
IWAE_OF_PYTHAE = ("IWAE", "IWAEConfig", {"number_samples": 50})
FLOW_OF_PYTHAE = ("VAE_IAF", "VAE_IAF_Config", {"n_made_blocks": LAYERS, "n_hidden_in_made": 2, "hidden_size": 100})
TASKS: dict[str, Task] = {
    "mlp-128": plain(),
    "mlp-1024": plain(batch=1024, steps=20),
    "tiny-4": plain(batch=4, steps=400, shape=(16,), hidden=(8,), latent=2),
    "conv-128": plain(steps=15, shape=(1, 28, 28)),
    "conv-1024": plain(batch=1024, steps=3, shape=(1, 28, 28)),
    "iwae-50": Task(ImportanceWeighted, iwae, PEERS[:2], IWAE_OF_PYTHAE, steps=4, particles=50),
    "flow": Task(FlowVAE, partial(vae, family=Flow), PEERS[:2], FLOW_OF_PYTHAE, steps=40),
    "avb": Task(AdversarialVB, partial(vae, objective=AVB, family=Implicit), steps=8, particles=8),
    "avb-plain": Task(AdversarialVB, partial(vae, objective=plain_avb, family=Implicit), steps=40),
    "wgan-gp": Task(WassersteinGAN, gan, steps=20, critic_steps=5),
}


Training = tuple[float, float, float]
"""Milliseconds a step after the first epoch, the last one's mean loss, and seconds of compilation."""


def timed(task: Task, data: Tensor, epochs: int, epoch: Callable[[], float]) -> Training:
    """Train by what trains for an epoch and returns its mean loss."""
    seconds = []
    for _ in range(1 + epochs):
        started = time.perf_counter()
        loss = epoch()
        if data.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    mean = sum(seconds[1:]) / epochs
    return 1000 * mean / task.steps, loss, seconds[0] - mean


def stepwise(task: Task, data: Tensor, epochs: int, step: Callable[[Tensor], Any]) -> Training:
    """Train by what takes a step and returns its loss."""

    def epoch() -> float:
        total: Any = 0.0
        for index in torch.randperm(len(data), device=data.device).split(task.batch):
            total += step(data[index])
        return float(total) / task.steps

    return timed(task, data, epochs, epoch)


def by_hand(
    task: Task, data: Tensor, epochs: int, *, fused: bool = False, compiled: bool = False, graph: bool = False
) -> Training:
    torch._dynamo.reset()  # or earlier rounds count against the limit of compilations
    module = task.written(task).to(data.device)
    loss_of: Any = torch.compile(module) if compiled else module
    optimizers = []
    for of_critic, betas in enumerate(BETAS):
        if parameters := [p for name, p in module.named_parameters() if name.startswith("critic") == of_critic]:
            optimizers.append(torch.optim.Adam(parameters, RATE, betas, fused=fused or None, capturable=graph))

    def step(x: Tensor) -> Tensor:
        for left in reversed(range(task.critic_steps)):
            some = torch.randint(len(data), (task.batch,), device=data.device)
            loss, shown = loss_of(data[some], alone=True) if left else loss_of(x)
            moved = optimizers[1:] if left else optimizers
            for optimizer in moved:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in moved:
                optimizer.step()
        return shown

    return stepwise(task, data, epochs, as_graph(step, data[: task.batch]) if graph else step)


def as_graph(step: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """A whole step as a CUDA graph, in the manner of PyTorch's notes on CUDA graphs, after three as it is."""
    held, stream, graph = x.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(held)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        shown = step(held)

    def replay(x: Tensor) -> Tensor:
        held.copy_(x)
        graph.replay()
        return shown

    return replay


def by_pyrogen(task: Task, data: Tensor, epochs: int, *, compiled: bool = False) -> Training:
    options: Any = {"batch_size": task.batch, "learning_rate": RATE, "device": data.device.type, "compile": compiled}
    run = pg.fit(*task.programs(task), data, epochs=1 + epochs, progress=False, **options)
    seconds, losses = run.history["seconds"].to_numpy(), run.history["loss"].to_numpy()
    return 1000 * (seconds[-1] - seconds[0]) / (epochs * task.steps), losses[-1], run.compile_seconds


def by_svi(task: Task, data: Tensor, epochs: int) -> Training:
    pyro.clear_param_store()
    module: Any = task.written(task).to(data.device)

    def model(x: Tensor) -> None:
        pyro.module("decoder", module.decoder)
        with pyro.plate("data", len(x)):
            loc = x.new_zeros(len(x), task.latent)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=module.decoder(z)).to_event(x.dim() - 1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", module.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", module.posterior(x))

    loss: Any = RenyiELBO(0, task.particles, vectorize_particles=True) if task.particles > 1 else TraceMeanField_ELBO()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": RATE}), loss)  # type: ignore[attr-defined]
    return stepwise(task, data, epochs, lambda x: svi.step(x) / len(x))


def by_pythae(task: Task, data: Tensor, epochs: int) -> Training:
    names = ("models", "models.nn", "models.base.base_utils", "trainers", "data.datasets")
    models, parts, bases, trainers, datasets = (importlib.import_module(f"pythae.{name}") for name in names)  # noqa: TID251 (names of ours)
    encoder, decoder = parts.BaseEncoder(), parts.BaseDecoder()
    encoder.network, decoder.network = task.networks()
    # A peer's user writes classes for this.
    outputs = ("embedding", "log_covariance")
    encoder.forward = lambda x: bases.ModelOutput(zip(outputs, encoder.network(x).chunk(2, -1), strict=True))
    decoder.forward = lambda z: bases.ModelOutput(reconstruction=decoder.network(z).sigmoid())
    name, configuration, options = task.pythae
    configuration = getattr(models, configuration)(task.shape, task.latent, reconstruction_loss="bce", **options)
    model = getattr(models, name)(configuration, encoder, decoder)
    rows, numbers = datasets.BaseDataset(data.cpu(), torch.zeros(len(data))), itertools.count(1)
    settings: Any = {"per_device_train_batch_size": task.batch, "learning_rate": RATE, "no_cuda": not data.is_cuda}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        settings = trainers.BaseTrainerConfig(output_dir=folder, **settings)
        trainer = trainers.BaseTrainer(model, rows, training_config=settings)
        trainer.prepare_training()
        return timed(task, data, epochs, lambda: trainer.train_step(next(numbers)))


def by_pixyz(task: Task, data: Tensor, epochs: int) -> Training:
    families, losses, models = (importlib.import_module(f"pixyz.{n}") for n in ("distributions", "losses", "models"))  # noqa: TID251 (as above)
    q = families.Normal(var=["z"], cond_var=["x"], name="q").to(data.device)
    p = families.Bernoulli(var=["x"], cond_var=["z"], name="p").to(data.device)
    q.network, p.network = (part.to(data.device) for part in task.networks())

    def encode(x: Tensor) -> dict[str, Tensor]:
        loc, log_variance = q.network(x).chunk(2, -1)
        return {"loc": loc, "scale": (0.5 * log_variance).exp()}

    q.forward, p.forward = encode, lambda z: {"probs": p.network(z).sigmoid()}
    unit = {"loc": torch.tensor(0.0), "scale": torch.tensor(1.0), "features_shape": [task.latent]}
    kl = losses.KullbackLeibler(q, families.Normal(**unit, var=["z"], name="p_{prior}").to(data.device))
    model = models.VAE(q, p, regularizer=kl, optimizer_params={"lr": RATE})
    return stepwise(task, data, epochs, lambda x: model.train({"x": x}).detach())


REFERENCE = "hand-written"
CONTENDERS: dict[str, Callable[[Task, Tensor, int], Training]] = {
    REFERENCE: by_hand,
    "hand-written, fused": partial(by_hand, fused=True),
    "hand-written, compiled": partial(by_hand, fused=True, compiled=True),
    "hand-written, CUDA graph": partial(by_hand, fused=True, compiled=True, graph=True),
    "pyrogen": by_pyrogen,
    "pyrogen, compiled": partial(by_pyrogen, compiled=True),
    "Pyro SVI": by_svi,
    "Pythae": by_pythae,
    "Pixyz": by_pixyz,
}
COLUMNS = ["ms a step", "ms, 25 %", "ms, 75 %", "ratio", "ratio, 25 %", "ratio, 75 %", "compiled in, s", "last loss"]


def trained(task: Task, contenders: list[str], epochs: int, device: str) -> dict[str, Training]:
    """All contenders, one after the other."""
    task = replace(task, steps=max(task.steps, STEPS_ON_GPU)) if device == "cuda" else task
    data = task.data(device)
    return {name: CONTENDERS[name](task, data, epochs) for name in contenders}


def start_compiler() -> None:
    """Compile something small, so that what a process pays once is in nobody's time."""
    torch.compile(torch.sin)(torch.ones(2, requires_grad=True)).sum().backward()


def summarized(rounds: list[dict[str, Training]]) -> pd.DataFrame:
    """A row of figures for each contender."""
    found = [(turn, name, *each) for turn, of in enumerate(rounds) for name, each in of.items()]
    rows = pd.DataFrame(found, columns=["round", "name", "ms", "loss", "compilation"])
    reference = rows[rows["name"] == REFERENCE].set_index("round")["ms"]
    rows["ratio"] = rows["ms"] / rows["round"].map(reference)
    rows["compilation"] = rows["compilation"].where(rows["name"].str.endswith(("compiled", "graph")))
    of = rows.groupby("name", sort=False)
    columns = [of[figure].quantile(q) for figure in ("ms", "ratio") for q in (0.5, 0.25, 0.75)]
    return pd.concat([*columns, of["compilation"].first(), of["loss"].last()], axis=1, keys=COLUMNS).rename_axis(None)


def in_text(table: pd.DataFrame, markdown: bool) -> str:
    cells = table.map(lambda x: "" if math.isnan(x) else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}")
    lines = [["contender", *cells], ["---", *["---:"] * cells.shape[1]], *cells.itertuples()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if markdown else cells.to_string()


def draw(tables: dict[str, pd.DataFrame], path: str) -> None:
    """Ratios to the hand-written loop, a panel for each task."""
    from matplotlib import pyplot as plt

    colours, wide = {REFERENCE: "#9aa5b1", "pyrogen": "#d1495b"}, min(3, len(tables))
    high = math.ceil(len(tables) / wide)
    figure = plt.figure(figsize=(4.6 * wide, 0.5 + 2.4 * high), layout="constrained")
    for place, (name, table) in enumerate(tables.items(), 1):
        axis = figure.add_subplot(high, wide, place)
        ratio, lower, upper = (table[column] for column in COLUMNS[3:6])
        colour = [colours.get(contender.split(",")[0], "#30638e") for contender in table.index]
        bars = axis.barh(table.index, ratio, xerr=[ratio - lower, upper - ratio], color=colour, error_kw={"lw": 0.8})
        axis.bar_label(bars, fmt="%.2f", padding=4, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=0.6, linestyle=":", zorder=0)
        axis.set(title=name, xlim=(0, 1.2 * max(1.0, upper.max())))
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
    figure.supxlabel("time of a step as a multiple of hand-written PyTorch's", fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def describe_machine(device: str) -> None:
    """Print versions and hardware."""
    packages = ["torch", "pyro-ppl", *(name for name in ("pythae", "pixyz") if find_spec(name))]
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "a processor")
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    print(", ".join(f"{package} {version(package)}" for package in packages))
    print(f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="that are timed, after the first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--chart", metavar="FILE.png", help="a bar chart of the ratios")
    parser.add_argument("--markdown", action="store_true", help="tables as GitHub reads them")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.INFO)
    describe_machine(arguments.device)
    missing = [name for name in ("Pythae", "Pixyz") if not find_spec(name.lower())]
    print("".join(f"{name} is left out, for it is not installed: pip install {name.lower()}\n" for name in missing))
    missing += ["hand-written, CUDA graph"] * (arguments.device == "cpu")
    lacking = {name: [peer for peer in PEERS if peer not in TASKS[name].peers] for name in arguments.tasks}
    rounds: dict[str, list[dict[str, Training]]] = {name: [] for name in arguments.tasks}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that every run compiles anew
        start_compiler()
        for turn in range(arguments.rounds):
            for name, of_task in rounds.items():
                print(f"round {turn + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
                contenders = [each for each in arguments.contenders if each not in [*missing, *lacking[name]]]
                first = turn % len(contenders)
                order = contenders[first:] + contenders[:first]
                found = trained(TASKS[name], order, arguments.epochs, arguments.device)
                of_task.append({contender: found[contender] for contender in contenders})
    tables = {name: summarized(of_task) for name, of_task in rounds.items()}
    for name, table in tables.items():
        print(f"{name}" + (f" (no such model: {', '.join(lacking[name])})" if lacking[name] else "") + "\n")
        print(in_text(table, arguments.markdown), end="\n\n")
    if arguments.chart:
        draw(tables, arguments.chart)


if __name__ == "__main__":
    main()
