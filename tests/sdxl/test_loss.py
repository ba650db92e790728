"""What is minimised, and which adapter: loss weights, noise offset, dropout, DoRA, rsLoRA, layers."""

import dataclasses
import json
import math

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from safetensors import safe_open

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.data import images
from flatlora_diffusion.data.images import Framing, find_samples
from flatlora_diffusion.data.latents import LatentCache
from flatlora_diffusion.output.names import KOHYA_NAME
from flatlora_diffusion.sdxl.base import load_base
from flatlora_diffusion.sdxl.encoding import PromptEmbeds, encode_images
from flatlora_diffusion.sdxl.loss import diffusion_losses, min_snr_weights
from flatlora_diffusion.train.callbacks import Callback
from tests.tiny import assert_equal, build_pipeline, global_rng_state, run, stop_after


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    """A slim one suffices here."""
    path = tmp_path_factory.mktemp("base") / "tiny-sdxl"
    build_pipeline(slim=True).save_pretrained(path)
    return path


class Fixed(torch.nn.Module):
    """A UNet that always predicts the same."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, noisy, timesteps, tokens, added_cond_kwargs, return_dict):
        return (self.prediction,)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_counts_an_error_of_the_image_min_snr_gamma_times(kind, gamma):
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    draw = torch.Generator().manual_seed(0)
    latents, noise, predicted = (torch.randn(4, 2, 4, 4, generator=draw) for _ in range(3))
    timesteps = torch.tensor([10, 200, 500, 990])
    prompts = PromptEmbeds(torch.zeros(4, 3, 5), torch.zeros(4, 6))
    losses = diffusion_losses(
        Fixed(predicted), scheduler, latents, noise, timesteps, prompts, torch.zeros(4, 6), snr_gamma=gamma
    )
    expected = []
    for i, timestep in enumerate(timesteps.tolist()):
        signal = scheduler.alphas_cumprod[timestep].double().item()
        snr = signal / (1 - signal)
        noisy = math.sqrt(signal) * latents[i] + math.sqrt(1 - signal) * noise[i]
        if kind == "epsilon":
            image = (noisy - math.sqrt(1 - signal) * predicted[i]) / math.sqrt(signal)
        else:
            image = math.sqrt(signal) * noisy - math.sqrt(1 - signal) * predicted[i]
        expected.append(min(snr, gamma) * (image - latents[i]).square().mean().item())
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_min_snr_is_finite_where_the_last_timestep_has_no_signal():
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
        weights = min_snr_weights(scheduler, torch.tensor([0, 999]), 5.0)
        assert weights.isfinite().all() and weights[1] == (1 if kind == "epsilon" else 0)


def test_noise_offset_adds_one_normal_a_channel_and_changes_nothing_else(config, base_path):
    vae = load_base(str(base_path)).vae
    samples = find_samples(images.Path(config.instance_data_dir), "a icon")
    plain, offset = (
        LatentCache(
            samples,
            lambda pixels: encode_images(vae, pixels),
            Framing(resolution=config.resolution),
            config.seed,
            1000,
            noise_offset=value,
        ).batch(range(400))
        for value in (0.0, 0.5)
    )
    for field in ("latents", "timesteps", "time_ids"):
        assert torch.equal(getattr(plain, field), getattr(offset, field))
    added = offset.noise - plain.noise
    assert (added - added.mean(dim=(2, 3), keepdim=True)).abs().max() < 1e-5
    shifts = added.mean(dim=(2, 3)) / 0.5
    assert shifts.std().item() == pytest.approx(1, abs=0.1)
    assert abs(shifts.mean().item()) < 0.1


def test_input_perturbation_is_shown_and_not_to_be_predicted(config, base_path):
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) (eps + gamma xi), and the target is eps."""
    vae = load_base(str(base_path)).vae
    samples = find_samples(images.Path(config.instance_data_dir), "a icon")
    framing = Framing(resolution=config.resolution)
    plain, perturbed = (
        LatentCache(samples, lambda x: encode_images(vae, x), framing, config.seed, 1000, perturbation=gamma)
        for gamma in (0.0, 0.1)
    )
    batch, own = plain.batch(range(200)), perturbed.batch(range(200))
    for field in ("latents", "noise", "timesteps", "time_ids"):
        assert torch.equal(getattr(batch, field), getattr(own, field))
    assert batch.perturbation is None and own.perturbation.std().item() == pytest.approx(0.1, rel=0.02)
    assert next(perturbed.fixed_batches([500])).perturbation is None, "held-out images are shown as they are"
    shown = []

    def unet(noisy, *_, **__):
        shown.append(noisy)
        return (torch.zeros_like(noisy),)

    scheduler = DDPMScheduler()
    prompts = PromptEmbeds(torch.zeros(200, 3, 5), torch.zeros(200, 6))
    losses = [
        diffusion_losses(
            unet, scheduler, b.latents, b.noise, b.timesteps, prompts, b.time_ids, perturbation=b.perturbation
        )
        for b in (batch, own)
    ]
    assert torch.equal(*losses)
    scale = (1 - scheduler.alphas_cumprod[own.timesteps]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(shown[1] - shown[0], scale * own.perturbation, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_stopped_run_with_input_perturbation_ends_in_the_same_bits(config, tmp_path):
    config = dataclasses.replace(config, ip_noise_gamma=0.1, max_train_steps=3)
    whole, again = run(config), {"output_dir": str(tmp_path / "again")}
    assert "| input perturbation | 0.1 |" in (tmp_path / "run" / "README.md").read_text()
    stop_after(config, 1, **again)
    assert_equal(whole, run(config, resume_from_checkpoint="latest", **again))
    plain = run(config, ip_noise_gamma=0.0, output_dir=str(tmp_path / "plain"))
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


@pytest.mark.slow
def test_dropout_is_a_function_of_the_step(config, tmp_path):
    config = dataclasses.replace(config, max_train_steps=4)
    state = global_rng_state()
    whole = run(config, lora_dropout=0.5)
    assert global_rng_state() == state
    plain = run(config, output_dir=str(tmp_path / "plain"))
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)
    with safe_open(tmp_path / "run" / WEIGHTS_NAME, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["unet.lora_dropout"] == 0.0, "whoever loads the adapter would draw with dropout"

    # Interrupted after two steps and resumed, with other draws from the global RNG in between.

    parts = str(tmp_path / "parts")
    stop_after(config, 2, lora_dropout=0.5, output_dir=parts)
    torch.rand(7)
    assert_equal(run(config, lora_dropout=0.5, output_dir=parts, resume_from_checkpoint="latest"), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"use_rslora": True}, {"lora_layers": ("ff.net.2",)}]
)
def test_other_adapters_load_as_they_were_trained(config, base_path, settings):
    kept = {}

    class Keep(Callback):
        def on_train_end(self, run):
            kept.update(run.models)

    tensors = run(config, learning_rate=1e-2, max_train_steps=2, callbacks=[Keep()], **settings)
    unet = kept["unet"].eval()
    assert any("magnitude" in name for name in tensors) == settings.get("use_dora", False)
    for layer in settings.get("lora_layers", ()):
        assert any(f".{layer}." in name for name in tensors)
    pipeline = StableDiffusionXLPipeline.from_pretrained(base_path, use_safetensors=True)
    plain = {name: parameter.clone() for name, parameter in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(config.output_dir)
    draw = torch.Generator().manual_seed(0)
    width = pipeline.unet.config.cross_attention_dim
    inputs = (torch.randn(1, 4, 8, 8, generator=draw), torch.tensor([300]))
    tokens = torch.randn(1, 5, width, generator=draw)
    pooled = torch.randn(1, pipeline.text_encoder_2.config.projection_dim, generator=draw)
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]])}
    with torch.no_grad():
        expected = unet(*inputs, tokens, added_cond_kwargs=conditions).sample
        actual = pipeline.unet(*inputs, tokens, added_cond_kwargs=conditions).sample
        pipeline.unload_lora_weights()
        without = pipeline.unet(*inputs, tokens, added_cond_kwargs=conditions).sample
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, without)
    assert plain.keys() == pipeline.unet.state_dict().keys()


