"""How a LoRA starts: PEFT's initialisations, with the base's weights left as they are.

PiSSA, OLoRA and LoRA-GA start from factors A0 and B0 whose product isn't zero. PEFT subtracts `s*B0@A0` from
the base weight, which rounds it and makes the adapter one of another base. Here a second, frozen adapter
subtracts it in the forward pass: `W + s*B@A - s*B0@A0` is W at the start, whatever the precision of W. In the
saved file both are one LoRA of twice the rank.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Generator, Iterator

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora import get_eva_state_dict
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.seeds import hash64, seeded
from flatlora_diffusion.common.weights import weight_of
from flatlora_diffusion.sdxl.lora import ADAPTER, FROZEN_ADAPTER, adaptable

logger = logging.getLogger(__name__)

EVA_PASSES = 200  # it needs as many as its directions take to settle: a handful
LORA_GA_SAMPLES = 32  # whose gradients are averaged

Loss = Callable[[int], Tensor]  # the mean loss of a micro-batch, by its number


def check(models: dict[str, nn.Module], kind: str) -> None:
    """Refuse what PEFT cannot start in this way.

    Args:
        models: `unet`, and `text_encoder` and `text_encoder_2` where they are trained, with LoRA layers.
        kind: The value of --init_lora_weights.

    Raises:
        UserError: Names the layer, and what to do.
    """
    if kind in ("gaussian", "default"):
        return
    flag = f"--init_lora_weights {kind}"
    layers = _lora_layers(models)
    for name, layer in layers.items():
        base, rank = layer.get_base_layer(), _greatest_rank(layers) if kind == "eva" else layer.r[ADAPTER]
        # EVA and LoRA-GA have PEFT compute twice as many directions.
        directions = 2 * rank if kind in ("eva", "lora_ga") else rank
        if not isinstance(base, nn.Linear):
            raise UserError(
                f"{flag}: {name} is no linear layer, and only those can start so; "
                "leave it out of --lora_layers, or take gaussian"
            )
        size = base.in_features if kind == "eva" else min(base.in_features, base.out_features)
        if directions > size:
            raise UserError(
                f"{flag}: {name} is too small for --rank {rank}; give a rank of at most "
                f"{size * rank // directions}, or take gaussian"
            )
        quantized = type(base.weight) is not nn.Parameter
        if kind == "lora_ga" and (quantized or base.weight.dtype not in (torch.float32, torch.bfloat16)):
            raise UserError(
                f"{flag}: it needs gradients of the base, and {name} is "
                f"{'quantised' if quantized else base.weight.dtype}, which has none or loses small ones; "
                "use a base in bf16, or pissa"
            )


def initialise(models: dict[str, nn.Module], kind: str, *, seed: int, batch_size: int, loss: Loss) -> None:
    """Give fresh LoRA layers, whose B is zero, the factors that they start from.

    The base weights are not written to. All is a function of the seed, the data and the base.

    Args:
        models: As for `check`, which must have passed; on the device where they are trained.
        kind: The value of --init_lora_weights; `gaussian` and `default` are what they have already.
        seed: Decides what approximate decompositions draw; the global RNG is left as it was.
        batch_size: Samples that `loss` has in one micro-batch.
        loss: Called by `eva` and `lora_ga`.

    Raises:
        UserError: What the layers are shown isn't enough for `eva`, or the gradients aren't finite.
    """
    if kind in ("gaussian", "default"):
        return
    logger.info("computing the initial adapter (%s)", kind)
    layers = _lora_layers(models)
    device = next(models["unet"].parameters()).device
    with torch.no_grad(), seeded(device, hash64(seed, "initial", kind)):
        if kind == "eva":
            _take_input_directions(models, layers, loss)
            return
        if kind == "lora_ga":
            _estimate_gradients(models, layers, loss, -(-LORA_GA_SAMPLES // batch_size))
        for layer in layers.values():
            with _float_copy_of_weight(layer.get_base_layer()):
                if kind == "olora":
                    layer.olora_init(ADAPTER)
                elif kind == "lora_ga":
                    layer.lora_ga_init(ADAPTER, LoraGAConfig())
                else:
                    layer.pissa_init(ADAPTER, kind)


def subtract_initial_update(models: dict[str, nn.Module]) -> None:
    """Add a frozen adapter to all LoRA layers that takes away what they add to the base weight at present."""
    for model in models.values():
        config = copy.deepcopy(adaptable(model).peft_config[ADAPTER])
        config.lora_dropout = 0.0
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # PEFT draws what is replaced here
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # two are wanted
            adaptable(model).add_adapter(config, adapter_name=FROZEN_ADAPTER)
        adaptable(model).set_adapter([ADAPTER, FROZEN_ADAPTER])
    for layer in _lora_layers(models).values():
        for factors, sign in ((layer.lora_A, 1), (layer.lora_B, -1)):
            factors[FROZEN_ADAPTER].weight = nn.Parameter(
                sign * weight_of(factors[ADAPTER]).detach(), requires_grad=False
            )


def _lora_layers(models: dict[str, nn.Module]) -> dict[str, LoraLayer]:
    return {
        f"{part}.{name}": module
        for part, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _greatest_rank(layers: dict[str, LoraLayer]) -> int:
    return max(layer.r[ADAPTER] for layer in layers.values())


@contextlib.contextmanager
def _float_copy_of_weight(base: nn.Module) -> Generator[None]:
    """A layer with a float32 copy of its weight, which PEFT may write to; afterwards with its own again."""
    weight = base.weight
    values = dequantize_module_weight(base).detach().to(torch.float32, copy=True)
    base.weight = nn.Parameter(values, requires_grad=False)
    try:
        yield
    finally:
        base.weight = weight


def _take_input_directions(models: dict[str, nn.Module], layers: dict[str, LoraLayer], loss: Loss) -> None:
    """EVA (arXiv 2410.07170): A becomes the principal directions of a layer's inputs; every rank is kept."""
    by_base = {f"{name}.base_layer": layer for name, layer in layers.items()}
    rank = _greatest_rank(layers)
    config = LoraConfig(
        r=rank, target_modules=list(by_base), init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)
    )

    def rows(inputs: tuple[Tensor, ...], _: object, name: str) -> Tensor:
        flat = inputs[0].flatten(0, -2).contiguous()
        if len(flat) < 2 * rank:
            raise UserError(
                f"--init_lora_weights eva: {name.removesuffix('.base_layer')} has {len(flat)} inputs in a "
                f"batch, and --rank {rank} takes {2 * rank}; raise --train_batch_size, lower the rank, or "
                "leave the layer out of --lora_layers"
            )
        return flat

    # Their B is zero, so the layers compute what the base does. All models share the passes over the data.
    directions = get_eva_state_dict(
        nn.ModuleDict(models),
        _EvaBatches(),
        config,
        forward_fn=lambda _, number: loss(int(number)),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=rows,
        gather_distributed_inputs=False,  # every process is shown the same
        show_progress_bar=False,
    )
    for name, a in directions.items():
        weight = weight_of(by_base[name].lora_A[ADAPTER])
        weight.copy_(a[: len(weight)])  # the first ones are those of most variance


