"""Adapter files: what they say of themselves, and which are refused before and after loading."""

import dataclasses
import functools
import hashlib
import json
import math
import re

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from flatlora_diffusion.adapter.check import check_adapter, check_loaded
from flatlora_diffusion.adapter.file import (
    WEIGHTS_NAME,
    adapter_bytes,
    adapter_tensors,
    load_adapter_tensors,
)
from flatlora_diffusion.adapter.kohya import convert
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.sdxl import lora as sdxl_lora
from flatlora_diffusion.sdxl.initialise import initialise, subtract_initial_update
from tests.tiny import (
    TEXT_TARGETS,
    UNET_TARGETS,
    add_lora,
    assert_equal,
    build_pipeline,
    build_text_encoders,
    build_unet,
)

TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
KOHYA_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
CONVOLUTIONS = ["conv_in", "conv1", "conv_shortcut", "downsamplers.0.conv", "time_emb_proj", "ff.net.2"]


@pytest.fixture(scope="module")
def pipeline():
    """A base that no test gives an adapter."""
    return build_pipeline()


def models(unet=UNET_TARGETS, text=None, text_settings=None, **settings):
    """Parts of the base with adapters far from zero."""
    parts = {"unet": build_unet()} if unet else {}
    if unet:
        add_lora(parts["unet"], unet, **settings)
    if text:
        parts["text_encoder"], parts["text_encoder_2"] = build_text_encoders()
        for part in ("text_encoder", "text_encoder_2"):
            add_lora(parts[part], text, **(text_settings or settings))
    return parts


def pissa():
    """What `--init_lora_weights pissa` ends in: two adapters in one of twice the rank."""
    parts = {"unet": build_unet().requires_grad_(False)}
    sdxl_lora.add_lora(parts, rank=4, alpha=8, seed=0)
    initialise(parts, "pissa", seed=0, batch_size=1, loss=None)
    subtract_initial_update(parts)
    for name, parameter in parts["unet"].named_parameters():
        if "lora_B.default" in name:
            parameter.data += 0.1
    return parts


# What the trainer writes: models, rank and alpha in words, parts, DoRA.
KINDS = {
    "LoRA": (models, "4", "8", ("unet",), False),
    "alpha below the rank": (functools.partial(models, lora_alpha=0.5), "4", "0.5", ("unet",), False),
    "text encoders": (
        functools.partial(models, text=TEXT_TARGETS, text_settings={"r": 2, "lora_alpha": 16}),
        *("2-4", "8-16", ("unet", "text_encoder", "text_encoder_2"), False),
    ),
    "text encoders alone": (
        functools.partial(models, None, TEXT_TARGETS),
        *("4", "8", ("text_encoder", "text_encoder_2"), False),
    ),
    "rsLoRA": (functools.partial(models, r=3, use_rslora=True), "3", "8", ("unet",), False),
    "DoRA": (
        functools.partial(models, [*UNET_TARGETS, "conv1"], TEXT_TARGETS, use_dora=True),
        *("4", "8", ("unet", "text_encoder", "text_encoder_2"), True),
    ),
    "convolutions": (
        functools.partial(models, [*UNET_TARGETS, *CONVOLUTIONS]),
        *("4", "8", ("unet",), False),
    ),
    "patterns": (
        functools.partial(models, rank_pattern={"to_q": 2}, alpha_pattern={"attn2.to_k": 0.7}),
        *("2-4", "0.7-8", ("unet",), False),
    ),
    "PiSSA": (pissa, "8", "16", ("unet",), False),
}
for_every_kind = pytest.mark.parametrize("kind", KINDS)


def write(path, parts, facts=None):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(adapter_bytes(parts, facts or {}))
    return path


def updates(pipeline_or_models, name):
    """B @ A and its scale, with DoRA's magnitude, of every adapted layer."""
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        model = (
            pipeline_or_models.get(part)
            if isinstance(pipeline_or_models, dict)
            else getattr(pipeline_or_models, part)
        )
        for path, module in model.named_modules() if model is not None else ():
            for own in (name, "initial"):
                if own in getattr(module, "lora_A", ()):
                    key = f"{part}.{path.removeprefix('text_model.')}"
                    delta = module.get_delta_weight(own)
                    found[key] = found[key] + delta if key in found else delta
                    if own in module.lora_magnitude_vector:
                        found[f"{key} magnitude"] = module.lora_magnitude_vector[own].weight.flatten()
    return {key: tensor.detach() for key, tensor in found.items()}


