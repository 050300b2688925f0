"""Programs: what a Pyro callable says about its sites, and how one is run on several copies of a batch.

A *program* is any Pyro callable. Its per-observation sites stand in the plate named ``"data"``; sites outside it are
global.
"""

import copy
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyrogen.inference.turns import turn

__all__ = [
    "Copies",
    "Program",
    "Site",
    "as_module",
    "bare",
    "bare_program",
    "before",
    "check_takes",
    "clear_gradients",
    "data_frame",
    "describe_example",
    "encode",
    "evaluation_mode",
    "global_draws",
    "is_real",
    "latent_sites",
    "make_example",
    "module_name",
    "modules_of",
    "no_sites",
    "observed_sites",
    "per_row",
    "prototype",
    "rehearsal",
    "repeat",
    "sample_sites",
    "stored_parameters",
    "trace_of",
    "unregistered",
]


_NOT_FINITE = re.compile(
    r"Expected parameter (\w+) .* of distribution (\w+)\(.* to satisfy the constraint "
    r"(?:\S*Real\(\)|.*, but found invalid values:.*\b(?:nan|inf)\b)",
    re.DOTALL,
)
"""What torch says of a parameter that is NaN, and of one outside of a support that is infinite."""


@dataclass(frozen=True)
class Site:
    """What a trace of a program says about one latent site.

    Attributes:
        name: The name of the ``pyro.sample`` statement.
        shape: Event shape.
        support: Support of its distribution.
        plates: The vectorised plates around it, from the rightmost dimension to the left.
    """

    name: str
    shape: tuple[int, ...]
    support: constraints.Constraint
    plates: tuple[CondIndepStackFrame, ...]

    @property
    def is_global(self) -> bool:
        """Whether it stands outside the plate ``"data"``."""
        return all(plate.name != "data" for plate in self.plates)


def sample_sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """The sample statements of a trace, in order, without the plates' own."""
    nodes: Any = trace.nodes.items()
    return {name: node for name, node in nodes if node["type"] == "sample" and not site_is_subsample(node)}


def latent_sites(trace: poutine.Trace) -> dict[str, Site]:
    """The latent sites of a model's trace, in order.

    Raises:
        ValueError: At a discrete latent site, which no reparameterised guide can serve.
    """
    sites = {}
    for name, node in sample_sites(trace).items():
        if _is_observed(node):
            continue
        support = _of_components(node["fn"].support)
        support = _without_batch(name, support, node["fn"].event_dim)
        if support.is_discrete:
            raise ValueError(
                f"latent site '{name}' is discrete (support {support}); expected continuous latent sites, whose "
                "samples have gradients. Sum the site out of the model, or relax it, e.g. with "
                "pyro.distributions.RelaxedOneHotCategorical"
            )
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
        plates = tuple(sorted(frames, key=lambda frame: -frame.dim))
        for plate in plates:
            if plate.name != "data" and plate.full_size not in (None, plate.size):
                raise ValueError(
                    f"latent site '{name}' stands in the plate '{plate.name}', which subsamples {plate.size} of "
                    f'{plate.full_size} elements; only the plate "data" may subsample, since a guide can\'t tell which '
                    "elements were drawn"
                )
        sites[name] = Site(name, tuple(node["fn"].event_shape), support, plates)
    return sites


def _without_batch(name: str, support: Any, event_dim: int) -> constraints.Constraint:
    """A support whose bounds have the event's shape, where a plate has spread them over its elements."""
    base, changed = copy.copy(bare(support)), False
    for bound in ("lower_bound", "upper_bound"):
        value = getattr(base, bound, None)
        if isinstance(value, Tensor) and value.dim() > event_dim:
            each = value.flatten(0, value.dim() - event_dim - 1)
            if not (each == each[0]).all():
                raise ValueError(
                    f"the support of latent site '{name}' differs from one observation or plate element to the other "
                    f"({bound} {each.tolist()}); draw a value on a fixed support and map it in the program"
                )
            setattr(base, bound, each[0])
            changed = True
    if not changed:
        return support
    return constraints.independent(base, event_dim) if event_dim else base


def _of_components(support: Any) -> constraints.Constraint:
    """The support of a mixture is that of its components; torch names it by a constraint that maps to nothing."""
    return support.base_constraint if isinstance(support, MixtureSameFamilyConstraint) else support


def observed_sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """The observed sites of a model's trace, in order; with nothing observed, those that were."""
    return {name: node for name, node in sample_sites(trace).items() if _is_observed(node)}


