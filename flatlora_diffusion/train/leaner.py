"""Which flags let a run train in less memory."""

from __future__ import annotations

from flatlora_diffusion.config.settings import TrainConfig


def leaner(config: TrainConfig) -> str:
    """What to do where memory runs out in a training step: what saves most for least comes first."""
    half = config.mixed_precision in ("fp16", "bf16")
    micro_steps = config.gradient_accumulation_steps * config.train_batch_size
    flags = [
        *([] if half else ["--mixed_precision bf16"]),
        *([] if config.gradient_checkpointing else ["--gradient_checkpointing"]),
        *(
            [f"--train_batch_size 1 --gradient_accumulation_steps {micro_steps}"]
            if config.train_batch_size > 1
            else []
        ),
        *([] if config.quantize_base else ["--quantize_base 4bit"]),
        "a smaller --resolution",
    ]
    return f"try {', '.join(flags)}, in this order; what was saved before is still there"