@pytest.mark.slow
@for_every_kind
def test_what_the_trainer_writes_passes_and_reaches_the_pipeline(kind, tmp_path):
    build, rank, alpha, parts, dora = KINDS[kind]
    trained = build()
    file = write(tmp_path / "run" / WEIGHTS_NAME, trained, {"method": "Flat-LoRA", "seed": 3})
    pipeline = build_pipeline()
    facts = load_adapter(pipeline, "mine", file.parent)
    tensors = adapter_tensors(trained)
    assert facts.file == file
    assert facts.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (facts.method, facts.facts) == ("Flat-LoRA", {"method": "Flat-LoRA", "seed": 3})
    assert (facts.rank, facts.alpha, facts.parts, facts.dora) == (rank, alpha, parts, dora)
    assert facts.layers == len(tensors) // (3 if dora else 2)
    assert facts.parameters == sum(tensor.numel() for tensor in tensors.values())
    loaded, expected = updates(pipeline, "mine"), updates(trained, "default")
    assert loaded.keys() == expected.keys() and len(loaded) == facts.layers * (2 if dora else 1)
    for key, tensor in loaded.items():
        torch.testing.assert_close(tensor, expected[key], msg=key)
    assert check_adapter(pipeline, file) == facts, "by the file itself, and beside another adapter"


@pytest.mark.parametrize("kind", ["LoRA", "text encoders", "rsLoRA", "convolutions", "PiSSA"])
def test_what_kohya_convert_writes_passes(kind, tmp_path):
    build, rank, alpha, parts, dora = KINDS[kind]
    source = tmp_path / WEIGHTS_NAME
    target = tmp_path / "kohya.safetensors"
    trained = build()
    tensors = adapter_tensors(trained)
    if kind == "convolutions":  # diffusers' own names, which kohya.convert takes
        assert any("lora_A" in key for key in tensors)
    write(source, trained, {"method": "LoRA"})
    convert(source, target, 1)
    pipeline = build_pipeline()
    facts = load_adapter(pipeline, "mine", target)
    assert (facts.method, facts.rank, facts.parts, facts.dora) == ("LoRA", rank, parts, dora)
    # kohya's alpha is that of a scale of alpha / rank.
    assert facts.alpha == (f"{8 * math.sqrt(3):g}" if kind == "rsLoRA" else alpha)
    assert facts.parameters == sum(tensor.numel() for tensor in tensors.values())
    loaded, expected = updates(pipeline, "mine"), updates(trained, "default")
    assert loaded.keys() == expected.keys()
    for key, tensor in loaded.items():
        torch.testing.assert_close(tensor, expected[key], msg=key)


@pytest.mark.parametrize("kind", ["DoRA", "patterns"])
def test_what_diffusers_reads_otherwise_in_kohyas_format_reaches_the_pipeline(kind, tmp_path):
    source, target = tmp_path / WEIGHTS_NAME, tmp_path / "k.safetensors"
    trained = KINDS[kind][0]() if kind == "patterns" else models(use_dora=True)
    write(source, trained)
    convert(source, target, 1)
    pipeline = build_pipeline()
    assert load_adapter(pipeline, "mine", target).dora == (kind == "DoRA")
    loaded, expected = updates(pipeline, "mine"), updates(trained, "default")
    assert loaded.keys() == expected.keys()
    for key, tensor in loaded.items():
        torch.testing.assert_close(tensor, expected[key], msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precisions_of_file_and_pipeline_may_differ(dtype, tmp_path, base_path):
    trained = models(text=TEXT_TARGETS)
    full, half = write(tmp_path / "full.safetensors", trained), tmp_path / "half.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(full).items()}
    save_file(tensors, half)
    for precision in (dtype, torch.float32):
        pipeline = load_pipeline(str(base_path), dtype=precision)
        for name, file in (("whole", full), ("rounded", half)):
            load_adapter(pipeline, name, file)


def test_a_file_without_metadata_has_no_alpha_and_no_method(adapters, pipeline, tmp_path):
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(adapters["LoRA"]), bare)
    facts = check_adapter(pipeline, bare)
    assert (facts.method, facts.rank, facts.alpha, facts.facts) == (None, "4", None, {})
    other = build_pipeline()
    load_adapter(other, "bare", bare)
    assert {m.scaling["bare"] for m in other.unet.modules() if "bare" in getattr(m, "lora_A", ())} == {1.0}


