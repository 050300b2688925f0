"""Wrong inputs by the kind of argument, what becomes of a call that is given one of them, and the count of it all."""

import inspect
import resource
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn

from pyrogen.inference import NonFiniteLoss

LONG, SNOW = "x" * 5000, "ü☃"
SECONDS = 15
"""The longest that a call with a wrong input may take."""
PACKAGE = str(Path(pyro.__file__).parents[1])
MEMORY = 4 << 30
"""The most that all calls of a test may take besides what the process has, in bytes."""


class Odd:
    """Something that nobody expects."""


_ODD: dict[str, Any] = {
    "an object": Odd(),
    "a class": Odd,
    "a complex number": 1j,
    "bytes": b"x",
    "a dictionary": {1: 2},
}
_NUMBERS: dict[str, Any] = {
    **_ODD,
    "a text": "3",
    "snow": SNOW,
    "a long text": LONG,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "a list": [1],
    "an empty list": [],
    "a tensor": torch.ones(2),
    "a tensor on meta": torch.ones((), device="meta"),
    "an array": np.ones(2),
    "a function": len,
}


def _tensors(x: Tensor) -> dict[str, Any]:
    some = x.to(torch.get_default_dtype()) if x.dtype is torch.bool else x
    wrong: dict[str, Any] = {
        "on meta": some.to("meta"),
        "sparse": some.to_sparse(),
        "complex": some.to(torch.complex64),
        "without rows": some[:0] if some.dim() else some.reshape(1)[:0],
    }
    if some.is_floating_point():
        wrong |= {"NaN": torch.full_like(some, float("nan")), "infinite": torch.full_like(some, float("inf"))}
    if some.dim() > 1:
        wrong |= {"one number": some.flatten()[0]}
    return wrong


_COUNTS = _NUMBERS | {"half": 2.5, "minus one": -1, "zero": 0, "10^30": 10**30, "None": None, "True": True}
_TEXTS = _ODD | {"a number": 3, "NaN": float("nan"), "None": None, "a list": [], "a zero byte": "x\0y", "long": LONG}
_SIZES = _ODD | {
    "a text": "abc",
    "None": None,
    "minus three": [-3],
    "zero": [0],
    "half": [2.5],
    "texts": ["a"],
    "NaN": [float("nan")],
    "10^30": [10**30],
    "10^12": [10**12],
    "nested": [[1]],
    "of None": [None],
    "a tensor": torch.ones(2),
    "a function": len,
}
_REAL = _NUMBERS | {"10^400": 10**400, "None": None, "True": True}
_PARTS = _ODD | {
    "a text": "Normal",
    "snow": SNOW,
    "a number": 3,
    "None": None,
    "a list": [1],
    "a tensor": torch.ones(2),
}
WRONG: dict[str, dict[str, Any]] = {
    "count": _COUNTS,
    "count or zero": {key: value for key, value in _COUNTS.items() if key != "zero"},
    "seed": {key: value for key, value in _COUNTS.items() if key not in ("zero", "minus one")},  # _same has some
    "number": _REAL,
    "weight": _REAL | {"minus one": -1.0},
    "positive": _REAL | {"minus one": -1.0, "zero": 0.0},
    "part of one": _REAL | {"minus one": -1.0, "two": 2.0},
    "numbers": _ODD
    | {"a text": "abc", "None": None, "NaN": [float("nan")], "texts": ["a"], "nested": [[1.0]], "empty": []},
    "switch": _ODD | {"a text": "yes", "two": 2, "None": None, "a list": [], "a tensor": torch.ones(2)},
    "choice": _TEXTS | {"another": "nonsense", "empty": "", "snow": SNOW},
    "choice or function": {key: value for key, value in _TEXTS.items() if key != "a class"} | {"another": "nonsense"},
    "choices": _ODD | {"a number": 3, "None": None, "another": ["nonsense"], "snow": SNOW, "empty": [], "numbers": [3]},
    "path": _TEXTS | {"missing": "no/such/" + SNOW},
    "new path": _TEXTS,
    "part": {key: value for key, value in _PARTS.items() if key != "a class"},
    "function": {key: value for key, value in _PARTS.items() if key != "a class"},
    "sizes": _SIZES | {"a number": 3},
    "shape": _SIZES | {"minus one": -1, "nought": 0, "a half": 2.5, "10^30 alone": 10**30, "True": True},
    "mapping": _ODD | {"a text": "abc", "a list": [1], "a number": 3, "snow": {SNOW: SNOW}, "None in it": {"z": None}},
    "tensor": _ODD
    | {
        "a text": "abc",
        "snow": SNOW,
        "a number": 3.0,
        "None": None,
        "a list": [1.0],
        "an empty list": [],
        "an array": np.ones((4, 2)),
        "a module": nn.ReLU(),
    },
}
WRONG["rows"] = {key: value for key, value in WRONG["tensor"].items() if key not in ("a class", "a module")}
"""What no argument of a kind may be, by a name for each."""

