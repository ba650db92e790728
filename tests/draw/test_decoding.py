"""What decodes latents, and in which precision: SDXL's own VAE overflows in half precision."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from flatlora_diffusion.draw import pipeline as draw_pipeline
from flatlora_diffusion.draw.decoding import decode, why_black
from flatlora_diffusion.draw.pipeline import Drawing, draw, load_pipeline
from flatlora_diffusion.grid.command import main
from tests.tiny import build_pipeline, run

DRAWING = Drawing(16, 16, steps=2, guidance=3.0)


@pytest.fixture
def told(caplog):
    """What this package has logged so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("flatlora_diffusion")]


def latents_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "settings", [{}, {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.1, 0.9, 1.2, 0.8]}]
)
def test_a_picture_is_that_of_the_pipeline(settings):
    pipeline = build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.register_to_config(**settings)
    ours = draw(pipeline, 3, DRAWING, prompt="a icon")
    theirs = pipeline(
        "a icon",
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert ours.tobytes() == theirs.tobytes()


def test_where_memory_runs_out_a_picture_is_decoded_in_tiles(monkeypatch, told):
    vae = build_pipeline().vae
    settings = {
        name: getattr(vae, name) for name in ("use_tiling", "tile_latent_min_size", "tile_sample_min_size")
    }
    vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = True, 4, 8
    expected = decode(vae, latents_of())
    vars(vae).update(settings)
    decoder, sides = vae.decoder.forward, []

    def small_ones(latents, *others):
        sides.append(latents.shape[-1])
        if latents.shape[-1] > 4:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return decoder(latents, *others)

    monkeypatch.setattr(vae.decoder, "forward", small_ones)
    pixels = decode(vae, latents_of())
    assert sides[0] == 8 and max(sides[1:]) == 4
    assert torch.equal(pixels, expected)
    assert told() == [
        "out of memory while a picture was decoded: it is decoded in tiles, whose seams may show a little"
    ]
    assert {name: getattr(vae, name) for name in settings} == settings


def test_autocast_does_not_reach_the_vae():
    vae = build_pipeline().vae
    expected = vae.decode(latents_of() / vae.config.scaling_factor).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decode(vae, latents_of()), expected)
        coarse = vae.decode(latents_of() / vae.config.scaling_factor).sample
    assert coarse.dtype == torch.bfloat16 or not torch.equal(coarse, expected), (
        "autocast changes nothing here"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asks", [True, False])
def test_a_vae_decodes_in_float32_where_it_asks_for_it(dtype, asks):
    vae = build_pipeline().vae.to(dtype)
    vae.register_to_config(force_upcast=asks)
    latents = latents_of().to(dtype)
    pixels = decode(vae, latents)
    assert vae.dtype == dtype
    reference = vae.float() if asks else vae
    with torch.no_grad():
        expected = reference.decode(latents.to(reference.dtype) / vae.config.scaling_factor).sample
    assert pixels.dtype == reference.dtype
    assert torch.equal(pixels, expected)


@pytest.mark.slow
def test_validation_in_bf16_decodes_in_float32(config, base_path, monkeypatch):
    seen = []

    def spy(vae, latents):
        seen.append((latents, torch.is_autocast_enabled("cpu"), decode(vae, latents)))
        return seen[-1][-1]

    monkeypatch.setattr(draw_pipeline, "decode", spy)
    drawn = {"validation_prompt": ("a red icon",), "num_validation_images": 2}
    short = {"validation_epochs": 1, "validation_inference_steps": 1, "max_train_steps": 2}
    run(config, mixed_precision="bf16", **drawn, **short)
    vae = AutoencoderKL.from_pretrained(base_path, subfolder="vae")
    during = [(latents, pixels) for latents, autocast, pixels in seen if autocast]
    assert len(during) == 2, "the validation pictures are those that are drawn under autocast"
    for latents, pixels in during:
        assert torch.equal(pixels, decode(vae, latents.float()))


@pytest.fixture
def overflowing_base(base_path, clean_copy):
    """A base whose VAE has numbers between its layers that float16 can't hold, as SDXL's has."""
    base = clean_copy(base_path, "overflowing")
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.weight"] *= 3e5
    save_file(weights, file, metadata={"format": "pt"})
    return base


def test_a_vae_that_float16_overflows_is_drawn_soundly(overflowing_base, told):
    half = draw(load_pipeline(str(overflowing_base), dtype=torch.float16), 3, DRAWING, prompt="a icon")
    full = draw(load_pipeline(str(overflowing_base)), 3, DRAWING, prompt="a icon")
    differences = [abs(a - b) for a, b in zip(half.tobytes(), full.tobytes(), strict=True)]
    assert max(differences) < 16, "the same picture but for the UNet's rounding"
    assert len(set(full.tobytes())) > 16
    assert told() == []


def test_a_vae_that_overflows_all_the_same_is_named(overflowing_base, told):
    pipeline = load_pipeline(str(overflowing_base), dtype=torch.float16)
    pipeline.vae.register_to_config(force_upcast=False)
    draw(pipeline, 3, DRAWING, name="a icon", **embeddings(pipeline))
    (line,) = told()
    assert line == (
        'the picture of "a icon" with seed 3 is black or damaged: the VAE overflowed in float16; use bf16 or '
        "fp32, or give another one (--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix)"
    )


def embeddings(pipeline):
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds")
    names += ("negative_pooled_prompt_embeds",)
    return dict(zip(names, pipeline.encode_prompt("a icon", device="cpu"), strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_picture_of_a_broken_base_is_named(base_path, adapters, clean_copy, tmp_path, told):
    base = clean_copy(base_path, "broken")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    flags = ["--adapter", f"mine={adapters['LoRA']}", "--prompt", "a icon", "--seed", "4", "7"]
    short = ["--resolution", "16", "--steps", "1", "--device", "cpu", "--output", str(tmp_path / "out")]
    main(["--base", str(base), *flags, *short])
    assert [line.split(":")[0] for line in told()] == [
        f'the picture of "a icon" with seed {seed} is black or damaged' for seed in (4, 7, 4, 7)
    ]
    assert all("denoising in float32 gave numbers that are not finite" in line for line in told())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_why_a_picture_is_black(value):
    sound, broken = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    broken[0, 1, 1, 0] = value
    half, full = torch.float16, torch.float32
    assert why_black(sound, sound, half, half) is None
    assert why_black(broken, broken, half, full).endswith("use bf16 or fp32")
    assert "take an earlier checkpoint" in why_black(broken, broken, full, full)
    assert "the VAE overflowed in float16" in why_black(sound, broken, full, half)


def test_the_command_line_takes_another_vae(base_path, clean_copy, tmp_path):
    other = clean_copy(base_path / "vae", "vae")
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 0.5
    save_file(weights, other / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    pictures = []
    for flags in ([], ["--pretrained_vae_model_name_or_path", str(other)]):
        output = tmp_path / f"out-{len(pictures)}"
        short = ["--resolution", "16", "--steps", "1", "--device", "cpu", "--output", str(output)]
        main(["--base", str(base_path), "--prompt", "a icon", *short, *flags])
        pictures.append((output / "a_icon-seed0-base.png").read_bytes())
    assert pictures[0] != pictures[1]