def _is_observed(node: dict[str, Any]) -> bool:
    return node["is_observed"] or bool(node["infer"].get("was_observed"))


@cache
def module_name(site: str) -> str:
    """A site's name as a module's name, which can't hold a dot nor be that of an attribute."""
    name = site.replace("%", "%25").replace(".", "%2E")
    return f"site {name}" if hasattr(nn.ModuleDict(), name) else name


def data_frame(node: dict[str, Any]) -> CondIndepStackFrame | None:
    """The plate ``"data"`` around a site, or None at a global site."""
    for frame in node["cond_indep_stack"]:  # a generator would take three times as long, at every step
        if frame.name == "data":
            return frame
    return None


def row_axis(node: dict[str, Any]) -> int:
    """Which axis of a value of a site in the plate ``"data"`` is that plate's, from the right."""
    frame = data_frame(node)
    assert frame is not None and frame.dim is not None
    return frame.dim - node["fn"].event_dim


def global_draws(trace: poutine.Trace) -> poutine.Trace:
    """The global latent sites of a trace, for programs that shall be run at the same values."""
    held = poutine.Trace()
    for name, node in sample_sites(trace).items():
        if data_frame(node) is None and not node["is_observed"]:
            held.add_node(name, **node)
    return held


def per_row(node: dict[str, Any], log_prob: Tensor) -> Tensor:
    """Sum a log-density over every plate of its site except ``"data"``, with the site's scale and mask.

    The scale by which a subsampling ``"data"`` plate stands for the whole data set is left out: what comes is per
    observation.

    Shapes:
        The batch shape of the site gives ``(B,)``, or ``()`` at a global site.
    """
    data = data_frame(node)
    scale = node["scale"]
    if data is not None and data.full_size not in (None, data.size):
        scale = scale * data.size / data.full_size
    if node["mask"] is not None or not isinstance(scale, (int, float)) or scale != 1.0:
        log_prob = pyro.distributions.util.scale_and_mask(log_prob, scale, node["mask"])
    if data is None:
        return log_prob.sum()
    if data.dim == -1 and log_prob.shape == (data.size,):
        return log_prob
    depth = -min(frame.dim or 0 for frame in node["cond_indep_stack"])
    log_prob = log_prob.reshape((1,) * (depth - log_prob.dim()) + tuple(log_prob.shape))
    others = [dim for dim in range(-log_prob.dim(), 0) if dim != data.dim]
    return (log_prob.sum(others) if others else log_prob).expand(data.size)


def before(names: Iterable[str], name: str) -> list[str]:
    """The names that stand before one of them."""
    return [*itertools.takewhile(lambda other: other != name, names)]


@contextmanager
def evaluation_mode(*programs: Callable | None) -> Iterator[None]:
    """Within, programs and their modules are in evaluation mode; each gets its own mode back. Other threads wait."""
    with turn():
        modules = [module for program in programs for root in modules_of(program) for module in root.modules()]
        modes = [module.training for module in modules]
        # Pyro's store would have every parameter that it sees trained.
        frozen = [p for module in modules for p in module.parameters(recurse=False) if not p.requires_grad]
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for parameter in frozen:
                parameter.requires_grad_(False)


def clear_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Take gradients away, as ``zero_grad`` does, which walks through modules first or tells a profiler."""
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def rehearsal(*programs: Callable | None) -> Iterator[None]:
    """Within, programs run in evaluation mode and leave no mark: no gradient, and no parameter in Pyro's store."""
    with torch.no_grad(), poutine.block(), pyro.get_param_store().scope(), evaluation_mode(*programs):
        yield


def prototype(program: Callable, *batch: Tensor, observed: bool = True, in_training: bool = False) -> poutine.Trace:
    """Trace a program once and leave no mark: no gradient, no parameter stored, no random number used up.

    Args:
        program: A Pyro callable.
        batch: The tensors it is called with.
        observed: Whether its observations hold; else they are sampled.
        in_training: Whether it is called as :func:`unregistered`.
    """
    check_takes(program, *batch)
    devices = {tensor.device for tensor in batch if tensor.is_cuda}
    with torch.random.fork_rng(devices=devices), rehearsal(program):
        called = unregistered(program) if in_training else program
        return trace_of(called if observed else poutine.uncondition(called), *batch)


