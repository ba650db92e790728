"""Training under the table's noise ends where training under fresh normals ends."""

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flatlora_diffusion import FlatLoRA

WIDTH, SAMPLES, STEPS, SEEDS = 64, 64, 150, 10
SIGMA = 0.5


def final_loss(seed, noise, sigma, *, stepping=True):
    """Loss without noise of an adapter trained to fit random targets; all else follows from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        model.insert(1, nn.GELU()).insert(3, nn.GELU()).requires_grad_(False)
        inputs, targets = torch.randn(2, SAMPLES, WIDTH)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"]), model)
    for layer in (model[0], model[2], model[4]):
        layer.get_base_layer().weight.mul_(2)  # a layer's outputs, and so the noise's effect, of order one
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    # The decay lets the loss settle, so that it is the noise's mean effect that shows.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    flat = FlatLoRA(model, sigma=sigma, total_steps=STEPS, schedule="constant", seed=seed, noise=noise)
    for _ in range(STEPS):
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if stepping:
            flat.step()
    with flat.paused(), torch.no_grad():
        return nn.functional.mse_loss(model(inputs), targets).item()


def losses(noise, sigma, **settings):
    return torch.tensor([final_loss(seed, noise, sigma, **settings) for seed in range(SEEDS)])


def mean_and_standard_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.slow
def test_table_and_gaussian_noise_train_alike():
    gaussian, table = losses("gaussian", SIGMA), losses("table", SIGMA)
    difference, error = mean_and_standard_error(table - gaussian)
    assert abs(difference) <= 3 * error

    # What the comparison could tell apart: a twentieth of the noise's own effect ...
    effect, effect_error = mean_and_standard_error(gaussian - losses("gaussian", 0.0))
    assert effect > 10 * effect_error
    assert error < effect / 20
    # ... and a source that gives the same noise at every step.
    repeated, repeated_error = mean_and_standard_error(losses("table", SIGMA, stepping=False) - gaussian)
    assert repeated > 3 * max(repeated_error, error)
