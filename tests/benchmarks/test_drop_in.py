"""The comparison with the diffusers script, without the script: replaying, judging, and the table."""

from pathlib import Path

import pytest
import torch

from benchmarks import drop_in
from benchmarks.drop_in import CASES, Outcome, Recording, outcome, replayed, table
from flatlora_diffusion.config.command_line import parse_train_config
from flatlora_diffusion.data.latents import Batch, LatentCache


def batch(captions):
    values = torch.arange(float(len(captions)))
    return Batch(captions, values, values + 10, values + 20, values + 30)


@pytest.mark.parametrize(("class_images", "parts"), [(False, [["a", "b"]]), (True, [["a"], ["b"]])])
def test_batches_come_again_in_their_order(class_images, parts):
    with replayed([batch(["a", "b"])], class_images):
        seen = [LatentCache.batch(None, range(1)) for _ in parts]
    assert [each.captions for each in seen] == parts
    assert torch.cat([each.time_ids for each in seen]).tolist() == [30, 31]


def test_a_batch_that_is_left_over_is_an_error():
    with pytest.raises(AssertionError, match="as many batches"), replayed([batch(["a"])], False):
        pass


@pytest.mark.parametrize(
    ("off", "verdict"), [(0.0, "same bits"), (1e-5, "within rounding"), (1e-2, "differs"), (None, "differs")]
)
def test_adapters_are_compared_by_how_far_the_script_s_went(off, verdict):
    start, end = torch.zeros(4), torch.full((4,), 2.0)
    ours = {"b": end} if off is None else {"a": end * (1 + off)}
    found = outcome(Recording({"a": start}, {"a": end}), ours, "because")
    assert found.verdict == verdict
    assert off is None or found.difference == pytest.approx(off, rel=0.05)
    assert off is None or found.remark == "because"


def test_the_table_counts_the_outcomes():
    text = table({"rank 8": Outcome("differs", 0.5, "why"), "defaults": Outcome("same bits", 0.0)})
    assert text.startswith("Of 2 combinations of flags: 1 same bits, 1 differs. ")
    assert "| rank 8 | `--rank 8` | differs | 5.0e-01 | why |" in text


@pytest.mark.parametrize("name", CASES)
def test_every_combination_is_one_of_this_trainer(name):
    needed = ["--pretrained_model_name_or_path", "b", "--instance_data_dir", "i", "--instance_prompt", "p"]
    parse_train_config([*needed, *CASES[name].flags.split()])


def test_a_folder_without_the_script_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"train_dreambooth_lora_sdxl\.py in it; give a checkout"):
        drop_in.main([str(tmp_path)])


def test_the_files_are_pictures_alone_where_there_are_no_captions(base_path, tmp_path):
    files = drop_in.make_files(base_path, tmp_path / "files", 16)
    assert sorted(path.name for path in Path(files, "images").iterdir()) == [f"{n}.png" for n in range(4)]
    assert "v_prediction" in (files / "v_prediction" / "scheduler" / "scheduler_config.json").read_text()


def test_the_script_s_short_names_are_those_of_here():
    """With newer transformers it leaves out a level of the text encoders' names."""
    layer = "encoder.layers.0.self_attn.k_proj"
    given = {
        f"unet.{layer}.lora_A": 1,
        f"text_encoder.{layer}.lora_A": 2,
        f"text_encoder_2.text_model.{layer}": 3,
    }
    assert drop_in._named_as_here(given) == {
        f"unet.{layer}.lora_A": 1,
        f"text_encoder.text_model.{layer}.lora_A": 2,
        f"text_encoder_2.text_model.{layer}": 3,
    }
