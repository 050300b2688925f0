"""The base of objectives with critics: it builds them, trains them beside the program, and keeps the two apart."""

from collections.abc import Callable
from itertools import count
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor, nn

from pyrogen.inference.contrasts import Contrast
from pyrogen.inference.draws import Draws
from pyrogen.inference.guides import AmortizedGuide, stand_in_batch
from pyrogen.inference.objectives import Estimate, Objective, ObjectiveModule
from pyrogen.inference.programs import bare_program, make_example, rehearsal
from pyrogen.inference.terms import frozen
from pyrogen.inference.watch import PREFIX

__all__ = ["CriticObjective"]

_NUMBER = count()


class CriticObjective(Objective):
    """Base of the objectives with critics.

    The critics fit the sites that they look at, so they are built at the first batch, or by :meth:`prepare`;
    :attr:`critics` then names them, for those who want an optimizer of their own for them.
    """

    validates_as: ClassVar[str | None] = "validation_estimate"

    def __init__(self, particles: int = 1, *, observations: int | None = None) -> None:
        super().__init__(particles, observations=observations)
        self._prepared_for: tuple[int, ...] | None = None
        self._name = f"critics {next(_NUMBER)}"  # Pyro's parameter store is global, and critics never shared

    def __call__(self, model: Callable, guide: Callable | None) -> ObjectiveModule:  # type: ignore[override]
        """The objective as a module.

        Raises:
            ValueError: If the shapes for the critics can't be read off the programs; call :meth:`prepare` first.
        """
        if self._prepared_for is None:
            if isinstance(guide, AmortizedGuide) and guide.example is not None:
                batch = make_example(guide.example)
            else:
                try:
                    batch, _ = stand_in_batch(model)
                except ValueError as error:
                    raise ValueError(
                        f"the shapes for the critics can't be read off the model ({error}); call "
                        "objective.prepare(model, guide, *batch) with a batch first"
                    ) from error
            self.prepare(model, guide, *batch)
        return ObjectiveModule(model, guide, self)

    def prepare(self, model: Callable, guide: Callable | None, *batch: Tensor) -> None:
        """Build the critics for the programs, once, from a run on a batch; only the first two rows of it are used.

        Critics that are there already are kept where they fit the programs, also other ones than they were built for.

        Raises:
            ValueError: If the objective can't serve these programs, or a critic does not fit what it looks at; if
                critics are there and were built for programs with other sites.
        """
        programs = tuple(id(bare_program(program)) for program in (model, guide))
        if self._prepared_for == programs:
            return
        self.check_guide(guide)
        rows = tuple(x[:2] for x in batch)
        with rehearsal(model, guide):
            draws = Draws(model, guide if self.uses_guide else None, rows, self.particles)
            contrasts = self.contrasts(draws)
            if self._prepared_for is None:
                for name, contrast in contrasts.items():
                    self.critics[name] = contrast.to(draws.like)
                    _check_contrast(name, contrast, draws)
            elif _shapes(nn.ModuleDict(contrasts)) != _shapes(self.critics):
                raise ValueError(
                    f"this {type(self).__name__} has critics that were built for programs with other sites: "
                    f"{_sizes(self.critics)}, where {_sizes(contrasts)} are needed now; use a new one"
                )
            else:
                self.critics.to(draws.like)
            self.of_program(draws)  # so that what this can't serve is found before training
        self._prepared_for = programs

    def check_guide(self, guide: Callable | None) -> None:
        """Raise a ``ValueError`` for a guide too many or one too few."""
        super().check_guide(guide)
        if guide is None and self.uses_guide:
            raise ValueError(
                f"{type(self).__name__} teaches a guide beside the model, but guide is None; pass one, "
                "such as AmortizedGuide(model, encoder), or train the model alone with GAN()"
            )

    def contrasts(self, draws: Draws) -> dict[str, Contrast]:
        """The critics that these programs need, by name."""
        raise NotImplementedError(f"{type(self).__name__} must say what its critics contrast")

    def of_program(self, draws: Draws) -> Estimate:
        """What the program minimises; the critics' weights are held."""
        raise NotImplementedError(f"{type(self).__name__} must say what the program minimises")

    def of_critics(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """What the critics minimise, and the figures to be logged."""
        contrasts: Any = self.critics.items()
        if not contrasts:
            return torch.zeros((), device=draws.rows[0].device), {}
        losses, metrics = [], dict[str, Tensor]()
        for name, contrast in contrasts:
            loss, accuracies = contrast.loss_and_accuracies(draws)
            losses.append(loss)
            metrics |= {f"{PREFIX}{name}{which}": accuracy for which, accuracy in accuracies.items()}
        total = torch.stack(losses).sum()
        return total, {"critic_loss": total.detach()} | metrics

    def estimate(self, model: Callable, guide: Callable | None, *batch: Tensor) -> Estimate:
        self.prepare(model, guide, *batch)
        draws = Draws(model, guide if self.uses_guide else None, batch, self.particles)
        with frozen([*self.critics.parameters()]):
            program = self.of_program(draws)
        if not torch.is_grad_enabled():
            return program
        self.step += 1
        critic, metrics = self.of_critics(draws)
        return Estimate(program.loss + critic, program.metrics | metrics, program.terms, program.loss.detach())

    def critic_loss(self, model: Callable, guide: Callable | None, *batch: Tensor) -> Tensor:
        """What the critics minimise, for steps of theirs alone."""
        self.prepare(model, guide, *batch)
        with torch.no_grad():
            draws = Draws(model, guide if self.uses_guide else None, batch, self.particles)
        return self.of_critics(draws)[0]

    def differentiable_loss(self, model: Callable, guide: Callable | None, *batch: Tensor) -> Tensor:
        loss = super().differentiable_loss(model, guide, *batch)
        pyro.module(self._name, self.critics)  # so that SVI's optimizer sees them
        return loss


def _shapes(critics: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in critics.state_dict().items()}


def _sizes(critics: Any) -> str:
    sizes = (f"'{name}' of {sum(p.numel() for p in part.parameters())} weights" for name, part in critics.items())
    return ", ".join(sizes) or "none"


def _check_contrast(name: str, contrast: Any, draws: Draws) -> None:
    """Run a contrast once, so that a critic of a wrong shape is found before training."""
    try:
        loss, _ = contrast.loss_and_accuracies(draws)
    except (NotImplementedError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(
            f"the critic of '{name}' does not fit what it looks at ({error}); it is called as critic(z, context) and "
            "returns one number for each draw"
        ) from error
    if loss.dim():
        raise ValueError(f"the loss of the critic of '{name}' has shape {tuple(loss.shape)}, expected one number")
