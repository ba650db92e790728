import pytest
import torch

from flatlora_diffusion.draw.pipeline import Drawing, draw_batch, load_pipeline
from flatlora_diffusion.draw.samplers import DEFAULT, SAMPLERS, sampler, sampler_name, tell_predictions

PICTURES = [("a icon", 5), ("a red icon", 6)]


@pytest.fixture(scope="module")
def pipeline(base_path):
    return load_pipeline(str(base_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_that_of_diffusers_and_tells_what_it_ends_in(pipeline, name):
    told = []
    drawing = Drawing(16, 16, 6, 3.0, sampler=name)
    ours = draw_batch(pipeline, None, PICTURES, drawing, on_step=lambda step, latents: told.append(latents))
    again = draw_batch(pipeline, None, PICTURES, drawing)
    assert [picture.tobytes() for picture in ours] == [picture.tobytes() for picture in again]
    own = pipeline.scheduler
    try:
        pipeline.scheduler = sampler(name, own)
        latents = pipeline(
            "a icon",
            height=16,
            width=16,
            num_inference_steps=6,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images
        picture = pipeline.image_processor.postprocess(
            pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.detach()
        )[0]
    finally:
        pipeline.scheduler = own
    assert picture.tobytes() == ours[0].tobytes()
    assert len(told) == 6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_with_a_model_that_knows_the_picture_every_step_tells_it(pipeline, name, prediction_type):
    own = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    scheduler = sampler(name, own)
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(2, 4, 8, 8, generator=generator)
    told = []
    tell_predictions(scheduler, told.append)
    scheduler.set_timesteps(8)
    latents = torch.randn(picture.shape, generator=generator) * scheduler.init_noise_sigma
    noise_seed = {} if name in ("DDIM", "UniPC") else {"generator": generator}
    for step, timestep in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(latents, timestep)
        # x_t = sqrt(a) x_0 + sqrt(1 - a) epsilon
        if hasattr(scheduler, "alphas_cumprod") and name == "DDIM":
            share = scheduler.alphas_cumprod[timestep]
        else:
            share = 1 / (1 + scheduler.sigmas[step] ** 2)
        epsilon = (inputs - share.sqrt() * picture) / (1 - share).sqrt()
        velocity = share.sqrt() * epsilon - (1 - share).sqrt() * picture
        output = epsilon if prediction_type == "epsilon" else velocity
        latents = scheduler.step(output, timestep, latents, **noise_seed, return_dict=False)[0]
        torch.testing.assert_close(told[-1], picture, atol=1e-3, rtol=1e-3)
    assert len(told) == 8


@pytest.mark.slow
def test_samplers_differ(pipeline):
    drawn = {
        draw_batch(pipeline, None, PICTURES[:1], Drawing(16, 16, 6, 3.0, sampler=name))[0].tobytes()
        for name in SAMPLERS
        if name != DEFAULT
    }
    assert len(drawn) == len(SAMPLERS) - 1


def test_names(pipeline):
    own = pipeline.scheduler
    assert sampler_name(DEFAULT, own) == "Euler"
    assert [sampler_name(name, own) for name in SAMPLERS[1:]] == list(SAMPLERS[1:])
    for name in SAMPLERS[1:]:
        assert sampler_name(DEFAULT, sampler(name, own)) == name
    with pytest.raises(ValueError, match=r"sampler 'Heun': must be one of default, Euler, Euler a, DPM"):
        sampler("Heun", own)