def check_takes(program: Callable, *batch: Tensor) -> None:
    """Raise a ``TypeError`` for a program, or an encoder, that takes more tensors or fewer than a batch has."""
    function = program.forward if isinstance(program, nn.Module) else program
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # what wraps it may take other tensors
    except (TypeError, ValueError):  # of what is not written in Python
        return
    try:
        signature.bind(*batch)
    except TypeError as error:
        name = getattr(program, "__name__", type(program).__name__)
        raise TypeError(
            f"{name} is called as {name}({', '.join(signature.parameters)}), but each tensor of the data is an "
            f"argument, and there are {len(batch)}; join rows of one kind by torch.stack, or take as many arguments"
        ) from error


def trace_of(program: Callable, *batch: Tensor) -> poutine.Trace:
    """Run a program and trace it. Its errors come as they are, with the shapes of the sites before them as a note.

    Only torch's for a parameter that is not finite is put into other words, for it would print the whole tensor.
    """
    with poutine.trace() as tracing:
        try:
            program(*batch)
        except (ValueError, RuntimeError) as error:  # to whose text Pyro's own handler would add them
            if found := _NOT_FINITE.match(str(error)):
                error.args = (_not_finite(program, *found.groups()),)
            error.add_note(tracing.trace.format_shapes())
            raise
    return tracing.trace


def _not_finite(program: Callable, parameter: str, distribution: str) -> str:
    """What to say of a program that gives a distribution a parameter that is not finite."""
    program = inspect.unwrap(program)  # of Pyro's handlers
    name = getattr(program, "__name__", type(program).__name__)
    weights = [p for module in modules_of(program) for p in module.parameters() if p.is_floating_point() and p.numel()]
    largest = max((p.detach().abs().max().item() for p in weights), default=None)
    known = "" if largest is None else f"; the largest of its weights is {largest:.3g}"
    return (
        f"{name} gives the distribution {distribution} {parameter} that are not finite{known}. If a training has "
        "diverged, go back to an earlier checkpoint, or train again with a smaller learning_rate"
    )


class Program(nn.Module):
    """A Pyro callable that keeps its parameters outside any module, made into a module that owns them.

    Parameters registered by ``pyro.param`` and ``pyro.module`` become the module's own, and live in a parameter store
    of its own, so that two programs never share one by name. Modules to which the function refers come along with
    their buffers.

    Args:
        function: The callable.
        batch: A batch on which it can run once, to see its parameters.
    """

    def __init__(self, function: Callable, *batch: Tensor) -> None:
        super().__init__()
        self.function = function
        self.modules_of = nn.ModuleDict(_modules_referred_to(function))
        store: Any = {"params": {}, "constraints": {}}
        self._store = store
        with (
            pyro.get_param_store().scope(store),
            torch.random.fork_rng(),
            poutine.block(),
            evaluation_mode(function),
        ):
            trace = trace_of(function, *batch)
        self._store["params"] |= {name: value for name, value in _copied(trace) if name in self._store["params"]}
        known = {id(parameter) for parameter in self.parameters()}
        for name, value in self._store["params"].items():
            if id(value) not in known:
                parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
                self._store["params"][name] = parameter
                own = name.replace(".", "-")
                self.register_parameter(f"param {own}" if hasattr(self, own) else own, parameter)

    def forward(self, *batch: Tensor) -> Any:
        with pyro.get_param_store().scope(self._store):
            return self.function(*batch)


def modules_of(program: Callable | None) -> list[nn.Module]:
    """The module that a program is, or those that a plain function refers to."""
    if program is None:
        return []
    return [program] if isinstance(program, nn.Module) else [*_modules_referred_to(program).values()]


def _modules_referred_to(function: Callable) -> dict[str, nn.Module]:
    if isinstance(function, nn.Module):
        return {}
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        return {"self": owner}
    if not inspect.isfunction(function):
        return {}
    seen = inspect.getclosurevars(function)
    variables = {**seen.globals, **seen.nonlocals}
    return {name: value for name, value in variables.items() if isinstance(value, nn.Module)}


