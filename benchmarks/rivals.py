"""Other ways to generalise, as training runs to measure Flat-LoRA against: SAM, twice, Bi-LoRA and T-LoRA.

All of them train plain LoRA (`flat_sigma` is 0) with the data order, timesteps and noise of every other run
of the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers.utils import delete_adapter_layers
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from benchmarks.sam import ascended, base_weights, given_gradients, lora_layers
from benchmarks.t_lora import TLora
from flatlora_diffusion.common.seeds import hash64
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.sdxl.lora import ADAPTER
from flatlora_diffusion.train import arms
from flatlora_diffusion.train.callbacks import Callback, TrainingRun

AUXILIARY = "auxiliary"


def train(config: TrainConfig, rival: str, rho: float) -> None:
    """Train as `flatlora_diffusion.train.train` does, by a rival.

    Args:
        config: Settings of the run; its `flat_sigma` is 0.
        rival: `sam` (on the merged weights), `lora-sam` (on A and B), `bi-lora` or `t-lora`.
        rho: The rival's radius; for T-LoRA the least rank as a share of the whole, in the paper 0.5.
    """
    callbacks = {
        "sam": Sam(rho, on_merged=True),
        "lora-sam": Sam(rho, on_merged=False),
        "bi-lora": BiLora(rho),
        "t-lora": TLora(rho),
    }
    arms.train(config, callbacks=[callbacks[rival]])


class Sam(Callback):
    """SAM: each step descends by the gradient that it finds after a step of length `rho` upwards.

    Args:
        rho: Length of the step upwards, over all perturbed tensors together.
        on_merged: Whether the merged weights are moved, as in table 6 of the Flat-LoRA paper, or A and B.
    """

    def __init__(self, rho: float, *, on_merged: bool) -> None:
        self.rho = rho
        self.on_merged = on_merged

    def backward(self, run: TrainingRun, compute: Callable[[], Tensor]) -> Tensor:
        """Leave the gradients of the ascended weights; their loss."""
        models = run.models.values()
        trained = [p for model in models for p in model.parameters() if p.requires_grad]
        perturbed = base_weights(models) if self.on_merged else trained
        with given_gradients(perturbed):
            compute()
        with ascended(perturbed, self.rho):
            for parameter in trained:
                parameter.grad = None
            return compute()


class BiLora(Callback):
    """Bi-LoRA (arXiv 2508.19564): a second adapter climbs while the first descends, on one gradient.

    The merged weight in training is `W + s*B1@A1 + s*B2@A2`. The second adapter, of the same rank, is updated
    by AdamW with the sign of the gradient turned, at the same learning rate; then, where
    `c = sqrt(sum over layers ||s*B2@A2||^2)` exceeds `rho`, all its A2 and B2 are scaled by `sqrt(rho / c)`.
    It is dropped at the end. The optimizer of the second adapter is our choice.

    Args:
        rho: Radius of the ball in which the second adapter stays.
    """

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def on_train_begin(self, run: TrainingRun) -> None:
        """Add the second adapter."""
        for name, model in run.models.items():
            add_auxiliary(model, hash64(run.config.seed, AUXILIARY, name))
        auxiliary = [
            p for model in run.models.values() for n, p in model.named_parameters() if f".{AUXILIARY}." in n
        ]
        self.ascent = torch.optim.AdamW(
            auxiliary, lr=run.config.learning_rate, weight_decay=0.0, maximize=True
        )

    def on_step_end(self, run: TrainingRun) -> None:
        """Update the second adapter by the gradient that has updated the first."""
        self.ascent.step()
        self.ascent.zero_grad()
        keep_in_ball(lora_layers(run.models.values()), self.rho)

    def on_train_end(self, run: TrainingRun) -> None:
        """Drop the second adapter."""
        for model in run.models.values():
            delete_adapter_layers(model, AUXILIARY)  # for models of diffusers and of transformers


def add_auxiliary(model: nn.Module, seed: int) -> None:
    """Add a second adapter like the first, with B = 0, and make both active and trained."""
    own = model.peft_config[ADAPTER]
    config = LoraConfig(
        r=own.r,
        lora_alpha=own.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=own.target_modules,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.add_adapter(config, adapter_name=AUXILIARY)
    model.set_adapter([ADAPTER, AUXILIARY])
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name or f".{AUXILIARY}." in name:
            parameter.requires_grad_(True)


@torch.no_grad()
def keep_in_ball(layers: list[LoraLayer], rho: float) -> float:
    """Scale the auxiliary adapter so that its updates have at most the norm `rho`; their norm before."""
    factors = [(layer.lora_A[AUXILIARY].weight, layer.lora_B[AUXILIARY].weight) for layer in layers]
    squares = [
        ((b.flatten(1).T @ b.flatten(1)) * (a.flatten(1) @ a.flatten(1).T)).sum()
        * layer.scaling[AUXILIARY] ** 2
        for layer, (a, b) in zip(layers, factors, strict=True)
    ]
    norm = math.sqrt(max(0.0, float(sum(squares))))
    if norm > rho:
        for a, b in factors:
            a.mul_(math.sqrt(rho / norm))
            b.mul_(math.sqrt(rho / norm))
    return norm
