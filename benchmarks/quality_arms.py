"""What `benchmarks.quality` trains: the arms, each beside the plain one that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flatlora_diffusion.config.settings import TrainConfig

ASSETS = Path(__file__).parents[1] / "assets"
PROMPT = "a fluent 3d icon"
FEW_ICONS = ("dog_face.png", "guitar.png", "hamburger.png", "red_apple.png", "rocket.png")
SIGMAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
RHOS = (0.05, 0.2)
LEAST_RANKS = (0.25, 0.5)  # the paper's is a half
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL_LAYERS = (
    *ATTENTION,
    *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj", "linear_1", "linear_2"),
    *("conv_in", "conv1", "conv2", "conv", "conv_shortcut", "conv_out"),
)

FEATURED = (
    *("mild-lora", "mild-flat-0.3", "mild-flat-0.8", "over-lora", "over-flat-0.3"),
    *("demo-lora", "demo-flat-0.3"),
)
OVER_SCALES = (*FEATURED, "batch-lora")

# The regimes. Demo's learning rate: ten times that of the paper, for a model ten times as narrow.
MILD = {"rank": 4, "max_train_steps": 500}
OVERFITTING = {"rank": 16, "max_train_steps": 1500}
TEXT_ENCODERS = {"train_text_encoder": True, "text_encoder_lr": 1e-3}
LARGER_BATCH = {"train_batch_size": 4}
DEMO = {**LARGER_BATCH, **TEXT_ENCODERS, "max_train_steps": 200}  # as in assets/demo.yaml
PAPERS_RATE = {"learning_rate": 1e-4}  # a small update beside the noise
SMALLER_STEPS = {"learning_rate": 3e-4, "max_train_steps": 1500}  # as long a way in more steps
PRIOR = {"with_prior_preservation": True, "class_prompt": "an icon", "num_class_images": 46}


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        group: The table that it stands in.
        label: What tables and plots call it.
        against: Name of the arm that it is compared with, which differs in nothing but the method.
        settings: Of the training, where they differ from `config`'s.
        rival: `sam`, `lora-sam`, `bi-lora` or `t-lora`; None is this project's training.
        rho: Of the rival; of T-LoRA the least rank as a share of the whole.
        few_icons: Train 5 of the 23 icons.
        over_scales: Its losses are measured at other inference scales too.
        featured: Its pictures are compared too, and its Hessian, which take longer to measure than the rest.
    """

    group: str
    label: str
    against: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    rival: str | None = None
    rho: float = 0.0
    few_icons: bool = False
    over_scales: bool = False
    featured: bool = False

    def config(self, seed: int, folder: Path, work: Path) -> TrainConfig:
        """The settings of a run of this arm.

        Args:
            seed: Decides the initial adapter, the data order, timesteps and noise, for every arm alike.
            folder: Where the run goes.
            work: Where icons and class images that several runs share are kept.
        """
        icons = work / "few-icons" if self.few_icons else ASSETS / "icons-3d"
        settings = {
            "train_batch_size": 1,
            "learning_rate": 1e-3,
            "flat_sigma": 0.0,
            "checkpointing_steps": 10**6,
            "report_to": "none",
            **MILD,
            **self.settings,
        }
        if settings.get("with_prior_preservation"):
            settings["class_data_dir"] = str(work / "class-images")
        return TrainConfig(
            pretrained_model_name_or_path=str(ASSETS / "micro-sdxl"),
            instance_data_dir=str(icons),
            instance_prompt=PROMPT,
            output_dir=str(folder),
            resolution=128,
            seed=seed,
            **settings,
        )


def run_folder(work: Path, name: str, seed: int) -> Path:
    """Where the run of the named arm with a seed leaves its adapter and what was measured of it."""
    return work / "runs" / name / f"seed-{seed}"


