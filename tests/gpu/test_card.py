"""What only a CUDA card can tell of whole runs, on tiny models: `python -m pytest -n0 -s tests/gpu`."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.tiny import assert_equal, run, stop_after

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("noise", ["table", "gaussian"])
def test_three_steps_train(config, precision, noise):
    """Text encoders leave the card on the way; pictures and the held-out loss are made on it."""
    tensors = run(
        config,
        max_train_steps=3,
        mixed_precision=precision,
        flat_noise=noise,
        train_text_encoder=True,
        train_text_encoder_frac=0.5,
        scale_weight_norms=1.0,
        use_ema=True,
        gradient_checkpointing=True,
        heldout_data_dir=config.instance_data_dir,
        validation_prompt=("a icon",),
        num_validation_images=1,
        validation_inference_steps=2,
    )
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    summary = json.loads(Path(config.output_dir, "summary.json").read_text())
    assert len(summary["losses"]) == 3 and summary["mean_update_norm"] > 0
    print(torch.cuda.get_device_name(), precision, noise, summary.get("skipped_steps", 0), "skipped")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_has_the_same_bits(config, tmp_path, precision):
    config = dataclasses.replace(config, deterministic=True, mixed_precision=precision, flat_sigma=0.5)
    whole = run(config)
    resumed = dataclasses.replace(config, output_dir=str(tmp_path / "resumed"))
    stop_after(resumed, 3)
    assert_equal(run(resumed, resume_from_checkpoint="latest"), whole)