def test_checking_leaves_the_pipeline_as_it_is(adapters):
    pipeline = build_pipeline()
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    check_adapter(pipeline, adapters["LoRA"])
    assert_equal(dict(pipeline.unet.state_dict()), before)
    assert pipeline.get_list_adapters() == {}


# Refused before anything is loaded.


def lora(name, inputs, outputs, rank=4, kernel=()):
    ones = (1,) * len(kernel)
    return {
        f"{name}.lora_A.weight": torch.ones(rank, inputs, *kernel),
        f"{name}.lora_B.weight": torch.ones(outputs, rank, *ones),
    }


def kohya_lora(name=KOHYA_Q, alpha=4.0, size=64):
    weights = {"lora_down": torch.ones(4, size), "lora_up": torch.ones(size, 4)}
    tensors = {f"{name}.{kind}.weight": tensor for kind, tensor in weights.items()}
    return tensors | {f"{name}.alpha": torch.tensor(alpha)}


SOUND = lora(TO_Q, 64, 64)


def config(part="unet", **settings):
    own = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q"]} | settings
    return {LORA_ADAPTER_METADATA_KEY: json.dumps({f"{part}.{key}": value for key, value in own.items()})}


def poisoned(value, key=f"{TO_Q}.lora_B.weight"):
    tensors = {name: tensor.clone() for name, tensor in (SOUND | lora(TO_K, 64, 64)).items()}
    tensors[key][-1, -1] = value
    return tensors