def make_arms() -> dict[str, Arm]:
    """Name -> arm, in the order in which they are worth training."""
    arms: dict[str, Arm] = {}

    def flat(
        name: str, plain: str, sigmas: tuple[float, ...], schedule: str = "cosine", group: str = ""
    ) -> None:
        own = arms[plain]
        for sigma in sigmas:
            suffix = "" if schedule == "cosine" else f", {schedule}"
            arms[f"{name}-{sigma}"] = Arm(
                group or own.group,
                f"Flat-{own.label} {sigma}{suffix}",
                plain,
                own.settings | {"flat_sigma": sigma, "flat_schedule": schedule},
                few_icons=own.few_icons,
            )

    def family(
        name: str,
        group: str,
        sigmas: tuple[float, ...],
        label: str = "LoRA",
        few_icons: bool = False,
        **settings: Any,
    ) -> None:
        arms[f"{name}-lora"] = Arm(group, label, None, settings, few_icons=few_icons)
        flat(f"{name}-flat", f"{name}-lora", sigmas)

    family("mild", "mild", SIGMAS)
    family("over", "overfitting", (0.1, 0.3), **OVERFITTING)
    flat("mild-flat-constant", "mild-lora", SIGMAS, "constant", "schedule")
    family("text", "text encoders", (0.1, 0.3), **TEXT_ENCODERS)
    family("all", "all layers", (0.1, 0.3), lora_layers=ALL_LAYERS)
    plain = "mild-lora"
    arms["dropout"] = Arm("regularisers", "LoRA, dropout 0.1", plain, {"lora_dropout": 0.1})
    arms["ema"] = Arm("regularisers", "LoRA, EMA 0.99", plain, {"use_ema": True, "ema_decay": 0.99})
    arms["prior"] = Arm("regularisers", "LoRA, prior preservation", plain, PRIOR)
    for steps in (125, 250, 375):
        arms[f"steps-{steps}"] = Arm("shorter", f"LoRA, {steps} steps", plain, {"max_train_steps": steps})
    for rho in RHOS:
        arms[f"sam-{rho}"] = Arm("rivals", f"SAM on merged weights, rho {rho}", plain, rival="sam", rho=rho)
    for rho in RHOS:
        arms[f"lora-sam-{rho}"] = Arm("rivals", f"LoRA-SAM, rho {rho}", plain, rival="lora-sam", rho=rho)
    for rho in RHOS:
        arms[f"bi-lora-{rho}"] = Arm("rivals", f"Bi-LoRA, rho {rho}", plain, rival="bi-lora", rho=rho)
    for share in LEAST_RANKS:  # the file is an ordinary LoRA: it is measured with all its ranks
        label = f"T-LoRA, least rank {share:g} of all"
        arms[f"t-lora-{share}"] = Arm("rivals", label, plain, rival="t-lora", rho=share)
    family("few", "few icons", (0.1, 0.3), **OVERFITTING, few_icons=True)
    over = "over-lora"
    arms["over-ema"] = Arm(
        "overfitting", "LoRA, EMA 0.99", over, OVERFITTING | {"use_ema": True, "ema_decay": 0.99}
    )
    arms["over-steps-500"] = Arm(
        "overfitting", "LoRA, 500 steps", over, OVERFITTING | {"max_train_steps": 500}
    )
    family("dora", "other adapters", (0.3,), "DoRA", use_dora=True)
    family("pissa", "other adapters", (0.3,), "PiSSA", init_lora_weights="pissa")
    # A at a quarter of the learning rate and B at four times it: LoRA+ with its usual ratio of 16.
    family("loraplus", "other adapters", (0.3,), "LoRA+", learning_rate=2.5e-4, loraplus_lr_ratio=16.0)
    for rank in (1, 16, 64):
        family(f"rank-{rank}", "ranks", (0.3,), f"LoRA (rank {rank})", rank=rank)
    family("demo", "settings of the demo", (0.1, 0.3), **DEMO)
    family("batch", "batch of 4", (0.1, 0.3), **LARGER_BATCH)
    family("rate-1e-4", "learning rate 1e-4", (0.1, 0.3), **PAPERS_RATE)
    family("rate-3e-4", "learning rate 3e-4, 1,500 steps", (0.1, 0.3), **SMALLER_STEPS)
    for name in OVER_SCALES:
        arms[name] = replace(arms[name], over_scales=True, featured=name in FEATURED)
    return arms