KINDS: dict[str, str] = {
    **dict.fromkeys(
        ("particles", "steps", "components", "levels", "draws", "layers", "latent", "observed", "observations", "rows")
        + ("chains", "leapfrogs", "folds", "samples", "batch_size", "epochs", "cells", "pairs", "simulations", "groups")
        + ("subsets", "subset_size", "degree", "splits", "neighbours", "density_neighbours", "count", "permutations")
        + ("projections", "explicit_steps", "ratio_steps", "gradient_particles", "classes", "prior_draws", "blocks")
        + ("predictive_draws", "repeats", "side", "modes", "size", "validate_every", "patience", "checkpoint_every")
        + ("bridges", "noise", "bins"),
        "count",
    ),
    **dict.fromkeys(("warmup", "context", "loader_workers"), "count or zero"),
    "seed": "seed",
    **dict.fromkeys(("start", "end", "alpha", "slope"), "number"),
    **dict.fromkeys(
        ("threshold", "beta", "gamma", "r1", "gradient_penalty", "free_bits", "weight", "reconstruction"), "weight"
    ),
    **dict.fromkeys(("log_likelihood", "visible_reconstructions", "visible_samples"), "weight"),
    **dict.fromkeys(
        ("scale", "learning_rate", "bandwidth", "radius", "spacing", "gradient_clip", "resize"), "positive"
    ),
    **dict.fromkeys(("rising", "momentum", "level", "average", "target_acceptance"), "part of one"),
    **dict.fromkeys(("factors", "divergences", "betas"), "numbers"),
    **dict.fromkeys(
        ("sticking_the_landing", "through_guide", "unbiased", "mean", "inject", "spectral", "trust"), "switch"
    ),
    **dict.fromkeys(("overwrite", "resume", "progress", "permute"), "switch"),
    **dict.fromkeys(("contrast", "covariance", "loss", "match", "gradient", "weighting", "cost", "binarize"), "choice"),
    **dict.fromkeys(("transform", "schedule"), "choice or function"),
    **dict.fromkeys(("device", "precision", "matmul_precision", "non_finite", "kind"), "choice"),
    **dict.fromkeys(("name", "site"), "choice"),
    "parts": "choices",
    **dict.fromkeys(("folder", "weights", "root"), "path"),
    "out": "new path",
    **dict.fromkeys(("model", "guide", "encoder", "decoder", "prior", "likelihood", "critic", "module", "run"), "part"),
    **dict.fromkeys(("objective", "ratio", "family", "network", "mixing", "first", "second", "options"), "part"),
    **dict.fromkeys(("kernel", "activation", "visible_ratio", "optimizer", "labels", "classifier"), "function"),
    **dict.fromkeys(("hidden", "channels"), "sizes"),
    **dict.fromkeys(("features", "inputs", "outputs", "event_shape", "shape"), "shape"),
    **dict.fromkeys(("held", "quantities", "dims", "coords"), "mapping"),
    "values": "choice",
    **dict.fromkeys(("data", "training", "held_out"), "tensor"),
}
"""The kind of an argument by its name, unless it is a tensor or a call says otherwise."""


def _same(value: Any, kind: str) -> dict[str, Any]:
    """An argument in other guises in which people have it, each of which must be taken."""
    if kind == "seed":
        return {"negative": -3, "smallest": 1 - 2**63, "of numpy": np.int64(3), "of torch": torch.tensor(3)}
    if isinstance(value, bool):
        return {"of numpy": np.bool_(value)}
    if isinstance(value, int):
        return {"of numpy": np.int64(value), "of numpy in 16 bits": np.int16(value), "of torch": torch.tensor(value)}
    if isinstance(value, float):
        return {"of numpy": np.float64(value), "in 32 bits": np.float32(value), "of torch": torch.tensor(value)}
    if isinstance(value, tuple) and value and kind in ("sizes", "shape", "numbers"):
        return {"an array": np.array(value), "a list": [*value], "an iterator": lambda: iter(value)}
    return {}


def _benign(x: Tensor) -> dict[str, Any]:
    """The same numbers in other memory and types, and more than there can be: any clean end is right."""
    odd: dict[str, Any] = {
        "requires grad": x.detach().clone().requires_grad_() if x.is_floating_point() else x,
        "not contiguous": torch.stack([x, x], -1)[..., 0],
        "float64": x.double(),
        "float16": x.half(),
        "whole numbers": x.long(),
        "uint8": x.to(torch.uint8),
        "bool": x.bool(),
        "huge values": x.double() * 1e38,
        "flat": x.flatten(),
        "one more dimension": x[None],
        "one row": x[:1] if x.dim() else x,
    }
    if x.dim():
        odd["10^13 rows"] = x[:1].expand(10**13, *x.shape[1:])
    return odd


ALSO: dict[str, tuple[str, ...]] = {
    "x": ("data", "observation", "batch", "sample"),
    "y": ("sample",),
    "example": ("input",),
    "labels": ("rows", "takes no"),
    "visible_ratio": ("ratio",),
    "order": ("projections",),
    "folder": ("there is no",),
    "classifier": ("probabilities",),
    "training": ("tensor",),
    "held_out": ("held-out", "tensor"),
    "first": ("draws",),
    "second": ("draws",),
    "name": ("data set",),
    **{name: ("a size", "width", "shape") for name, kind in KINDS.items() if kind in ("sizes", "shape", "count")},
}
"""Other words by which messages name an argument."""


