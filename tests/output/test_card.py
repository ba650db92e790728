"""The model card: its code runs, its metadata is what the hub reads, and nobody's own words are lost."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from PIL import Image

from flatlora_diffusion.adapter.file import WEIGHTS_NAME, adapter_bytes
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.pipeline import draw_with, load_pipeline
from flatlora_diffusion.output.card import CARD, Example, Exhibit, Making, is_ours, write_card
from flatlora_diffusion.output.gallery import validation_drawing
from flatlora_diffusion.sdxl.lora import add_lora
from flatlora_diffusion.train.arms import train
from tests.tiny import build_unet

MAKING = Making(images=23, processes=2, precision="bf16")
# Those that diffusers' train_dreambooth_lora_sdxl.py gives (it says "text-to-image" twice).
TAGS = [
    *("text-to-image", "diffusers-training", "diffusers", "lora", "template:sd-lora"),
    *("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
]


def code_of(card: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    return code


def run_code_of(card: Path, base: Path, monkeypatch) -> Image.Image:
    """Run the card's code, on the CPU and where the folders that it names are; open what it draws."""
    code, folder = code_of(card), card.parent.parent
    assert code.count('.to("cuda")') == 1
    assert str(folder) not in card.read_text() and str(base) not in card.read_text()
    if not (folder / base.name).exists():
        (folder / base.name).symlink_to(base)
    monkeypatch.chdir(folder)
    exec(compile(code.replace('.to("cuda")', '.to("cpu")'), str(card), "exec"), {})
    return Image.open(folder / "picture.png")


