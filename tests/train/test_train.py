"""The trainer against a reference written out by hand, and what it leaves on disk."""

import dataclasses
import json
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, read_facts
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data import images
from flatlora_diffusion.data.images import Framing, find_samples
from flatlora_diffusion.data.latents import LatentCache
from flatlora_diffusion.flat.flat_lora import FlatLoRA
from flatlora_diffusion.sdxl.base import load_base
from flatlora_diffusion.sdxl.encoding import encode_images, encode_prompts
from flatlora_diffusion.sdxl.lora import add_lora
from flatlora_diffusion.train import arms, learner
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback
from flatlora_diffusion.train.learner import Learner
from tests.tiny import assert_equal, global_rng_state, run


def reference_training(config: TrainConfig, base_path) -> dict[str, torch.Tensor]:
    """The same run without accelerate, caches of prompts, or hooks: noise is added to the real weights."""
    base = load_base(str(base_path))
    samples = find_samples(images.Path(config.instance_data_dir), config.instance_prompt)
    framing = Framing(resolution=config.resolution)
    cache = LatentCache(samples, lambda pixels: encode_images(base.vae, pixels), framing, config.seed, 1000)
    add_lora({"unet": base.unet}, rank=config.rank, alpha=config.alpha, seed=config.seed)
    flat = FlatLoRA(base.unet, sigma=config.flat_sigma, total_steps=config.max_train_steps, seed=config.seed)
    base.unet.train()
    parameters = [p for p in base.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    scheduler = DDPMScheduler.from_pretrained(base_path, subfolder="scheduler")
    for step in range(config.max_train_steps):
        batch = cache.batch(range(step * config.train_batch_size, (step + 1) * config.train_batch_size))
        embeds = encode_prompts(base.tokenizers, base.text_encoders, batch.captions)
        weights = {name: layer.get_base_layer().weight for name, layer in flat.layers.items()}
        originals = {name: weight.detach().clone() for name, weight in weights.items()}
        epsilons = {name: flat.epsilon(name) for name in weights}
        with flat.paused():
            for name, weight in weights.items():
                weight.data += epsilons[name]
            noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
            predicted = base.unet(
                noisy,
                batch.timesteps,
                embeds.tokens,
                added_cond_kwargs={"text_embeds": embeds.pooled, "time_ids": batch.time_ids},
            ).sample
            loss = (predicted - batch.noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for name, weight in weights.items():
                weight.data.copy_(originals[name])
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        flat.step()
    return {name: p.detach() for name, p in base.unet.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_the_trained_adapter_is_that_of_a_plain_reference_loop(config, base_path, sigma):
    config = dataclasses.replace(
        config, flat_sigma=sigma, max_train_steps=3
    )  # an epoch, and a step of another
    trained = run(config)
    reference = reference_training(config, base_path)
    assert len(trained) == len(reference)
    for name, tensor in reference.items():
        saved = f"unet.{name}".replace("lora_A.default", "lora.down").replace("lora_B.default", "lora.up")
        # Adam divides by the gradient's size, so rounding shows more than in a single forward pass.
        error = (trained[saved] - tensor).norm() / tensor.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.slow
def test_reruns_are_equal_and_no_noise_and_gaussian_noise_differ(config, tmp_path):
    config = dataclasses.replace(config, flat_sigma=0.5, max_train_steps=3)
    flat = run(config)
    again = run(config, output_dir=str(tmp_path / "again"))
    assert_equal(flat, again)
    plain = run(config, flat_sigma=0.0, output_dir=str(tmp_path / "plain"))
    assert any(not torch.equal(flat[name], plain[name]) for name in flat)
    gaussian = run(config, flat_noise="gaussian", output_dir=str(tmp_path / "gaussian"))
    assert any(not torch.equal(flat[name], gaussian[name]) for name in flat)


@pytest.mark.slow
def test_accumulation_splits_a_batch_without_changing_it(config, tmp_path):
    config = dataclasses.replace(config, max_train_steps=3)
    whole = run(config, train_batch_size=4)
    parts = run(config, train_batch_size=2, gradient_accumulation_steps=2, output_dir=str(tmp_path / "parts"))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    config = dataclasses.replace(config, train_text_encoder=True, max_train_steps=3)
    plain = run(config)
    checkpointed = run(config, gradient_checkpointing=True, output_dir=str(tmp_path / "other"))
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compare_trains_both_from_the_same_start_on_the_same_samples(config, monkeypatch):
    seen = {}
    original = Learner.loss

    def spy(self, micro_step):
        arm = seen.setdefault(self.config.flat_sigma, {"start": None, "batches": []})
        if arm["start"] is None:
            parameters = self.base.unet.named_parameters()
            arm["start"] = {name: p.detach().clone() for name, p in parameters if p.requires_grad}
        first = micro_step * self.config.train_batch_size
        arm["batches"].append(self.latents.batch(range(first, first + self.config.train_batch_size)))
        return original(self, micro_step)

    monkeypatch.setattr(Learner, "loss", spy)
    train(
        dataclasses.replace(
            config,
            compare=True,
            max_train_steps=3,
            flat_sigma=0.4,
            validation_prompt=("a red icon", "a blue icon"),
            num_validation_images=1,
            validation_inference_steps=2,
            validation_sampler="default",
            validation_epochs=100,
        )
    )
    plain, flat = seen[0.0], seen[0.4]
    assert_equal(plain["start"], flat["start"])
    for one, other in zip(plain["batches"], flat["batches"], strict=True):
        assert one.captions == other.captions
        for field in ("latents", "noise", "timesteps", "time_ids"):
            assert torch.equal(getattr(one, field), getattr(other, field))
    output = images.Path(config.output_dir)
    assert Image.open(output / "comparison.png").size > (400, 400)
    for arm in ("lora", "flat_lora"):
        assert "](../comparison.png)" in (output / arm / "README.md").read_text()
    manifest = json.loads((output / "comparison" / "manifest.json").read_text())
    assert manifest["columns"] == ["base", "LoRA", "Flat-LoRA"]
    assert [row["label"] for row in manifest["rows"]] == ["a red icon", "a blue icon"]
    assert manifest["footer"].endswith("; seed 3")
    facts = {name: read_facts(output / name / WEIGHTS_NAME) for name in ("lora", "flat_lora")}
    assert facts["lora"]["method"] == "LoRA" and facts["lora"]["flat_sigma"] == 0
    assert facts["flat_lora"]["method"] == "Flat-LoRA" and facts["flat_lora"]["flat_sigma"] == 0.4
    assert_same_pictures_as_by_hand(config, output)


def assert_same_pictures_as_by_hand(config, output):
    """The columns are what any user gets who loads the files into a pipeline of diffusers."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        config.pretrained_model_name_or_path, use_safetensors=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    for column in ("base", "lora", "flat_lora"):
        if column != "base":
            pipeline.load_lora_weights(output / column, weight_name=WEIGHTS_NAME)
        by_hand = pipeline(
            "a blue icon",
            height=16,
            width=16,
            num_inference_steps=2,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(config.seed),
        ).images[0]
        pipeline.unload_lora_weights()
        ours = Image.open(output / "comparison" / f"a_blue_icon-seed3-{column}.png")
        assert by_hand.tobytes() == ours.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("text_encoders", [False, True], ids=["unet", "with text encoders"])
def test_the_saved_file_gives_the_outputs_of_the_trained_model(config, base_path, text_encoders):
    kept = {}

    class Keep(Callback):
        def on_train_end(self, run):
            kept.update(run.models)

    run(
        config,
        callbacks=[Keep()],
        train_text_encoder=text_encoders,
        text_encoder_lr=1e-2,
        learning_rate=1e-2,
        lora_alpha=10.0,
        train_batch_size=1,
        max_train_steps=2,
    )
    unet, *text_models = [model.eval() for model in kept.values()]
    pipeline = StableDiffusionXLPipeline.from_pretrained(base_path, use_safetensors=True)
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
    plain = encode_prompts(tokenizers, (pipeline.text_encoder, pipeline.text_encoder_2), ["a icon"])
    pipeline.load_lora_weights(config.output_dir)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    loaded = encode_prompts(tokenizers, encoders, ["a icon"])
    if text_encoders:
        trained = encode_prompts(tokenizers, text_models, ["a icon"])
        assert torch.equal(trained.tokens, loaded.tokens) and torch.equal(trained.pooled, loaded.pooled)
        assert not torch.equal(plain.tokens, loaded.tokens)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([300]), loaded.tokens)
    conditions = {"text_embeds": loaded.pooled, "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]])}
    with torch.no_grad():
        expected = unet(*inputs, added_cond_kwargs=conditions).sample
        actual = pipeline.unet(*inputs, added_cond_kwargs=conditions).sample
    assert torch.equal(actual, expected)
    assert pipeline.unet.peft_config["default_0"].lora_alpha == 10.0


@pytest.mark.slow
def test_lora_parameters_are_float32_whatever_the_base_is(config):
    dtypes = {}

    class Look(Callback):
        def on_train_end(self, run):
            for name, parameter in run.models["unet"].named_parameters():
                dtypes.setdefault("lora" if "lora_" in name else "base", set()).add(parameter.dtype)

    tensors = run(config, mixed_precision="bf16", max_train_steps=1, callbacks=[Look()])
    assert dtypes == {"lora": {torch.float32}, "base": {torch.bfloat16}}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.slow
def test_training_leaves_the_global_rng_alone(config):
    state = global_rng_state()
    run(config, train_text_encoder=True, max_train_steps=2)
    assert global_rng_state() == state


@pytest.mark.slow
def test_summary_and_facts_tell_the_run(config):
    run(config, flat_sigma=0.25, checkpointing_steps=4)
    output = images.Path(config.output_dir)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == len(summary["losses"]) == 6
    assert summary["settings"]["flat_sigma"] == 0.25
    assert summary["median_seconds_a_step"] > 0 and summary["peak_memory_bytes"] > 1e7
    facts = read_facts(output / WEIGHTS_NAME)
    assert facts["rank"] == 4 and facts["alpha"] == 4 and facts["steps"] == 6 and facts["seed"] == 3
    assert facts["targets"] == {"unet": ["to_k", "to_out.0", "to_q", "to_v"]}
    assert facts["versions"]["torch"] == torch.__version__
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-4"]


@pytest.mark.slow
def test_validation_pictures_are_drawn_without_noise_and_reported(config):
    run(
        config,
        flat_sigma=5.0,
        flat_schedule="constant",
        learning_rate=0.0,
        max_train_steps=4,
        validation_prompt=("a red icon",),
        num_validation_images=2,
        validation_inference_steps=2,
        validation_epochs=1,
        report_to="tensorboard",
    )
    output = images.Path(config.output_dir)
    strips = sorted(output.glob("validation/*.png"))
    assert [strip.name for strip in strips] == ["step-000002.png", "step-000004.png"]
    # With a learning rate of 0 the adapter stays what it was: only the noise could tell the steps apart.
    for name in ("000-seed3.png", "000-seed4.png"):
        early, late = (strip.with_suffix("") / name for strip in strips)
        assert early.read_bytes() == late.read_bytes()
    assert list(output.glob("logs/**/events.out.tfevents*"))


@pytest.mark.slow
def test_an_own_vae_encodes_in_float32_as_in_the_diffusers_script(config, base_path, monkeypatch):
    seen, original = set(), learner.encode_images

    def look(vae, pixels):
        seen.add(vae.dtype)
        return original(vae, pixels)

    monkeypatch.setattr(learner, "encode_images", look)
    vae = AutoencoderKL.from_pretrained(base_path, subfolder="vae")
    vae.register_to_config(force_upcast=False)
    vae.save_pretrained(Path(config.output_dir, "vae"))
    own = {"pretrained_vae_model_name_or_path": f"{config.output_dir}/vae"}
    run(config, mixed_precision="bf16", max_train_steps=1, **own)
    assert seen == {torch.float32}


@pytest.mark.slow
def test_a_resolution_that_is_no_multiple_of_8(config):
    """As in the diffusers script the VAE leaves out what doesn't make a whole latent."""
    shown = []

    class Look(Callback):
        def loss(self, run, compute):
            hook = run.models["unet"].register_forward_pre_hook(
                lambda unet, arguments, settings: shown.append(
                    (arguments[0].shape, settings["added_cond_kwargs"]["time_ids"][0, 4:].tolist())
                ),
                with_kwargs=True,
            )
            try:
                return compute()
            finally:
                hook.remove()

    run(config, [Look()], resolution=25, max_train_steps=1)
    assert shown == [((2, 4, 12, 12), [25, 25])]


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "told"), [(2, False), (3, True)])
def test_a_last_step_that_is_filled_is_told(config, caplog, batch, told):
    caplog.set_level("INFO")
    run(config, train_batch_size=batch, max_train_steps=1)
    line = (
        "an epoch is 2 steps of 3 samples: the images fill the last one to 1, and the next epoch's the rest"
    )
    assert any(message.startswith(line) for message in caplog.messages) == told


@pytest.mark.slow
def test_pytorch_is_asked_for_determinism_while_a_run_lasts(config, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    asked = []

    class Look(Callback):
        def on_step_end(self, run):
            asked.append(torch.are_deterministic_algorithms_enabled())

    for wanted in (True, False):
        run(config, [Look()], deterministic=wanted, max_train_steps=1)
        assert not torch.are_deterministic_algorithms_enabled()
    assert asked == [True, False]


@pytest.mark.slow
def test_the_models_of_a_run_are_gone_when_pictures_are_drawn_after_it(config, monkeypatch):
    """Those that draw the comparison need their room."""
    trained, left = [], []

    class Look(Callback):
        def on_train_end(self, run):
            trained.extend(map(weakref.ref, run.models.values()))

    monkeypatch.setattr(arms, "present", lambda *_: left.extend(ref() is not None for ref in trained))
    run(config, [Look()], train_text_encoder=True, max_train_steps=1)
    assert left == [False, False, False]


def test_memory_that_runs_out_before_the_first_step_is_told(config, monkeypatch):
    def too_large(*arguments, **settings):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(learner, "encode_images", too_large)
    with pytest.raises(
        UserError, match=r"^out of memory before the first step: try --mixed_precision bf16, "
    ):
        train(config)
