"""A training ends where its loss is not finite, with the last weights that had a finite one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from cellprior.model._errors import DivergedError
from cellprior.model.learning._processes import sum_over_processes

# checks of the loss, each of which waits for the device; and at the first step of an epoch
STEPS_BETWEEN = 50

LR_ARGUMENT = 'plan_kwargs={{"lr": {lr}}}'  # how a method is told the learning rate


class FiniteLoss(pl.Callback):
    """Ends a training whose loss is not finite, and keeps the last weights that had a finite one.

    Each step adds its loss to a sum on the device, in which NaN and infinity stay. It is looked at every
    ``STEPS_BETWEEN`` steps and at the first of an epoch, before the weights move; if it is finite, the weights are
    copied. ``best`` holds the tensors of the best epoch so far, of whoever keeps them: rather these, if there are
    any.
    """

    def __init__(self, best: Mapping[str, Tensor]) -> None:
        self.best = best
        self.kept: dict[str, Tensor] = {}
        self.kept_step = self.n_epochs = self.step = 0
        self._sum: Tensor | None = None
        self._is_new = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The next step is looked at."""
        self._is_new = True

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note the loss of the weights as they are; look at it from time to time."""
        loss = loss.detach().float()
        self._sum = loss.clone() if self._sum is None else self._sum.add_(loss)
        if self._is_new or self.step % STEPS_BETWEEN == 0:
            self._look(trainer, pl_module)
            self._keep(pl_module)
        self._is_new = False
        self.step += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the loss of the steps that are left, and at the weights."""
        self._look(trainer, pl_module)
        if (name := not_finite(pl_module.module)) is not None:  # type: ignore[arg-type]
            raise self.error(trainer, pl_module, f"The weights {name} are not finite")
        self.n_epochs += 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the loss of held-out cells."""
        for name, value in trainer.callback_metrics.items():
            if name.endswith("validation_loss") and not torch.isfinite(value).all():
                raise self.error(trainer, pl_module, f"The loss of held-out cells was {float(value):g}")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Undo what a callback that saves has left, in whose middle this may be: scvi-tools reads it."""
        trainer._model.is_trained_ = False  # type: ignore[attr-defined]

    def _look(self, trainer: pl.Trainer, plan: pl.LightningModule) -> None:
        if self._sum is None:
            return
        total = float(sum_over_processes(self._sum))
        self._sum.zero_()
        if not math.isfinite(total):
            raise self.error(trainer, plan, "The loss of training cells was not finite")

    @torch.no_grad()
    def _keep(self, plan: pl.LightningModule) -> None:
        if not self.kept:
            self.kept = copies(plan.module)
        else:
            for name, parameter in _trained(plan.module):
                self.kept[name].copy_(parameter)
        self.kept_step = self.step

    def error(self, trainer: pl.Trainer, plan: pl.LightningModule, what: str) -> DivergedError:
        """What to raise, in words."""
        lr, argument = getattr(plan, "lr", math.nan), getattr(plan, "lr_argument", LR_ARGUMENT)
        kept = "the best epoch" if self.best else f"step {self.kept_step}"
        return DivergedError(
            f"{what} in epoch {trainer.current_epoch + 1}, with the learning rate {lr:g}: the training diverged, and "
            f"has ended. The model has the weights of {kept}, the last whose loss was finite, and history goes up to "
            f"there. Train again with a smaller learning rate: {argument.format(lr=f'{lr / 10:.2g}')}."
        )

    def restore(self, plan: pl.LightningModule) -> None:
        """Put back the weights of the best epoch, if there is one, or the last that had a finite loss."""
        put_back(plan.module, self.best or self.kept)


def copies(module: Any) -> dict[str, Tensor]:
    """The tensors that are trained, as they are now."""
    return {name: p.detach().clone() for name, p in _trained(module)}


@torch.no_grad()
def put_back(module: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a module tensors that it had."""
    for name, tensor in tensors.items():
        module.get_parameter(name).copy_(tensor)


def _trained(module: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def not_finite(module: torch.nn.Module) -> str | None:
    """Name of the first weights of a module that hold NaN or infinity."""
    tensors = {name: x for name, x in module.state_dict(keep_vars=True).items() if torch.is_floating_point(x)}
    with torch.no_grad():
        # one pass without a copy, and one wait for the device; a sum may overflow, so that each is then looked at
        sums = [x.detach().sum().float() for x in tensors.values()]
        if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
            return None
        return next((name for name, x in tensors.items() if not torch.isfinite(x.detach()).all()), None)


def refuse_not_finite(module: torch.nn.Module) -> None:
    """Refuse to read or keep weights of which some are not finite."""
    if (name := not_finite(module)) is not None:
        msg = (
            f"The weights {name} are not finite, as after a training that diverged: nothing can be embedded, "
            "predicted or saved with them. Load the weights anew, or train again with a smaller learning rate."
        )
        raise DivergedError(msg)