@pytest.mark.slow
def test_the_kohya_file_draws_the_same(config, base_path):
    settings = {"output_kohya_format": True, "train_text_encoder": True, "lora_alpha": 2.0}
    run(config, max_train_steps=3, learning_rate=1e-2, text_encoder_lr=1e-2, **settings)
    pictures = []
    for name in (None, WEIGHTS_NAME, KOHYA_NAME):
        pipeline = StableDiffusionXLPipeline.from_pretrained(base_path, use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        if name:
            pipeline.load_lora_weights(config.output_dir, weight_name=name)
        generator = torch.Generator().manual_seed(0)
        settings = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
        pictures.append(pipeline("a icon", generator=generator, **settings).images)
    base, ours, kohya = pictures
    torch.testing.assert_close(kohya, ours, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 1e-2


@pytest.mark.slow
def test_rslora_scales_by_the_root_of_the_rank(config):
    run(config, use_rslora=True, rank=4, lora_alpha=8.0, max_train_steps=1)
    with safe_open(f"{config.output_dir}/{WEIGHTS_NAME}", framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.use_rslora"] is True and metadata["unet.lora_alpha"] == 8.0


@pytest.mark.slow
def test_a_layer_that_does_not_exist_is_named(config):
    with pytest.raises(UserError, match=r"--lora_layers to_z: .* to_q"):
        run(config, lora_layers=("to_q", "to_z"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr_gamma": 0.0}, "--snr_gamma 0.0: must be greater than 0"),
        ({"ip_noise_gamma": -0.1}, "--ip_noise_gamma -0.1: must be 0 or more"),
        ({"noise_offset": -1.0}, "--noise_offset -1.0: must be 0 or more"),
        ({"lora_dropout": 1.0}, r"--lora_dropout 1.0: must be in \[0, 1\)"),
    ],
)
def test_values_out_of_range_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes)
