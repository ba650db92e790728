"""Aspect buckets: their sizes, the images in them, and the batches."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data.buckets import MAX_RATIO, BatchSequence, bucket_sizes, nearest_size
from flatlora_diffusion.data.images import Framing, find_samples
from flatlora_diffusion.data.latents import LatentCache
from flatlora_diffusion.sdxl.encoding import Latents
from flatlora_diffusion.train.arms import train


@pytest.mark.parametrize(("resolution", "grid"), [(1024, 64), (512, 32), (64, 8), (16, 8)])
def test_sizes_are_on_the_grid_and_of_about_one_area(resolution, grid):
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % grid == width % grid == 0
        assert max(height, width) / min(height, width) <= MAX_RATIO
        assert resolution**2 - max(height, width) * grid < height * width <= resolution**2


def test_the_sizes_of_sdxl_are_among_those_at_1024():
    wanted = {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344)}
    assert wanted <= set(bucket_sizes(1024))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((100, 100), (1024, 1024)),
        ((1080, 1920), (768, 1344)),
        ((1920, 1080), (1344, 768)),
        ((3, 4), (896, 1152)),
    ],
)
def test_the_nearest_shape_is_taken(image, expected):
    assert nearest_size(image, bucket_sizes(1024)) == expected


def test_hardly_anything_is_cropped_at_1024():
    for percent in range(40, 251):
        image = (1000, 10 * percent)
        height, width = nearest_size(image, bucket_sizes(1024))
        scale = max(height / image[0], width / image[1])
        assert height * width / (image[0] * image[1] * scale**2) > 0.9, image


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("counts", [[23], [1, 22], [5, 1, 3], [1, 1, 1, 1, 1], [40, 2]])
def test_every_sample_comes_as_often_as_any_other(counts, batch_size):
    sequence = BatchSequence(counts, batch_size, seed=5)
    epochs = 6 * batch_size
    batches = epochs * sum(counts) // batch_size
    located = [sequence.locate(number) for number in range(batches)]
    streams = collections.defaultdict(list)
    for bucket, first in located:
        streams[bucket].append(first)
    for bucket, count in enumerate(counts):
        # Its batches take its stream in order without a gap, and in proportion to its size.
        assert streams[bucket] == [batch_size * i for i in range(len(streams[bucket]))]
        assert len(streams[bucket]) == epochs * count // batch_size
    assert located == [BatchSequence(counts, batch_size, seed=5).locate(n) for n in range(batches)]


def test_one_bucket_is_read_from_its_start():
    sequence = BatchSequence([23], 4, seed=0)
    assert [sequence.locate(n) for n in (0, 1, 2, 1000)] == [(0, 0), (0, 4), (0, 8), (0, 4000)]


def test_the_order_of_buckets_depends_on_seed_and_epoch():
    def order(seed, first):
        return [BatchSequence([20, 20], 2, seed).locate(n)[0] for n in range(first, first + 20)]

    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 20)
    assert sorted(order(0, 0)) == sorted(order(1, 0))


@pytest.fixture
def mixed(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate([(40, 40), (80, 40), (81, 40), (40, 79), (64, 64), (30, 30)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def make_config(base_path, folder, output, **changes) -> TrainConfig:
    config = TrainConfig(
        pretrained_model_name_or_path=str(base_path),
        instance_data_dir=str(folder),
        instance_prompt="a icon",
        output_dir=str(output),
        resolution=32,
        aspect_buckets=True,
        train_batch_size=2,
        max_train_steps=3,
        report_to="none",
        seed=3,
    )
    return dataclasses.replace(config, **changes)


def test_images_keep_their_shape_and_batches_have_one_size(mixed):
    framing = Framing(resolution=32, aspect_buckets=True, center_crop=True)
    samples = find_samples(mixed, "a icon")

    def encode(pixels):
        return Latents(pixels, torch.zeros_like(pixels))

    cache = LatentCache(samples, encode, framing, 3, 1000, batch_size=2)
    seen = collections.Counter()
    for number in range(60):
        batch = cache.batch(range(2 * number, 2 * number + 2))
        for latents, ids in zip(batch.latents, batch.time_ids.tolist(), strict=True):
            height, width = latents.shape[1:]
            assert ids[4:] == [height, width]
            original = tuple(ids[:2])
            assert nearest_size(original, bucket_sizes(32)) == (height, width)
            # One side is kept whole.
            scale = max(height / original[0], width / original[1])
            assert (
                min(round(side * scale) - to for side, to in zip(original, (height, width), strict=True)) <= 0
            )
            seen[original] += 1
    assert set(seen) == {(40, 40), (40, 80), (40, 81), (79, 40), (64, 64), (30, 30)}
    assert max(seen.values()) - min(seen.values()) <= 2


@pytest.mark.slow
def test_a_run_with_buckets_trains_and_repeats(base_path, mixed, tmp_path):
    def run(name, **changes):
        config = make_config(base_path, mixed, tmp_path / name, **changes)
        train(config)
        return load_file(tmp_path / name / WEIGHTS_NAME)

    once, again = run("once"), run("again")
    assert all(torch.equal(once[name], again[name]) for name in once)
    square = run("square", aspect_buckets=False)
    assert any(not torch.equal(once[name], square[name]) for name in once)
