"""Captions that are dropped, and tags in another order: which, how often, and for which images."""

import collections
import dataclasses
import itertools
import json
import math

import pytest
import torch
from PIL import Image

from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data import images
from flatlora_diffusion.data.captions import MOST_ORDERS, Captioning, CaptionStream, tag_orders
from flatlora_diffusion.data.latents import LatentCache, PromptCache
from flatlora_diffusion.train import learner
from tests.tiny import assert_equal, global_rng_state, run, stop_after

TAGS = "a fox, red, flat, small, round, happy, winter"


def make_stream(captions, seed=0, **settings) -> CaptionStream:
    return CaptionStream(captions, Captioning(**settings), seed)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_orders_are_different_permutations_of_the_tags_after_the_kept_ones(keep):
    tags = TAGS.split(", ")
    orders = [order.split(", ") for order in tag_orders(TAGS, keep, seed=0)]
    assert len(orders) == len(set(map(tuple, orders))) == MOST_ORDERS
    for order in orders:
        assert order[:keep] == tags[:keep]
        assert sorted(order) == sorted(tags)
    assert len({order[keep] for order in orders}) > 1
    assert len({order[-1] for order in orders}) > 1


@pytest.mark.parametrize(
    ("caption", "keep", "expected"),
    [
        ("a fox, red, flat", 0, {", ".join(p) for p in itertools.permutations(["a fox", "red", "flat"])}),
        ("a fox,red ,  flat", 1, {"a fox, red, flat", "a fox, flat, red"}),
        ("a, a, b", 0, {"a, a, b", "a, b, a", "b, a, a"}),
        ("a fox, red,, ", 0, {"a fox, red", "red, a fox"}),
        ("a fox, red", 2, {"a fox, red"}),
        ("a fox, red", 7, {"a fox, red"}),
        ("a red fox", 0, {"a red fox"}),
    ],
)
def test_where_there_are_few_orders_all_of_them_come(caption, keep, expected):
    orders = tag_orders(caption, keep, seed=0)
    assert len(orders) == len(expected)
    assert set(orders) == expected


def test_first_places_are_fair():
    """Each of seven tags comes first in one of seven orders: binomial over many seeds."""
    first = collections.Counter(
        order.split(",")[0] for seed in range(400) for order in tag_orders(TAGS, 0, seed)
    )
    count, share = 400 * MOST_ORDERS, 1 / 7
    for seen in first.values():
        assert abs(seen - count * share) < 5 * math.sqrt(count * share * (1 - share))


def test_orders_depend_on_seed_and_caption_alone():
    before = global_rng_state()
    orders = {
        (seed, caption): tuple(tag_orders(caption, 1, seed))
        for seed in (0, 1)
        for caption in (TAGS, f"{TAGS}, x")
    }
    assert len(set(orders.values())) == 4
    other = "a, b, c, d, e, f, g"
    places = {
        tuple(
            caption.split(", ").index(tag) for order in tag_orders(caption, 0, 0) for tag in order.split(", ")
        )
        for caption in (TAGS, other)
    }
    assert len(places) == 2, "other captions are shuffled otherwise"
    assert orders[0, TAGS] == tuple(tag_orders(TAGS, 1, 0))
    assert global_rng_state() == before


def test_captions_are_dropped_at_the_given_rate():
    for rate in (0.0, 0.1, 0.7, 1.0):
        stream = make_stream(["a fox"], dropout_rate=rate)
        told = collections.Counter(stream.at(position, 0) for position in range(4000))
        assert set(told) <= {"", "a fox"}
        assert abs(told[""] - 4000 * rate) <= 5 * math.sqrt(4000 * rate * (1 - rate))


def test_all_orders_are_told_equally_often():
    stream = make_stream([TAGS], shuffle=True)
    told = collections.Counter(stream.at(position, 0) for position in range(4000))
    assert set(told) == set(tag_orders(TAGS, 0, 0)) == set(stream.prompts)
    chi_squared = sum((count - 500) ** 2 / 500 for count in told.values())
    assert chi_squared < 29.9  # 7 degrees of freedom, 1 in 10,000


def test_what_is_told_depends_on_seed_and_position_alone():
    settings = {"shuffle": True, "dropout_rate": 0.3}

    def told(seed, positions):
        stream = make_stream([TAGS, "a wolf, grey"], seed, **settings)
        return [stream.at(position, position % 2) for position in positions]

    assert told(0, range(100)) == told(0, reversed(range(100)))[::-1]
    dropped = {tuple(caption == "" for caption in told(seed, range(100))) for seed in range(4)}
    assert len(dropped) == 4


def test_dropping_and_shuffling_do_not_disturb_each_other():
    def told(**settings):
        stream = make_stream([TAGS], **settings)
        return [stream.at(position, 0) for position in range(200)]

    dropped = told(dropout_rate=0.3)
    shuffled = told(shuffle=True)
    both = told(dropout_rate=0.3, shuffle=True)
    assert both == ["" if one == "" else other for one, other in zip(dropped, shuffled, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dropout_rate": 0.3},
        {"shuffle": True},
        {"dropout_rate": 1.0, "shuffle": True},
    ],
)
def test_all_that_may_be_told_is_known_before(settings):
    captions = [TAGS, "a wolf"]
    stream = make_stream(captions, **settings)
    told = {stream.at(position, position % 2) for position in range(1000)}
    assert told <= set(stream.prompts)
    assert settings or stream.prompts == captions


