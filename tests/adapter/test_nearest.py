"""The nearest plain LoRA: against the update written out by hand and numpy's singular values."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flatlora_diffusion.adapter.command import main
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.draw.adapters import load_adapter
from tests.adapter.test_check import models, write
from tests.adapter.test_formats import CONV, FC1, TO_Q, kohya, merged, random
from tests.tiny import UNET_TARGETS, build_pipeline

PLACES = {TO_Q: ("unet", (4, 64), (64, 4)), CONV: ("unet", (4, 32, 3, 3), (64, 4, 1, 1))}
PLACES[FC1] = ("text_encoder", (4, 32), (37, 4))


def by_hand(pipeline, tensors, inputs):
    """The update of each layer, as LyCORIS defines DoRA of the filters or of the inputs."""
    found = {}
    for path, (part, _, _) in PLACES.items():
        name = kohya("lora_unet" if part == "unet" else "lora_te1", path)
        model = getattr(pipeline, part)
        modules = dict(model.named_modules())
        weight = modules.get(path, modules.get(path.removeprefix("text_model."))).weight.detach().numpy()
        up, down = (tensors[f"{name}.lora_{half}.weight"].flatten(1).numpy() for half in ("up", "down"))
        update = (tensors[f"{name}.alpha"].item() / 4 * up @ down).reshape(weight.shape)
        if inputs is not None:
            whole, magnitude = weight + update, tensors[f"{name}.dora_scale"].numpy()
            axes = tuple(axis for axis in range(weight.ndim) if axis != inputs)
            update = magnitude / np.sqrt((whole**2).sum(axes, keepdims=True)) * whole - weight
        found[path] = update.reshape(len(update), -1)
    return found


@pytest.mark.parametrize("axis", [None, 0, 1], ids=["LoRA", "DoRA", "DoRA of the inputs"])
@pytest.mark.parametrize("rank", [2, 64])
def test_is_that_of_the_true_update(axis, rank, tmp_path, base_path, capsys):
    tensors = {}
    for seed, (path, (part, down, up)) in enumerate(PLACES.items()):
        name = kohya("lora_unet" if part == "unet" else "lora_te1", path)
        tensors[f"{name}.lora_down.weight"] = random(*down, seed=seed)
        tensors[f"{name}.lora_up.weight"] = random(*up, seed=seed + 10)
        tensors[f"{name}.alpha"] = torch.tensor(3)
        if axis is not None:
            shape = [1] * len(down)
            shape[axis] = (up[0], down[1])[axis]
            tensors[f"{name}.dora_scale"] = random(*shape, seed=seed + 20).abs() + 0.5
    source, target = tmp_path / "theirs.safetensors", tmp_path / "plain.safetensors"
    save_file(tensors, source)
    base = [] if axis is None else ["--base", str(base_path)]
    arguments = [str(source), str(target), "--rank", str(rank), "--layers_per_block", "1", *base]
    main(arguments)
    said = float(re.search(r"relative error of its update (\S+)%", capsys.readouterr().out)[1]) / 100
    pipeline = build_pipeline()
    expected = by_hand(pipeline, tensors, axis)
    assert not any("dora" in key for key in load_file(target))
    assert load_adapter(pipeline, "plain", target).layers == len(PLACES)
    lost = whole = 0.0
    for path, update in expected.items():
        u, s, v = np.linalg.svd(update, full_matrices=False)
        nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
        before, after = merged(pipeline, "plain", PLACES[path][0], path)
        met = (after - before).flatten(1).numpy()
        np.testing.assert_allclose(met, nearest, atol=2e-5 * s[0])
        lost, whole = lost + ((nearest - update) ** 2).sum(), whole + (update**2).sum()
    assert said == pytest.approx(np.sqrt(lost / whole), abs=1e-4)
    assert (said < 1e-3) == (rank == 64)


@pytest.mark.slow
def test_reads_what_the_trainer_writes(tmp_path, base_path):
    trained = models([*UNET_TARGETS, "conv1"], use_dora=True)
    for name, parameter in trained["unet"].named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.1
    source, target = write(tmp_path / "run" / "a.safetensors", trained), tmp_path / "plain.safetensors"
    main([str(source), str(target), "--rank", "64", "--base", str(base_path), "--layers_per_block", "1"])
    pipeline = build_pipeline()
    load_adapter(pipeline, "dora", source)
    load_adapter(pipeline, "plain", target)
    layers = [path for path, own in pipeline.unet.named_modules() if "dora" in getattr(own, "lora_A", ())]
    for path in layers:
        one, other = (merged(pipeline, name, "unet", path)[1] for name in ("dora", "plain"))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_missing_is_named(tmp_path, base_path):
    source, target = (
        write(tmp_path / "run" / "a.safetensors", models(use_dora=True)),
        tmp_path / "b.safetensors",
    )
    for flags, message in (
        (["--rank", "2"], "its DoRA's update depends on the base's weights; give --base"),
        (["--rank", "0"], "--rank 0: must be at least 1"),
        (["--base", str(base_path)], "--base is for --rank"),
        (["--rank", "2", "--base", str(tmp_path / "gone")], "--base .*gone: no such folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            main([str(source), str(target), *flags])
        assert "\n" not in str(caught.value)
        assert not target.exists()