class Unregistered:
    """A module called without Pyro's bookkeeping of its parameters, for those who take them from the module itself.

    A ``PyroModule`` announces each parameter at each call; where an optimizer holds the parameters already that is
    work for nothing. Modules with random attributes (``PyroSample``) need it, and get it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        parts = [part for part in module.modules() if isinstance(part, PyroModule)]
        self.call = module if any(part._pyro_samples for part in parts) else partial(nn.Module.__call__, module)
        self.parameters = module.parameters

    def __call__(self, *batch: Tensor) -> Any:
        return self.call(*batch)


def unregistered(program: Callable | None) -> Any:
    """The program as :class:`Unregistered` where it is a module, else itself."""
    return Unregistered(program) if isinstance(program, nn.Module) else program


def bare_program(program: Any) -> Any:
    """A program as it was given to :func:`unregistered`."""
    return program.module if isinstance(program, Unregistered) else program


def as_module(program: Callable, *batch: Tensor) -> nn.Module:
    """The program as a module that owns all its parameters: itself where it does already, else a :class:`Program`."""
    if isinstance(program, nn.Module):
        known = {id(parameter) for parameter in program.parameters()}
        if all(id(parameter) in known for parameter in stored_parameters(prototype(program, *batch, in_training=True))):
            return program
    return Program(program, *batch)


def stored_parameters(trace: poutine.Trace) -> list[Tensor]:
    """The unconstrained parameters that a program has registered, as Pyro has stored them."""
    values: list[Any] = [node["value"] for node in trace.nodes.values() if node["type"] == "param"]
    return [value.unconstrained() if hasattr(value, "unconstrained") else value for value in values]


def _copied(trace: poutine.Trace) -> Iterator[tuple[str, nn.Parameter]]:
    """Modules' own parameters, with their names, of which Pyro stores copies: those that are not contiguous, such as
    kernels whose channels come last."""
    nodes: Any = trace.nodes.items()
    for name, node in nodes:
        if node["type"] == "param" and node["kwargs"]["constraint"] is constraints.real:
            given = next(iter(node["args"][1:]), None)
            if isinstance(given, nn.Parameter) and not given.is_contiguous():
                yield name, given


def no_sites(*batch: Tensor) -> None:
    """The guide of a model without latent sites."""


def repeat(batch: Sequence[Tensor], copies: int) -> tuple[Tensor, ...]:
    """``copies`` copies of each row, copy by copy: ``(B, ...)`` gives ``(copies * B, ...)``."""
    if copies == 1:
        return tuple(batch)
    return tuple(x.unsqueeze(0).expand(copies, *x.shape).reshape(-1, *x.shape[1:]) for x in batch)


class Copies(Messenger):
    """Run programs on ``copies`` copies of a batch, with the encoder's work done once for each row.

    Particles are copies of the rows, so whatever handles a batch handles particles, and global sites are drawn once.
    Inside this handler a guide's :func:`encode` sees the first copy only and its result is repeated, and so is what
    :class:`~pyrogen.distributions.families.Parameters` make of just that. A guide that is run :meth:`again` gets the
    features of its first run as constants, so that an encoder with dropout gives the same.
    """

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies
        self.features: list[Tensor] = []
        self.known: Iterator[Tensor] | None = None
        self._repeated: list[tuple[Tensor, Tensor]] = []  # with what it is copies of

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, encoders give what they gave before, without gradient."""
        self.known = iter(self.features)
        try:
            yield
        finally:
            self.known = None

    def _pyro_encode(self, msg: dict[str, Any]) -> None:
        if self.known is not None:
            msg["value"] = next(self.known).detach()
        else:
            rows = len(msg["args"][0]) // self.copies
            features = msg["fn"](*(x[:rows] for x in msg["args"]))
            msg["value"] = repeat((features,), self.copies)[0]
            self.features.append(msg["value"])
            self._repeated.append((msg["value"], features))
        msg["done"] = True

    def _pyro_linear(self, msg: dict[str, Any]) -> None:
        layer, context = msg["args"]
        for repeated, features in self._repeated:
            if context is repeated:
                msg["value"] = repeat((msg["fn"](layer, features),), self.copies)[0]
                msg["done"] = True


def encode(encoder: Callable, *batch: Tensor) -> Tensor:
    """Call an encoder as a Pyro effect, so that :class:`Copies` can spare repeated work."""
    return effectful(encoder, type="encode")(*batch, name="encode")


def bare(constraint: Any) -> Any:
    """A constraint without the event dimensions declared around it."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def is_real(support: constraints.Constraint) -> bool:
    """Whether a support is the whole space, so that no map is needed."""
    return isinstance(bare(support), type(constraints.real))  # a copy or an unpickled one is another object


def describe_example(batch: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Shape and type of each tensor of a batch, as plain values."""
    return [{"shape": [*x.shape], "dtype": str(x.dtype).removeprefix("torch.")} for x in batch]


def make_example(example: Sequence[Any]) -> tuple[Tensor, ...]:
    """A batch of zeros from what :func:`describe_example` returned."""
    return tuple(torch.zeros(tuple(x["shape"]), dtype=getattr(torch, x["dtype"])) for x in example)