# Runs.


@pytest.fixture
def config(config) -> TrainConfig:
    """Every caption has tags; what the tokenizer can tell apart are letters and digits."""
    for path in images.Path(config.instance_data_dir).glob("*.png"):
        path.with_suffix(".txt").write_text(f"a {path.stem} icon, flat, 3d, round")
    (images.Path(config.instance_data_dir) / "metadata.jsonl").unlink()
    return dataclasses.replace(
        config,
        caption_dropout_rate=0.4,
        shuffle_caption=True,
        keep_tokens=1,
        background="random",
        max_train_steps=5,
    )


@pytest.fixture
def batches(monkeypatch):
    """Every batch that is trained."""
    seen, original = [], LatentCache.batch

    def look(self, positions):
        seen.append(original(self, positions))
        return seen[-1]

    monkeypatch.setattr(LatentCache, "batch", look)
    return seen


@pytest.fixture
def told(monkeypatch):
    """The captions of every batch whose loss is computed, as they are encoded or looked up for it."""
    seen, embed, encode = [], PromptCache.embed, learner.encode_prompts

    def looked_up(self, prompts):
        seen.append(list(prompts))
        return embed(self, prompts)

    def encoded(tokenizers, encoders, prompts, chunks):
        seen.append(list(prompts))
        return encode(tokenizers, encoders, prompts, chunks)

    monkeypatch.setattr(PromptCache, "embed", looked_up)
    monkeypatch.setattr(learner, "encode_prompts", encoded)
    return seen


OFF = {"caption_dropout_rate": 0.0, "shuffle_caption": False, "keep_tokens": 0}


@pytest.mark.slow
def test_nothing_else_is_drawn_otherwise(config, batches):
    run(config)
    altered = batches[:]
    batches.clear()
    run(config, **OFF, output_dir=f"{config.output_dir} off")
    assert len(altered) == len(batches) == 5
    for one, other in zip(altered, batches, strict=True):
        for name in ("latents", "noise", "timesteps", "time_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        for told, whole in zip(one.captions, other.captions, strict=True):
            assert told == "" or (told.split(", ")[0], sorted(told.split(", "))) == (
                whole.split(", ")[0],
                sorted(whole.split(", ")),
            )
    told = {caption for batch in altered for caption in batch.captions}
    assert "" in told
    assert told - {""} - {caption for batch in batches for caption in batch.captions}


@pytest.mark.slow
def test_trained_text_encoders_are_told_the_same_as_cached_ones(config, told):
    """At a learning rate of 0 they are the same encoders: the losses agree as well."""
    settings = {"flat_sigma": 0.0, "text_encoder_lr": 0.0, "max_grad_norm": 1e9, "max_train_steps": 3}
    losses, captions = [], []
    for trained in (False, True):
        output = f"{config.output_dir} {trained}"
        run(config, train_text_encoder=trained, output_dir=output, **settings)
        losses.append(json.loads((images.Path(output) / "summary.json").read_text())["losses"])
        captions.append(told[:])
        told.clear()
    assert captions[0] == captions[1] and len(captions[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_captions_of_class_and_held_out_images_stay_whole(config, told, tmp_path):
    for name in ("class", "heldout"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), "navy").save(tmp_path / name / "a.png")
        (tmp_path / name / "a.txt").write_text(f"{name}, b, c, d")
    run(
        config,
        caption_dropout_rate=1.0,
        with_prior_preservation=True,
        class_data_dir=str(tmp_path / "class"),
        class_prompt="a picture",
        num_class_images=1,
        heldout_data_dir=str(tmp_path / "heldout"),
        heldout_steps=4,
    )
    training = [captions for captions in told if len(captions) == 4]
    heldout = [captions for captions in told if len(captions) == 8]
    assert training == [["", "", "class, b, c, d", "class, b, c, d"]] * 5
    assert heldout == [["heldout, b, c, d"] * 8] * 2


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_captions_and_backgrounds(config, tmp_path):
    whole = run(config)
    parts = str(tmp_path / "parts")
    stop_after(config, 3, output_dir=parts)
    assert_equal(run(config, output_dir=parts, resume_from_checkpoint="latest"), whole)


@pytest.mark.slow
def test_the_key_of_captions_counts_for_training_and_held_out_images(config, told, icons, tmp_path):
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    Image.new("RGB", (16, 16), "navy").save(heldout / "a.png")
    for folder, name in ((icons, "red.png"), (heldout, "a.png")):
        line = {"file_name": name, "text": "no", "words": f"words of {name}"}
        (folder / "metadata.jsonl").write_text(json.dumps(line))
    run(config, **OFF, caption_column="words", heldout_data_dir=str(heldout), max_train_steps=2)
    captions = {caption for batch in told for caption in batch}
    assert {"words of red.png", "words of a.png"} <= captions
    assert "no" not in captions