class Catalogue:
    """Calls with wrong inputs, and how they ended.

    A call is a tuple: what is called; a value that serves for each argument; ``kinds``, of arguments that are of other
    ones than their names say; and ``right``, by argument the names of wrong inputs that are right there.
    """

    def __init__(self) -> None:
        self.tally: Counter[str] = Counter()
        self.faults: list[str] = []

    def try_all(self, name: str, call: Any) -> None:
        """Call with each wrong input in turn; what is not clean about how that ends stands in ``faults``."""
        function, arguments = call[:2]
        function(**arguments)
        for argument, what, value, must_be_refused in _wrong(*call):
            words = (argument, argument.replace("_", " "), argument.rstrip("s"), *ALSO.get(argument, ()))
            # A tensor of another type or shape may be no slip of one argument alone, so its message is free.
            self.refused(
                f"{name}({argument}={what})",
                partial(function, **arguments | {argument: value}),
                *(words if must_be_refused else ()),
            )
        for argument, value in arguments.items():
            for what, same in _same(value, call[2].get(argument) or KINDS.get(argument, "")).items():
                given = arguments | {argument: same() if inspect.isfunction(same) else same}
                error = _ended(partial(function, **given))
                fault = f"refused: {type(error).__name__}: {error}" if error else ""
                self.count(f"{name}({argument}={what})", fault, "unclean" if error else "accepted rightly")

    def refused(self, where: str, run: Callable[[], Any], *words: str) -> None:
        """Note how something ends that has to be refused with one of these words, or may be without any."""
        error = _ended(run)
        if error is None:
            fault = "taken without a word" if words else ""
            self.count(where, fault, "accepted wrongly" if words else "accepted rightly")
        else:
            fault = _unclean(error, words or ("",))
            self.count(where, fault, "unclean" if fault else "refused cleanly")

    def count(self, where: str, fault: str, ended: str) -> None:
        self.tally.update(["tried", ended])
        if fault:
            self.faults.append(f"{where}: {fault}")


def _wrong(
    function: Callable,
    arguments: dict[str, Any],
    kinds: dict[str, str],
    right: dict[str, tuple[str, ...]],
) -> Iterator[tuple[str, str, Any, bool]]:
    """Each argument, a name for what it is given, that value, and whether it has to be refused."""
    parameters = inspect.signature(function).parameters
    for name, value in arguments.items():
        is_tensor = isinstance(value, Tensor)
        kind = kinds.get(name) or ("tensor" if is_tensor else KINDS[name])
        fine = right.get(name, ())
        for what, given in (WRONG[kind] | (_tensors(value) if is_tensor else {})).items():
            if what != "None" or not ("None" in fine or parameters[name].default is None):
                yield name, what, given, what not in fine
        for what, given in (_benign(value) if is_tensor else {}).items():
            yield name, what, given, False


def _ended(run: Callable[[], Any]) -> BaseException | None:
    def too_long(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    former = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    except Exception as error:
        return error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    return None


def _unclean(error: BaseException, words: Sequence[str]) -> str:
    """What is wrong with an error: its type, that it comes from elsewhere, or that it names nothing of these."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).lower().split())
    clean = isinstance(error, (ValueError, TypeError, OSError)) and not isinstance(error, TimeoutError)
    if not clean and type(error) not in (ArithmeticError, NonFiniteLoss):
        return f"{type(error).__name__} from {Path(last.filename).name}:{last.lineno}: {said[:150]}"
    if "site-packages" in last.filename:
        return f"from {last.filename.removeprefix(PACKAGE)}:{last.lineno}: {said[:150]}"
    if not any(word.lower() in said for word in words):
        return f"names no {words[0]}: {said[:150]}"
    return ""


@pytest.fixture
def catalogue(request):
    """A new :class:`Catalogue`; the test fails if there are faults in it at the end."""
    found = Catalogue()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    yield found
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    request.node.user_properties.append(("bad inputs", dict(found.tally)))
    assert found.tally["tried"]
    assert not found.faults, "\n".join(found.faults)


@pytest.fixture(scope="session")
def check_complete():
    """See that every public name of a package is called, or stands with a reason why it is not."""

    def check(package, calls, elsewhere):
        names = {*package.__all__}
        assert names - calls.keys() - elsewhere.keys() == set()
        assert elsewhere.keys() <= names - calls.keys()
        for name, call in calls.items():
            assert call.arguments.keys() <= inspect.signature(call.function).parameters.keys(), name

    return check


def pytest_terminal_summary(terminalreporter):
    """What came of it all, in a line at the end."""
    total: Counter[str] = Counter()
    for report in (each for reports in terminalreporter.stats.values() for each in reports):
        total.update(dict(getattr(report, "user_properties", ())).get("bad inputs", {}))
    if total:
        ends = ("tried", "refused cleanly", "accepted rightly", "accepted wrongly", "unclean")
        terminalreporter.write_line("bad inputs: " + ", ".join(f"{total[end]} {end}" for end in ends))
