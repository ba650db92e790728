"""Ways to take a training step, side by side in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from benchmarks.common import SIGMA
from benchmarks.inplace import InPlaceFlatLoRA
from benchmarks.sam import ascended, base_weights, given_gradients
from flatlora_diffusion import FlatLoRA


class PlainLoRA:
    """A step of plain LoRA; the other arms add to it.

    Args:
        model: Its parameters that require gradients are trained.
        perturbed: The part of it whose merged weights the other arms move.
    """

    def __init__(self, model: nn.Module, perturbed: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    def train_step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """Forward, backward, AdamW."""
        loss(self.model).backward()
        self.update()

    def update(self) -> None:
        """AdamW on the LoRA parameters."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class Flat(PlainLoRA):
    """This project's Flat-LoRA."""

    def __init__(self, model: nn.Module, perturbed: nn.Module, noise: str) -> None:
        super().__init__(model, perturbed)
        self.flat = FlatLoRA(perturbed, sigma=SIGMA, total_steps=1, schedule="constant", noise=noise)
        self.flat.epsilon(next(iter(self.flat.layers)))  # makes the table, once for all steps

    def train_step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """A step under this step's noise; then the next noise."""
        super().train_step(loss)
        self.flat.step()


class Unfused(Flat):
    """Flat-LoRA over PEFT's own layers, as it is where a layer cannot be computed as one operation."""

    def __init__(self, model: nn.Module, perturbed: nn.Module, noise: str) -> None:
        # A hook must be called, and so must the module that it hangs on.
        for layer in perturbed.modules():
            if isinstance(layer, LoraLayer):
                for factor in layer.lora_A.values():
                    factor.register_forward_pre_hook(lambda module, args: None)
        super().__init__(model, perturbed, noise)


class InPlace(PlainLoRA):
    """The published method."""

    def __init__(self, model: nn.Module, perturbed: nn.Module) -> None:
        super().__init__(model, perturbed)
        self.noise = InPlaceFlatLoRA(perturbed, SIGMA)

    def train_step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """A step between adding the noise to the weights and subtracting it."""
        self.noise.perturb()
        loss(self.model).backward()
        self.noise.restore()
        self.update()


class Sam(PlainLoRA):
    """Sharpness-aware minimisation on the merged weights."""

    rho = 0.05  # the usual one; it decides nothing about the cost

    def __init__(self, model: nn.Module, perturbed: nn.Module) -> None:
        super().__init__(model, perturbed)
        self.merged = base_weights([perturbed])

    def train_step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """Two passes: the second one gives the gradient of the adapter, from where the first one led."""
        with given_gradients(self.merged):
            loss(self.model).backward()
        self.optimizer.zero_grad()
        with ascended(self.merged, self.rho):
            loss(self.model).backward()
        self.update()


PLAIN = "plain LoRA"
FLAT = "Flat-LoRA, table"
UNFUSED = "Flat-LoRA, table, PEFT's layers"
IN_PLACE = "in place"
SAM = "SAM"
ARMS: dict[str, Callable[[nn.Module, nn.Module], PlainLoRA]] = {
    PLAIN: PlainLoRA,
    FLAT: lambda model, perturbed: Flat(model, perturbed, "table"),
    UNFUSED: lambda model, perturbed: Unfused(model, perturbed, "table"),
    "Flat-LoRA, gaussian": lambda model, perturbed: Flat(model, perturbed, "gaussian"),
    IN_PLACE: InPlace,
    SAM: Sam,
}


def copy_sharing_base(model: nn.Module) -> nn.Module:
    """A copy with LoRA parameters of its own and the same frozen weights."""
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in frozen})