SD1_TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FLAT = {"flat_lora": "[1]"}
REFUSED = {
    "no tensors": ({}, {}, "there is no LoRA weight"),
    "a model": (
        {"conv_in.weight": torch.ones(2)},
        {},
        r"conv_in\.weight, 1 of 1 such keys, is no LoRA weight",
    ),
    "keys without a part": (
        SOUND | lora(TO_Q.removeprefix("unet."), 64, 64),
        {},
        r"down_blocks\S+to_q\.lora_A\.weight, 1 of 2 such keys, is no LoRA weight",
    ),
    "LoHa": ({f"{TO_Q}.hada_w1_a": torch.ones(2, 2)}, {}, "hada_w1_a, 1 of 1 such keys"),
    "another part": (lora("transformer.to_q", 4, 4), {}, "transformer.to_q.lora_A.weight, 1 of 2"),
    "no lora_B": ({f"{TO_Q}.lora_A.weight": torch.ones(4, 64)}, {}, r"attn1\.to_q: lacks its up .*lora_B"),
    "no lora_A": ({f"{TO_Q}.lora_B.weight": torch.ones(64, 4)}, {}, r"attn1\.to_q: lacks its down .*lora_A"),
    "both spellings": (
        SOUND | {f"{TO_Q}.lora.down.weight": torch.ones(4, 64)},
        {},
        "this weight is there under another name too",
    ),
    "layers of a deeper base": (
        SOUND | lora("unet.down_blocks.1.attentions.3.proj_in", 4, 4) | lora("unet.mid_block.x.to_q", 4, 4),
        {},
        r"doesn't fit this base \(unet\.down_blocks\.1\.attentions\.3\.proj_in, 1 of 2 such layers, isn't",
    ),
    "a norm": (lora("unet.conv_norm_out", 32, 32), {}, "conv_norm_out, 1 of 1 such layers, isn't in it"),
    "SD 1 by its layers": (
        SOUND | lora(SD1_TO_K, 768, 320),
        {},
        r"down_blocks\.0\.attentions\.0.*isn't in it; by its 768 prompt features it is for SD 1\);",
    ),
    "SD 2 by its shapes": (
        SOUND | lora(TO_K, 1024, 64),
        {},
        r"attn2\.to_k: its down weight is \[4, 1024\] and must be \[4, 64\]; by its 1024 .* for SD 2\);",
    ),
    "too wide": (lora(TO_Q, 64, 65), {}, r"its up weight is \[65, 4\] and must be \[64, 4\]\);"),
    "a linear layer as a wide convolution": (
        lora(TO_Q, 64, 64, kernel=(3, 3)),
        {},
        r"attn1\.to_q: a linear layer can't have the shape \[4, 64, 3, 3\]",
    ),
    "another kernel": (
        lora("unet.conv_in", 4, 32, kernel=(1, 1)),
        {},
        r"\[4, 4, 1, 1\] and must be \[4, 4, 3, 3\]",
    ),
    "a magnitude too long": (
        SOUND | {f"{TO_Q}.lora_magnitude_vector": torch.ones(65)},
        {},
        r"its magnitude weight is \[65\] and must be \[64\]",
    ),
    "ranks that differ": (
        SOUND | {f"{TO_Q}.lora_B.weight": torch.ones(64, 3)},
        {},
        r"\[4, 64\] and \[64, 3\] aren't LoRA's shapes",
    ),
    "rank 0": (lora(TO_Q, 64, 64, rank=0), {}, r"attn1\.to_q: rank 0"),
    "NaN": (poisoned(math.nan), {}, r"attn1\.to_q\.lora_B\.weight has values that aren't finite"),
    "infinity": (poisoned(-math.inf, f"{TO_K}.lora_A.weight"), {}, r"attn2\.to_k\.lora_A\.weight has values"),
    "whole numbers": (
        {key: tensor.int() for key, tensor in SOUND.items()},
        {},
        r"lora_A\.weight has values that aren't finite numbers",
    ),
    "alpha 0 of kohya": (kohya_lora(alpha=0.0), {}, "alpha 0 must be a finite number other than 0"),
    "alpha NaN of kohya": (kohya_lora(alpha=math.nan), {}, r"to_q\.alpha has values that aren't finite"),
    "two alphas of kohya": (kohya_lora(alpha=[1.0, 2.0]), {}, "alpha must be one number"),
    "kohya's layers of another base": (
        kohya_lora("lora_unet_input_blocks_8_1_proj_in"),
        {},
        r"unet\.down_blocks\.3\.attentions\.1\.proj_in, 1 of 1 such layers|no LoRA weight",
    ),
    "kohya's unknown names": (kohya_lora("lora_unet_x"), {}, r"lora_unet_x\.alpha, 1 of 3 such keys"),
    "alpha 0": (SOUND, config(lora_alpha=0), "alpha 0 must be a finite number other than 0"),
    "alpha NaN": (SOUND, config(lora_alpha=math.nan), "alpha nan must be a finite number"),
    "alpha of one layer": (SOUND, config(alpha_pattern={"to_q": math.inf}), "alpha inf must be"),
    "another rank": (SOUND, config(r=8), "attn1.to_q: rank 4, in the metadata 8"),
    "an alpha in words": (SOUND, config(lora_alpha="much"), "metadata aren't PEFT's .*much"),
    "a broken pattern": (SOUND, config(alpha_pattern={"(": 3}), "metadata aren't PEFT's"),
    "metadata that are no JSON": (SOUND, {LORA_ADAPTER_METADATA_KEY: "{"}, "aren't a JSON object"),
    "metadata without end": (SOUND, {LORA_ADAPTER_METADATA_KEY: "[" * 99_999}, "aren't a JSON object"),
    "metadata that are no object": (SOUND, {LORA_ADAPTER_METADATA_KEY: "[1]"}, "aren't a JSON object"),
    "facts that are no object": (SOUND, FLAT, "facts of the training aren't a JSON object"),
    "a start that changes the base": (
        SOUND,
        config(init_lora_weights="pissa_niter_4"),
        r"unet\.init_lora_weights 'pissa_niter_4' in its metadata changes the base",
    ),
    "more than a LoRA": (
        SOUND,
        config(modules_to_save=["conv_in"]),
        r"unet\.modules_to_save in its metadata",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_line(case, pipeline, tmp_path):
    tensors, metadata, message = REFUSED[case]
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata=metadata or None)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(pipeline, "x", file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    assert pipeline.get_list_adapters() == {}
    assert not any("base_layer" in name for name, _ in pipeline.unet.named_modules())


def header(claim, length=None, data=b""):
    text = json.dumps(claim).encode() if not isinstance(claim, bytes) else claim
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor_claim(shape, end, dtype="F32"):
    return {f"{TO_Q}.lora_A.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


CONTENT = save(SOUND)
DAMAGED = {
    "empty": b"",
    "a few bytes": b"\1\2\3",
    "a pickle": b"\x80\x02}q\x00.",
    "cut short": CONTENT[:-1],
    "cut in the header": CONTENT[:50],
    "more than it claims": CONTENT + b"\0" * 8,
    "a header of 2^63 bytes": header({}, 2**63),
    "a header of 200 MB": header({}, 200 * 2**20),
    "a header that is no JSON": header(b"{" * 16),
    "a tensor of 2^62 values": header(tensor_claim([2**31, 2**31], 2**64 - 1)),
    "a tensor beyond the end": header(tensor_claim([2**20, 2**10], 2**32)),
    "a shape that overflows": header(tensor_claim([2**32, 2**32, 2**32], 0)),
    "a negative offset": header(tensor_claim([1], -4)),
    "an unknown type": header(tensor_claim([1], 4, "F128"), data=b"\0" * 4),
    "sizes that disagree": header(tensor_claim([4], 4), data=b"\0" * 4),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case, pipeline, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(DAMAGED[case])
    with pytest.raises(UserError, match=r"a\.safetensors: not a sound safetensors file") as caught:
        check_adapter(pipeline, file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "a.pt", "a.ckpt", "a.pth", "a.pkl"])
def test_pickles_are_never_read(name, pipeline, tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("it was unpickled",))

    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / name
    torch.save({"a": Trap()}, file)
    with pytest.raises(
        UserError, match=f"{re.escape(str(file))}: must be a .safetensors file; a pickled one"
    ):
        check_adapter(pipeline, file)
    with pytest.raises(UserError, match=f"run: has only {name}; a pickled file could run code, save it as"):
        check_adapter(pipeline, tmp_path / "run")
    file.rename(tmp_path / "renamed.safetensors")
    with pytest.raises(UserError, match=r"renamed\.safetensors: not a sound safetensors file"):
        check_adapter(pipeline, tmp_path / "renamed.safetensors")


def test_folders_without_an_adapter_are_named(pipeline, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path.name}: no {WEIGHTS_NAME} in it; give the file itself"):
        check_adapter(pipeline, tmp_path)
    (tmp_path / "other.safetensors").write_bytes(CONTENT)
    (tmp_path / "optimizer.bin").write_bytes(b"")
    with pytest.raises(UserError, match="give the file itself, or the folder of a run"):
        check_adapter(pipeline, tmp_path)
    assert check_adapter(pipeline, tmp_path / "other.safetensors").layers == 1


# Compared after loading.


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        # What diffusers renames of a part depends on whether its first key, or any, has the new spelling.
        (
            SOUND
            | {f"{TO_K}.lora.{h}.weight": torch.ones(s) for h, s in (("down", (4, 64)), ("up", (64, 4)))},
            {},
        ),
        # PEFT gives the text encoders the layers that the metadata name, and no others.
        (lora(Q_PROJ, 32, 32) | lora(Q_PROJ.replace("q_p", "k_p"), 32, 32), {"target_modules": ["q_proj"]}),
        (lora(Q_PROJ, 32, 32), {"target_modules": ["q_proj", "v_proj"]}),
        # Without the flag, PEFT leaves magnitudes out.
        (SOUND | {f"{TO_Q}.lora_magnitude_vector": torch.ones(64)}, {"use_dora": False}),
        (SOUND, {"use_dora": True}),
    ],
    ids=["mixed spellings", "a layer too many", "a layer too few", "DoRA unsaid", "DoRA without magnitudes"],
)
def test_what_does_not_arrive_is_refused_after_loading(tensors, metadata, adapters, tmp_path):
    pipeline = build_pipeline()
    load_adapter(pipeline, "good", adapters["LoRA"])
    drawing = Drawing(16, 16, 2, 3.0)
    expected = [draw_with(pipeline, name, "a icon", 3, drawing).tobytes() for name in (None, "good")]
    part = "unet" if TO_Q in next(iter(tensors)) else "text_encoder"
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata=config(part, **metadata) if metadata else None)
    check_adapter(pipeline, file)  # sound in itself
    with pytest.raises(UserError, match=r"a\.safetensors: .*diffusers doesn't load what the file has for it"):
        load_adapter(pipeline, "bad", file)
    assert pipeline.get_list_adapters() == {"unet": ["good"]}
    met = [draw_with(pipeline, name, "a icon", 3, drawing).tobytes() for name in (None, "good")]
    assert met == expected, "the pipeline is as it was"