@pytest.fixture
def short(config):
    return dataclasses.replace(
        config,
        flat_sigma=0.5,
        max_train_steps=2,
        validation_prompt=('a "red" icon', "a blue icon"),
        num_validation_images=1,
        validation_inference_steps=1,
        validation_epochs=1,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_code_of_a_comparison_draws_what_the_card_shows(short, base_path, monkeypatch):
    short = dataclasses.replace(short, compare=True)
    train(short)
    output = Path(short.output_dir)
    top = ModelCard.load(output / CARD)
    assert top.data.tags == [*TAGS, "flat-lora"]
    assert top.data.instance_prompt == "a icon"
    names = ["a_red_icon-seed3", "a_blue_icon-seed3"]
    assert top.data.widget == [
        {"text": prompt, "output": {"url": f"comparison/{name}-flat_lora.png"}}
        for name, prompt in zip(names, short.validation_prompt, strict=True)
    ]
    assert "](comparison.png)" in top.text and "<Gallery />" in top.text
    shown = Image.open(output / top.data.widget[0]["output"]["url"])
    assert run_code_of(output / CARD, base_path, monkeypatch).tobytes() == shown.tobytes()

    plain = ModelCard.load(output / "lora" / CARD)
    assert plain.data.tags == TAGS and "widget" not in plain.data.to_dict()
    assert "](../comparison.png)" in plain.text and "bibtex" not in plain.text
    shown = Image.open(output / "comparison" / f"{names[0]}-lora.png")
    assert run_code_of(output / "lora" / CARD, base_path, monkeypatch).tobytes() == shown.tobytes()

    first = (output / CARD).read_bytes()
    (output / CARD).unlink()
    train(dataclasses.replace(short, resume_from_checkpoint="latest"))
    assert (output / CARD).read_bytes() == first


@pytest.mark.slow
def test_the_code_loads_new_tokens(short, base_path, monkeypatch):
    short = dataclasses.replace(
        short, compare=True, train_text_encoder_ti=True, instance_prompt="a TOK", validation_prompt=("a TOK",)
    )
    train(short)
    output = Path(short.output_dir)
    shown = Image.open(output / "comparison" / "a_tok-seed3-flat_lora.png")
    assert run_code_of(output / CARD, base_path, monkeypatch).tobytes() == shown.tobytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_code_of_a_run_without_pictures_and_with_another_vae(short, base_path, tmp_path, monkeypatch):
    vae = tmp_path / "vae"
    AutoencoderKL.from_pretrained(base_path, subfolder="vae").save_pretrained(vae)
    short = dataclasses.replace(
        short, validation_prompt=None, pretrained_vae_model_name_or_path=str(vae), use_dora=True
    )
    train(short)
    card = Path(short.output_dir, CARD)
    assert "![" not in card.read_text() and "<Gallery />" not in card.read_text()
    tags = [tag if tag != "lora" else "dora" for tag in TAGS]
    assert ModelCard.load(card).data.tags == [*tags, "flat-lora"]
    drawn = run_code_of(card, base_path, monkeypatch)
    pipeline = load_pipeline(str(base_path), vae=str(vae))
    load_adapter(pipeline, "mine", Path(short.output_dir))
    expected = draw_with(pipeline, "mine", "a icon", short.seed, validation_drawing(short))
    assert drawn.tobytes() == expected.tobytes()


# What is on it, without training.


@pytest.fixture(scope="module")
def adapter() -> bytes:
    unet = build_unet(slim=True)
    unet.requires_grad_(False)
    add_lora({"unet": unet}, rank=4, alpha=8, seed=0)
    facts = {
        "method": "Flat-LoRA",
        "flat_sigma": 0.25,
        "flat_schedule": "linear",
        "flat_noise": "table",
        "rank": 4,
        "alpha": 8.0,
        "steps": 500,
        "seed": 3,
        "targets": {"unet": ["to_q", "to_v"]},
        "versions": {"torch": "2.0"},
    }
    return adapter_bytes({"unet": unet}, facts)


@pytest.fixture
def written(config, adapter):
    """Write the card of a run with some settings changed."""

    def write(exhibit: Exhibit | None = None, repository: str | None = None, **changes) -> Path:
        changed = dataclasses.replace(config, **changes)
        output = Path(changed.output_dir)
        output.mkdir(exist_ok=True)
        (output / WEIGHTS_NAME).write_bytes(adapter)
        write_card(changed, {"Flat-LoRA": output}, MAKING, exhibit, repository)
        return output / CARD

    return write


def test_the_table_has_what_somebody_would_ask_for(written):
    card = written(
        instance_prompt="a | icon",
        train_text_encoder=True,
        gradient_accumulation_steps=3,
        with_prior_preservation=True,
        class_data_dir="class",
        class_prompt="icons",
        snr_gamma=5.0,
    )
    table = dict(re.findall(r"^\| (.*?) \| (.*) \|$", card.read_text(), re.MULTILINE))
    expected = {
        "VAE": "the base's own",
        "method": "Flat-LoRA, sigma 0.25 (linear, table)",
        "adapter": "LoRA, rank 4, alpha 8, on to_q to_v, both text encoders",
        "instance prompt": "`a \\| icon`",
        "training images": "23",
        "prior preservation": "`icons`, weight 1",
        "resolution": "16",
        "steps": "500",
        "batch size": "12",
        "learning rate": "0.001 (text encoders 5e-06, 5e-06), constant",
        "optimizer": "adamw",
        "min-SNR gamma": "5",
        "precision": "bfloat16",
        "seed": "3",
        "versions": "torch 2.0",
    }
    assert {name: table[name] for name in expected} == expected
    assert table["base"].endswith("tiny-sdxl`")
    assert "You should use `a | icon` to trigger" in card.read_text()


def test_the_hub_is_named_where_it_is_there(written):
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    exhibit = Exhibit("sheet.png", "Two icons", [Example("one.png", "an icon: with 'signs' | `\\`\n<b>", 2)])
    card = written(exhibit, "me/icons", pretrained_model_name_or_path=base, revision="main", variant="fp16")
    data = ModelCard.load(card).data
    assert (data.base_model, data.library_name, data.license) == (base, "diffusers", "openrail++")
    assert data.widget == [{"text": exhibit.examples[0].prompt, "output": {"url": "one.png"}}]
    code = code_of(card)
    calls = {
        ast.unparse(node.func).split(".")[-1]: node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
    }
    load = calls["from_pretrained"]
    assert ast.literal_eval(load.args[0]) == base
    assert {word.arg: ast.unparse(word.value) for word in load.keywords} == {
        "dtype": "torch.bfloat16",
        "use_safetensors": "True",
        "revision": "'main'",
        "variant": "'fp16'",
    }
    assert ast.literal_eval(calls["load_lora_weights"].args[0]) == "me/icons"
    assert ast.literal_eval(calls["pipeline"].args[0]) == exhibit.examples[0].prompt
    assert "# SDXL Flat-LoRA DreamBooth - me/icons\n" in card.read_text()
    assert f"That of the base, `{base}`: `openrail++`." in card.read_text()


def test_a_comparison_on_the_hub_names_the_folder_of_the_last_arm(config, adapter):
    folders = {
        method: Path(config.output_dir, name) for method, name in (("LoRA", "lora"), ("Flat-LoRA", "flat"))
    }
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / WEIGHTS_NAME).write_bytes(adapter)
    write_card(config, folders, MAKING, repository="me/icons")
    code = code_of(Path(config.output_dir, CARD))
    assert f'load_lora_weights("me/icons", subfolder="flat", weight_name="{WEIGHTS_NAME}")' in code


