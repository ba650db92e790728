"""New tokens trained with the LoRA, against real extended tables; text encoders that stop early."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from flatlora_diffusion.adapter.file import FLAT_METADATA_KEY, WEIGHTS_NAME, adapter_bytes, read_facts
from flatlora_diffusion.adapter.new_tokens import (
    EMBEDDINGS_NAME,
    FACTS_KEY,
    NewTokens,
    read_embeddings,
    replace_words,
)
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.data import latents as data_latents
from flatlora_diffusion.data.images import Framing, Sample, find_samples
from flatlora_diffusion.data.latents import LatentCache
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw, draw_with, load_pipeline
from flatlora_diffusion.grid.draw import draw_grid
from flatlora_diffusion.grid.plan import Grid, Method
from flatlora_diffusion.grid.recipe import Recipe
from flatlora_diffusion.output.record import _digest, is_complete
from flatlora_diffusion.sdxl.base import load_base
from flatlora_diffusion.sdxl.encoding import encode_images, encode_prompts
from flatlora_diffusion.sdxl.lora import TEXT_ENCODERS, add_lora, enable_gradient_checkpointing
from flatlora_diffusion.train import learner as train_learner
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.learner import Learner
from flatlora_diffusion.train.loop import Run
from tests.processes import in_processes
from tests.tiny import (
    assert_equal,
    build_pipeline,
    build_text_encoders,
    build_tokenizer,
    build_unet,
    global_rng_state,
    run,
    stop_after,
)

DRAWING = Drawing(16, 16, steps=2, guidance=3.0)
TOKENS = ["<s0>", "<s1>"]
# Text encoders as fast as the UNet, and with a decay that would show where only the gradient is gone.
FAST = {"text_encoder_lr": 1e-2, "adam_weight_decay_text_encoder": 0.5}
LORA = {"train_text_encoder": True, "train_text_encoder_frac": 0.5, **FAST}
PIVOTAL = {"train_text_encoder_ti": True, "instance_prompt": "a icon in TOK style", **FAST}
both_ways = pytest.mark.parametrize("changes", [LORA, PIVOTAL], ids=["LoRA", "new tokens"])


@pytest.fixture(scope="module")
def base_path(tmp_path_factory) -> Path:
    """A slim one suffices here."""
    path = tmp_path_factory.mktemp("base") / "tiny-sdxl"
    build_pipeline(slim=True).save_pretrained(path)
    return path


@pytest.fixture
def pivotal_config(config) -> TrainConfig:
    """Four steps, of which the first two train two new tokens."""
    return dataclasses.replace(config, max_train_steps=4, **PIVOTAL)


def samples_of(config: TrainConfig) -> list[Sample]:
    return find_samples(Path(config.instance_data_dir), config.instance_prompt)


def trained(config: TrainConfig) -> Run:
    """A finished run."""
    done = Run(config, samples_of(config))
    done.train()
    return done


def rows_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, EMBEDDINGS_NAME))


def extended(encoder: torch.nn.Module, rows: torch.Tensor) -> torch.nn.Parameter:
    """The embedding table of a text encoder after it has really got these rows."""
    old = encoder.get_input_embeddings().weight.data
    embedding = encoder.resize_token_embeddings(len(old) + len(rows), mean_resizing=False)
    embedding.weight.data = torch.cat([old, rows])
    return embedding.weight.requires_grad_()


# Words.


@pytest.mark.parametrize(
    ("text", "replaced"),
    [
        ("a TOK icon", "a <s0><s1> icon"),
        ("TOK, (TOK) TOK's TOK-like", "<s0><s1>, (<s0><s1>) <s0><s1>'s <s0><s1>-like"),
        ("TOKYO tok xTOK TOK_", "TOKYO tok xTOK TOK_"),
        ("TOK2 TOK", "<s2><s3> <s0><s1>"),
        ("a <x>b", "a <s4>b"),
    ],
)
def test_whole_words_are_replaced(text, replaced):
    words = {"TOK": "<s0><s1>", "TOK2": "<s2><s3>", "<x>": "<s4>"}
    assert replace_words(text, words) == replaced
    assert replace_words(text, {}) == text


# The embeddings in training.


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_outputs_and_gradients_are_those_of_a_really_extended_table(which, checkpointing):
    tokenizers = (build_tokenizer(), build_tokenizer())
    encoders, twin = build_text_encoders(), build_text_encoders()[which]
    for encoder in encoders:
        encoder.requires_grad_(False)
    NewTokens({"TOK": TOKENS}, tokenizers, encoders, seed=5)
    encoder = encoders[which].train()
    if checkpointing:
        enable_gradient_checkpointing(encoder)
    learning = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    (rows,) = learning.values()
    assert rows.shape == (2, 32)
    table = extended(twin.requires_grad_(False), rows.detach())
    ids = tokenizers[which](["a <s1> icon", "a icon", "<s0><s1> x <s0>"], padding=True, return_tensors="pt")
    weights = torch.randn(3, ids.input_ids.shape[1], 32, generator=torch.Generator().manual_seed(0))
    outputs = [model(ids.input_ids).last_hidden_state for model in (encoder, twin)]
    assert torch.equal(*outputs)
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(rows.grad, table.grad[600:], rtol=1e-5, atol=1e-7)
    assert rows.grad.norm() > 0.01
    assert all(p.grad is None for p in encoder.parameters() if p is not rows)


def test_initial_rows_are_normals_of_the_table_s_spread_by_seed_encoder_and_index():
    def rows(count: int, seed: int) -> dict[str, torch.Tensor]:
        tokens = NewTokens(
            {"TOK": [f"<s{index}>" for index in range(count)]},
            (build_tokenizer(), build_tokenizer()),
            build_text_encoders(),
            seed,
        )
        return {key: embedding.new.weight.detach() for key, embedding in tokens._embeddings.items()}

    state = global_rng_state()
    many = rows(400, 3)
    assert global_rng_state() == state
    for tensor, encoder in zip(many.values(), build_text_encoders(), strict=True):
        std = encoder.get_input_embeddings().weight.std()
        assert tensor.std() == pytest.approx(std.item(), rel=0.02) and tensor.mean().abs() < 0.02 * std
    assert not torch.equal(many["clip_l"], many["clip_g"])
    assert not torch.equal(many["clip_l"][0], many["clip_l"][1])
    assert torch.equal(rows(2, 3)["clip_l"], many["clip_l"][:2])
    assert not torch.equal(rows(2, 4)["clip_l"], many["clip_l"][:2])


def reference_training(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The rows that plain code ends in: tables that are really longer, whose new part alone is updated."""
    base = load_base(config.pretrained_model_name_or_path)
    initial = NewTokens(
        {"TOK": TOKENS}, [build_tokenizer(), build_tokenizer()], build_text_encoders(), config.seed
    )
    rows = [embedding.new.weight.detach().clone() for embedding in initial._embeddings.values()]
    stds = [encoder.get_input_embeddings().weight.std() for encoder in base.text_encoders]
    tables = [extended(encoder, own) for encoder, own in zip(base.text_encoders, rows, strict=True)]
    for tokenizer in base.tokenizers:
        tokenizer.add_tokens(TOKENS)
    samples = [
        dataclasses.replace(sample, caption=sample.caption.replace("TOK", "<s0><s1>"))
        for sample in samples_of(config)
    ]
    framing = Framing(resolution=config.resolution)
    cache = LatentCache(samples, lambda x: encode_images(base.vae, x), framing, config.seed, 1000)
    add_lora({"unet": base.unet}, rank=config.rank, alpha=config.alpha, seed=config.seed)
    lora = [p for p in base.unet.parameters() if p.requires_grad]
    rows = [torch.nn.Parameter(own) for own in rows]
    decay = config.adam_weight_decay_text_encoder
    optimizer = torch.optim.AdamW(
        [
            {"params": lora, "lr": config.learning_rate, "weight_decay": config.adam_weight_decay},
            {"params": rows, "lr": config.text_encoder_lr, "weight_decay": decay},
        ]
    )
    scheduler = DDPMScheduler.from_pretrained(config.pretrained_model_name_or_path, subfolder="scheduler")
    for step in range(config.max_train_steps):
        batch = cache.batch(range(step * config.train_batch_size, (step + 1) * config.train_batch_size))
        embeds = encode_prompts(base.tokenizers, base.text_encoders, batch.captions)
        conditions = {"text_embeds": embeds.pooled, "time_ids": batch.time_ids}
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        predicted = base.unet(noisy, batch.timesteps, embeds.tokens, added_cond_kwargs=conditions).sample
        (predicted - batch.noise).square().mean().backward()
        training = step < config.max_train_steps // 2
        for own, table in zip(rows, tables, strict=True):
            own.grad = table.grad[600:] if training else None
        torch.nn.utils.clip_grad_norm_([*lora, *rows], config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        for own, table, std in zip(rows, tables, stds, strict=True):
            table.grad = None
            if training:
                own.data *= (std / own.data.std()) ** 0.1
                table.data[600:] = own.data
    return dict(zip(("clip_l", "clip_g"), rows, strict=True))


@pytest.mark.slow
def test_the_trained_rows_are_those_of_a_plain_reference_loop_and_the_base_stays(pivotal_config, base_path):
    config = dataclasses.replace(pivotal_config, flat_sigma=0.0)
    state = global_rng_state()
    done = trained(config)
    assert global_rng_state() == state
    for key, expected in reference_training(config).items():
        own = rows_of(config.output_dir)[key]
        # Adam divides by the gradient's size, so rounding shows more than in a single forward pass.
        assert (own - expected).norm() / expected.norm() < 1e-4
    for name, original in zip(TEXT_ENCODERS, load_base(str(base_path)).text_encoders, strict=True):
        state = done.learner.learning[name].state_dict()
        state = {key.replace("token_embedding.table", "token_embedding"): own for key, own in state.items()}
        (new,) = [key for key in state if key.endswith("token_embedding.new.weight")]
        del state[new]
        assert_equal(state, original.state_dict())
    assert all(name.startswith("unet.") for name in load_file(done.output / WEIGHTS_NAME))


def test_captions_of_images_get_the_tokens_and_those_of_class_images_do_not(pivotal_config):
    samples = samples_of(pivotal_config)
    with_word = [dataclasses.replace(sample, caption="a TOK") for sample in samples]
    learner = Learner(pivotal_config, Accelerator(), samples, with_word, with_word)
    own = set(learner.latents.batch(range(8)).captions)
    assert own == {"a red icon", "a blue icon", "a icon in <s0><s1> style"}
    assert set(learner.class_latents.batch(range(8)).captions) == {"a TOK"}
    heldout = {c for batch in learner.heldout_latents.fixed_batches([1]) for c in batch.captions}
    assert heldout == {"a <s0><s1>"}
    learner.loss(0).backward()
    for name in TEXT_ENCODERS:
        with_gradient = [p for p in learner.learning[name].parameters() if p.grad is not None]
        assert [p.shape for p in with_gradient] == [(2, 32)]


# The step at which text encoders stop.


@pytest.mark.slow
@both_ways
def test_text_encoders_change_until_their_step_and_the_unet_goes_on(config, monkeypatch, changes):
    calls = []
    original = encode_prompts
    for module in (train_learner, data_latents):
        monkeypatch.setattr(
            module, "encode_prompts", lambda *args: calls.append(len(args[2])) or original(*args)
        )
    config = dataclasses.replace(config, flat_sigma=0.5, max_train_steps=4, **changes)
    config = dataclasses.replace(config, checkpointing_steps=1, heldout_steps=1)
    done = Run(config, samples_of(config), heldout_samples=samples_of(config)[:2])
    done.train()
    # Two steps with two prompts and the two held-out images at eight timesteps, then every prompt (three
    # captions and the empty one) once, and never again.
    assert calls == 2 * [2, 8, 8] + 4 * [1]
    assert len(done.state.heldout_losses) == 4
    assert not any(done.learner.learning[name].training for name in TEXT_ENCODERS)

    def parts(step: int) -> tuple[bytes, bytes]:
        folder = done.output / f"checkpoint-{step}"
        tensors = load_file(folder / WEIGHTS_NAME)
        tensors |= rows_of(folder) if config.train_text_encoder_ti else {}
        unet = [tensor for name, tensor in tensors.items() if name.startswith("unet")]
        text = [tensor for name, tensor in tensors.items() if not name.startswith("unet")]
        return tuple(torch.cat([t.flatten() for t in part]).numpy().tobytes() for part in (unet, text))

    for step in range(1, 4):
        (unet, text), (next_unet, next_text) = parts(step), parts(step + 1)
        assert unet != next_unet
        assert (text == next_text) == (step >= 2)


@pytest.mark.slow
@both_ways
def test_a_run_stopped_on_both_sides_of_that_step_ends_in_the_same_bits(config, tmp_path, changes):
    changes = {**changes, "flat_sigma": 0.5, "max_train_steps": 4}
    run(config, **changes)
    changes |= {"output_dir": str(tmp_path / "parts"), "resume_from_checkpoint": "latest"}
    for last in (1, 3):
        stop_after(config, last, **changes)
    run(config, **changes)
    for name in (WEIGHTS_NAME, EMBEDDINGS_NAME) if "train_text_encoder_ti" in changes else (WEIGHTS_NAME,):
        assert Path(changes["output_dir"], name).read_bytes() == Path(config.output_dir, name).read_bytes()


@pytest.mark.slow
def test_the_step_is_a_fraction_of_all_and_belongs_to_the_run_s_settings(config, caplog):
    def steps(total: int, **changes) -> int:
        return dataclasses.replace(config, **changes).text_encoder_steps(total)

    assert steps(100) == 0
    assert steps(100, train_text_encoder=True) == 100
    assert steps(100, train_text_encoder=True, train_text_encoder_frac=0.29) == 29
    assert steps(7, train_text_encoder_ti=True) == 3
    assert steps(7, train_text_encoder_ti=True, train_text_encoder_ti_frac=0.0) == 0
    config = dataclasses.replace(config, max_train_steps=4, **LORA)
    stop_after(config, 1)
    run(config, resume_from_checkpoint="latest", train_text_encoder_frac=0.75)
    assert "goes on with other settings: steps of the text encoders 2 then and 3 now" in caplog.text


# The embeddings at inference.


def by_hand(base_path, folder) -> StableDiffusionXLPipeline:
    """The pipeline as users of diffusers load it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base_path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder)
    path = folder / EMBEDDINGS_NAME
    if path.exists():
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()[FLAT_METADATA_KEY])[FACTS_KEY]
        for key, encoder, tokenizer in (
            ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
            ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
        ):
            pipeline.load_textual_inversion(
                load_file(path)[key], token=facts["tokens"], text_encoder=encoder, tokenizer=tokenizer
            )
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "eos"),
    [(LORA, 599), (PIVOTAL, 599), (PIVOTAL, 2)],
    ids=["LoRA", "new tokens", "new tokens, pooled at the highest id"],
)
def test_diffusers_gives_prompts_the_embeddings_of_training(config, base_path, clean_copy, changes, eos):
    base = clean_copy(base_path, "base")
    for name in TEXT_ENCODERS:
        path = base / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))
    changes = {"pretrained_model_name_or_path": str(base), "max_train_steps": 2, **changes}
    done = trained(dataclasses.replace(config, **changes))
    pipeline = by_hand(base, done.output)
    for caption in ("a icon in TOK style" if "train_text_encoder_ti" in changes else "a icon", "a red icon"):
        prompt = caption.replace("TOK", "<s0><s1>")
        expected = done.learner.prompts.embed([prompt])
        tokens, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        assert torch.equal(tokens, expected.tokens) and torch.equal(pooled, expected.pooled)


def write_adapter(folder: Path, seed: int) -> Path:
    """An adapter with two new tokens, all of it far from zero."""
    folder.mkdir(parents=True)
    unet = build_unet(slim=True).requires_grad_(False)
    add_lora({"unet": unet}, rank=4, alpha=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    tokenizers = (build_tokenizer(), build_tokenizer())
    tokens = NewTokens({"TOK": TOKENS}, tokenizers, build_text_encoders(), seed)
    tokens.load({key: 20 * rows.new.weight for key, rows in tokens._embeddings.items()})
    (folder / EMBEDDINGS_NAME).write_bytes(tokens.file())
    (folder / WEIGHTS_NAME).write_bytes(adapter_bytes({"unet": unet}, {FACTS_KEY: tokens.facts()}))
    return folder


@pytest.fixture
def learned(tmp_path) -> dict[str, Path]:
    """Two adapters that have the same words and tokens for different things."""
    labels = ("LoRA", "Flat-LoRA")
    return {label: write_adapter(tmp_path / "learned" / label, seed) for seed, label in enumerate(labels)}


@pytest.mark.slow
def test_pictures_of_several_adapters_are_those_by_hand(base_path, learned, tmp_path):
    prompts, folder = ("a TOK icon", "a <s0><s1> icon"), tmp_path / "pictures"
    grid = Grid(prompts, [3], [Method("base"), *(Method(label, label) for label in learned)])
    state = global_rng_state()
    draw_grid(Recipe(str(base_path), grid, DRAWING, adapters=learned), folder, device="cpu")
    assert global_rng_state() == state
    pictures = [[Image.open(folder / cell.file).tobytes() for cell in row] for row in grid.table()]
    base = load_pipeline(str(base_path))
    pipelines = [by_hand(base_path, path) for path in learned.values()]
    for row, prompt in zip(pictures, prompts, strict=True):
        expected = [draw_with(base, None, prompt, 3, DRAWING)]
        expected += [draw(own, 3, DRAWING, prompt="a <s0><s1> icon") for own in pipelines]
        assert row == [picture.tobytes() for picture in expected]
    assert len({picture for row in pictures for picture in row}) == 4
    away = dataclasses.replace(DRAWING, negative_prompt="TOK")
    expected = draw(pipelines[0], 3, DRAWING, prompt="a icon", negative_prompt="<s0><s1>")
    load_adapter(base, "lora", learned["LoRA"])
    assert draw_with(base, "lora", "a icon", 3, away).tobytes() == expected.tobytes()


@pytest.mark.slow
def test_an_adapter_can_be_unloaded_and_another_take_its_name(base_path, learned, adapters):
    pipeline = load_pipeline(str(base_path))
    base = draw_with(pipeline, None, "a TOK icon", 3, DRAWING).tobytes()
    load_adapter(pipeline, "mine", learned["LoRA"])
    own = draw_with(pipeline, "mine", "a TOK icon", 3, DRAWING).tobytes()
    pipeline.unload_lora_weights()
    assert draw_with(pipeline, None, "a TOK icon", 3, DRAWING).tobytes() == base
    load_adapter(pipeline, "mine", adapters["LoRA"])
    without = draw_with(pipeline, "mine", "a TOK icon", 3, DRAWING).tobytes()
    fresh = load_pipeline(str(base_path))
    load_adapter(fresh, "mine", adapters["LoRA"])
    assert draw_with(fresh, "mine", "a TOK icon", 3, DRAWING).tobytes() == without
    pipeline.unload_lora_weights()
    load_adapter(pipeline, "mine", learned["LoRA"])
    assert draw_with(pipeline, "mine", "a TOK icon", 3, DRAWING).tobytes() == own


@pytest.mark.slow
def test_validation_pictures_are_those_of_the_checkpoint_while_tokens_train_and_after(pivotal_config):
    config = dataclasses.replace(
        pivotal_config,
        flat_sigma=0.5,
        max_train_steps=6,
        validation_prompt=("a TOK icon",),
        num_validation_images=1,
        validation_inference_steps=2,
        validation_guidance_scale=3.0,
        validation_sampler="default",
        validation_epochs=1,
        checkpointing_steps=2,
    )
    done = trained(config)
    for step in (2, 6):
        pipeline = load_pipeline(config.pretrained_model_name_or_path)
        load_adapter(pipeline, "x", done.output / f"checkpoint-{step}")
        expected = draw_with(pipeline, "x", "a TOK icon", config.seed, DRAWING)
        picture = Image.open(done.output / "validation" / f"step-{step:06d}" / f"000-seed{config.seed}.png")
        assert picture.tobytes() == expected.tobytes()


# Several processes.


@pytest.mark.distributed
def test_two_processes_train_the_rows_that_one_trains_with_both_their_images(pivotal_config):
    config = dataclasses.replace(pivotal_config, flat_sigma=0.0, max_train_steps=2)
    run(config)
    output = Path(config.output_dir).with_name("two")
    config_of_each = dataclasses.replace(config, train_batch_size=1, output_dir=str(output))
    in_processes(lambda rank: train(config_of_each))
    assert json.loads((output / "summary.json").read_text())["processes"] == 2
    for key, rows in rows_of(config.output_dir).items():
        torch.testing.assert_close(rows_of(output)[key], rows, rtol=1e-4, atol=1e-6)


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_text_encoder": True}, "--train_text_encoder and --train_text_encoder_ti: give one of them"),
        ({"num_new_tokens_per_abstraction": 0}, "per_abstraction 0: must be greater than 0"),
        ({"train_text_encoder_ti_frac": 1.5}, "--train_text_encoder_ti_frac 1.5: must be in"),
        ({"train_text_encoder_frac": -0.5}, "--train_text_encoder_frac -0.5: must be in"),
        ({"token_abstraction": "TOK,,X"}, "--token_abstraction TOK,,X: must be one word"),
        ({"token_abstraction": "TOK, TOK"}, "--token_abstraction TOK, TOK: must be one word"),
        ({"token_abstraction": "TOK,NEW"}, "--token_abstraction NEW: in none of the 4 captions"),
        ({"instance_prompt": "a TOKYO"}, "--token_abstraction TOK: in none of the 4 captions"),
        ({"num_new_tokens_per_abstraction": 80}, "<s7[0-9]> lies beyond the 77 tokens of a prompt"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(pivotal_config, changes, message):
    with pytest.raises(UserError, match=message):
        run(pivotal_config, **changes)
    assert not Path(pivotal_config.output_dir).exists()


def test_tokenizers_that_know_the_tokens_or_have_gaps_are_refused():
    known, gaps = build_tokenizer(), CLIPTokenizer(vocab={"a": 0, "<|endoftext|>": 5}, merges=[])
    known.add_tokens("<s1>")
    for tokenizer, message in ((known, "has the token <s1> already"), (gaps, "ids .* have gaps")):
        with pytest.raises(UserError, match=message):
            NewTokens({"TOK": TOKENS}, (tokenizer, tokenizer), build_text_encoders(), 0)


def test_lost_or_foreign_embeddings_are_named(base_path, learned):
    pipeline = load_pipeline(str(base_path))
    own, other = (path / EMBEDDINGS_NAME for path in learned.values())
    content = own.read_bytes()
    for bad in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), other.read_bytes()):
        own.write_bytes(bad)
        with pytest.raises(UserError, match=r"LoRA/learned_embeds\.safetensors: damaged, or of another"):
            load_adapter(pipeline, "x", own.parent)
    own.unlink()
    with pytest.raises(UserError, match=r"LoRA/learned_embeds\.safetensors: cannot be read \(No such file"):
        load_adapter(pipeline, "x", own.parent)
    assert pipeline.get_list_adapters() == {} and len(pipeline.tokenizer) == 600


@pytest.mark.parametrize("facts", ["x", {"tokens": ["<s0>"]}, []])
def test_damaged_facts_of_new_tokens_are_named(tmp_path, facts):
    with pytest.raises(UserError, match=r"a\.safetensors: what it says of its new tokens is damaged"):
        read_embeddings(tmp_path / "a.safetensors", {FACTS_KEY: facts})


def test_a_run_is_complete_only_with_its_embeddings(learned):
    folder, settings = learned["LoRA"], {"seed": 0}
    facts = {"steps": 4, "settings_sha256": _digest(settings)}
    facts |= read_facts(folder / WEIGHTS_NAME)
    unet = build_unet(slim=True).requires_grad_(False)
    add_lora({"unet": unet}, rank=4, alpha=8, seed=0)
    (folder / WEIGHTS_NAME).write_bytes(adapter_bytes({"unet": unet}, facts))
    assert is_complete(folder, settings, 4)
    (folder / EMBEDDINGS_NAME).unlink()
    assert not is_complete(folder, settings, 4)
