"""Training under the table's noise ends where training under fresh normals ends."""

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flatlora_diffusion import FlatLoRA

WIDTH, SAMPLES, STEPS, SEEDS = 64, 64, 75, 10
LAST = 15  # steps
SIGMA = 0.5
CLEAN, NOISY = range(2)


def final_losses(seed, noise, sigma, *, stepping=True):
    """Of an adapter that is trained to fit random targets: the loss without noise, and the last ones with it.

    All else follows from `seed`.
    """
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
    noisy = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(inputs), targets)
        noisy.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if stepping:
            flat.step()
    with flat.paused(), torch.no_grad():
        return nn.functional.mse_loss(model(inputs), targets).item(), sum(noisy[-LAST:]) / LAST


def losses(noise, sigma, **settings):
    """Both losses, (CLEAN, NOISY), of SEEDS trainings."""
    return torch.tensor([final_losses(seed, noise, sigma, **settings) for seed in range(SEEDS)]).T


def mean_and_standard_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.slow
def test_table_and_gaussian_noise_train_alike():
    gaussian, table, without = losses("gaussian", SIGMA), losses("table", SIGMA), losses("gaussian", 0.0)
    for kind in (CLEAN, NOISY):
        difference, error = mean_and_standard_error((table - gaussian)[kind])
        effect, effect_error = mean_and_standard_error((gaussian - without)[kind])
        assert effect > 10 * effect_error
        assert abs(difference) + 3 * error < effect / 20
    # A source that gives the same noise at every step would be told: that noise can be learnt.
    repeated = losses("table", SIGMA, stepping=False)
    difference, error = mean_and_standard_error((repeated - gaussian)[NOISY])
    assert difference < -5 * error