@pytest.mark.parametrize("attribute", ["lora_A", "lora_B", "scaling", "missing", "file"])
def test_the_comparison_sees_every_value(attribute, adapters):
    pipeline = build_pipeline()
    facts = load_adapter(pipeline, "mine", adapters["LoRA"])
    check_loaded(pipeline, "mine", facts)
    layer = [module for module in pipeline.unet.modules() if "mine" in getattr(module, "lora_A", ())][-1]
    if attribute == "scaling":
        layer.scaling["mine"] *= 1.001
    elif attribute == "missing":
        layer.delete_adapter("mine")
    elif attribute == "file":
        adapters["LoRA"].write_bytes(adapters["Flat-LoRA"].read_bytes())
    else:
        getattr(layer, attribute)["mine"].weight.data[-1, -1] += 1e-6
    message = "was replaced while it was read" if attribute == "file" else r"unet\..* diffusers doesn't load"
    with pytest.raises(UserError, match=message):
        check_loaded(pipeline, "mine", facts)


def test_a_name_is_taken_once(adapters):
    pipeline = build_pipeline()
    load_adapter(pipeline, "mine", adapters["LoRA"])
    with pytest.raises(ValueError, match="has an adapter called 'mine'; unload it first"):
        load_adapter(pipeline, "mine", adapters["Flat-LoRA"])
    assert pipeline.get_list_adapters() == {"unet": ["mine"]}