class _EvaBatches:
    """The numbers of the micro-batches, for PEFT to go through until all directions have settled."""

    def __len__(self) -> int:
        return EVA_PASSES

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(EVA_PASSES):
            yield torch.tensor(number)
        raise UserError(
            f"--init_lora_weights eva: the directions have not settled after {EVA_PASSES} batches: the "
            "inputs of some layer vary in fewer of them than --rank; lower it, or take gaussian"
        )


def _estimate_gradients(
    models: dict[str, nn.Module], layers: dict[str, LoraLayer], loss: Loss, batches: int
) -> None:
    """LoRA-GA (arXiv 2407.05000): leave the base weights' gradients where PEFT's initialisation reads."""
    config = LoraConfig(
        target_modules=[f"{name}.base_layer" for name in layers],
        init_lora_weights="lora_ga",  # pyright: ignore[reportArgumentType]  # PEFT's list of names lacks it
        lora_ga_config=LoraGAConfig(),
    )

    def train_step() -> None:
        for number in range(batches):
            loss(number).backward()

    with warnings.catch_warnings():
        # PEFT counts backward passes by hooks; the first layers' inputs have no gradient, and needn't.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        preprocess_loraga(nn.ModuleDict(models), config, train_step)
    for name, layer in layers.items():
        # None where no gradient arrives: the first text encoder's last layer, whose output is not used.
        gradient = getattr(layer.get_base_layer(), "_peft_loraga_grad", None)
        if gradient is not None and not gradient.isfinite().all():
            raise UserError(
                f"--init_lora_weights lora_ga: the gradient of {name} isn't finite; use bf16 or fp32"
            )