@pytest.mark.parametrize(
    ("readme", "licence", "note"),
    [
        ("---\nlicense: mit\n---\n# A base\n", {"license": "mit"}, "`mit`."),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
            "`mine`.",
        ),
        ("---\nlicense: other\n---\n", {"license": "other"}, "See that of the base"),
        ("# No metadata\n", {}, "See that of the base"),
        ("---\nlicense: [\n---\n", {}, "See that of the base"),
        (None, {}, "See that of the base"),
    ],
)
def test_the_licence_is_that_of_the_base(written, base_path, clean_copy, readme, licence, note):
    base = clean_copy(base_path, "base")
    if readme is not None:
        (base / "README.md").write_text(readme)
    card = written(pretrained_model_name_or_path=str(base))
    data = ModelCard.load(card).data.to_dict()
    assert {name: value for name, value in data.items() if name.startswith("license")} == licence
    assert note in card.read_text()
    assert "base_model" not in data, "the hub refuses what is no name on the hub"


def test_a_base_of_unknown_licence(written):
    card = written(pretrained_model_name_or_path="somebody/base")
    data = ModelCard.load(card).data
    assert (data.license, data.base_model) == (None, "somebody/base")
    assert "See that of the base, `somebody/base`." in card.read_text()


@pytest.mark.parametrize(
    "content", [b"# My icons\n", b"", b"\xe9t\xe9\r\n"], ids=["text", "empty", "latin-1"]
)
def test_a_readme_of_somebody_else_stays(written, config, caplog, content):
    caplog.set_level("INFO")
    path = Path(config.output_dir, CARD)
    path.parent.mkdir()
    path.write_bytes(content)
    written()
    assert path.read_bytes() == content
    assert f"{path} was written or changed by somebody else and stays as it is" in caplog.messages


def test_our_own_card_is_replaced_until_somebody_changes_it(written):
    card = written()
    first = card.read_text()
    assert is_ours(first.encode())
    assert written(rank=8, snr_gamma=5.0).read_text() != first
    assert written().read_text() == first
    changed = first.replace("# SDXL", "# My SDXL")
    card.write_text(changed)
    assert written(snr_gamma=5.0).read_text() == changed


def test_the_last_validation_stands_in_for_a_comparison(written, config):
    folder = Path(config.output_dir, "validation")
    folder.mkdir(parents=True)
    for step in ("000200", "000400", "000600", "final"):
        (folder / f"step-{step}.png").touch()
    text = written().read_text()
    assert "![Validation pictures after step 400 of 500.](validation/step-000400.png)" in text