def test_facts_cannot_be_changed(adapters, pipeline):
    with pytest.raises(dataclasses.FrozenInstanceError):
        check_adapter(pipeline, adapters["LoRA"]).rank = "9"


@pytest.mark.parametrize("older", [False, True])
def test_trained_magnitudes_of_text_encoders_arrive(older, tmp_path):
    trained = models(None, TEXT_TARGETS, use_dora=True)
    for model in trained.values():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1.5
    file = write(tmp_path / "run" / WEIGHTS_NAME, trained)
    if older:  # files that were written before had PEFT's names, which transformers passes over
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = {
            key.removesuffix(".weight") if "magnitude" in key else key: t
            for key, t in load_file(file).items()
        }
        save_file(tensors, file, metadata=metadata)
    pipeline = build_pipeline()
    load_adapter(pipeline, "mine", file)
    other = models(None, TEXT_TARGETS, use_dora=True)
    load_adapter_tensors(other, load_file(file))
    pipelines = [(pipeline, "mine"), (other, "default")]
    if not older:  # diffusers by itself
        plain = build_pipeline()
        plain.load_lora_weights(file.parent, weight_name=file.name, adapter_name="plain")
        pipelines.append((plain, "plain"))
    expected = updates(trained, "default")
    for where, name in pipelines:
        loaded = updates(where, name)
        assert loaded.keys() == expected.keys()
        for key, tensor in loaded.items():
            torch.testing.assert_close(tensor, expected[key], msg=key)
