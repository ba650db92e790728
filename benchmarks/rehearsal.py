"""A rehearsal on a GPU that isn't there: the trainer's step and drawing on tensors that only know where.

    python -m benchmarks.rehearsal                  # every mode on tiny models: devices, dtypes, shapes
    python -m benchmarks.rehearsal --full           # SDXL at 1024 px too: launches, and the memory of a step

It wants a CUDA build of torch, which needs no GPU and no driver for it; where there is none it says how to
make the environment, and does nothing. `FakeTensorMode` gives tensors with a device, a dtype and a shape, but
without numbers: a CPU tensor that meets a CUDA one raises.

What it can't tell: numbers, time, and what a driver is asked for (kernels' workspaces, memory in pieces).
Autograd's backward pass needs a driver, so the backward passes of this project's own functions are called one
by one. Launches are counted on fake CPU tensors, with the whole backward pass. Layers of bitsandbytes run
kernels that know no fake tensors; of quantised bases only the size is told.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.bases import SDXL
from flatlora_diffusion import FlatLoRA
from flatlora_diffusion.draw.decoding import decode
from flatlora_diffusion.draw.pipeline import Drawing, _denoise
from flatlora_diffusion.draw.samplers import SAMPLERS
from flatlora_diffusion.flat import fused, layer, noise, noisy_base
from flatlora_diffusion.sdxl.encoding import PromptEmbeds, encode_images
from flatlora_diffusion.sdxl.lora import UNET_TARGETS, add_lora, enable_gradient_checkpointing
from flatlora_diffusion.sdxl.loss import diffusion_losses
from flatlora_diffusion.train.ema import AdapterAverage
from flatlora_diffusion.train.update_norms import UpdateNorms

HOW = """this torch has no CUDA build, so there is nothing to rehearse on. To make one that has:
    python3 -m venv /somewhere/cuda && /somewhere/cuda/bin/pip install torch -e '.[dev]'
    /somewhere/cuda/bin/python -m benchmarks.rehearsal
(5 GB; without a version or a constraint, pip takes the CUDA build on Linux)"""
GIB = 2**30
NO_LAUNCH = (
    *("view", "t.", "detach", "transpose", "permute", "slice", "unsqueeze", "squeeze", "expand", "split"),
    *(
        "select",
        "alias",
        "as_strided",
        "reshape",
        "empty",
        "chunk",
        "unbind",
        "lift",
        "prim",
        "sym_",
        "_unsafe",
    ),
)
ALL_LAYERS = (*UNET_TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2")
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": 1,
    "projection_class_embeddings_input_dim": 112,
    "cross_attention_dim": 128,
    "norm_num_groups": 8,
}
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 600,
    "projection_dim": 64,
    "bos_token_id": 598,
    "eos_token_id": 599,
    "pad_token_id": 599,
}
TINY_VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
}


class Watch(TorchDispatchMode):
    """Counts what would be launched, and the bytes of the tensors that live on a device.

    Args:
        device: Its type.
        known: Models whose tensors were there before.
    """

    def __init__(self, device: str, *known: nn.Module) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.live = self.peak = 0
        self._device = device
        self._seen = {storage_of(t) for model in known for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls[str(function)] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device:
                self._note(tensor)
        return result

    @property
    def launches(self) -> int:
        """Operations that are more than another view of a tensor."""
        return sum(
            number
            for name, number in self.calls.items()
            if not name.removeprefix("aten.").startswith(NO_LAUNCH)
        )

    def _note(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def storage_of(tensor: Tensor) -> int:
    """What tells storages apart: fake ones have no address."""
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def without_a_driver() -> Iterator[None]:
    """Fake tensors for all; what asks a driver, or a tensor's address, is answered here."""

    def normals(draw: noise.GaussianDraw) -> Tensor:
        std = draw.row_std
        return torch.randn((len(std), draw.inputs), dtype=std.dtype, device=std.device)

    def version(tensor: Tensor) -> tuple[object, ...]:
        return id(tensor), tensor._version, tensor.dtype, tensor.device

    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (torch.amp.autocast_mode.torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext()),
            (noise.GaussianDraw, "_normals", normals),
            (layer, "_version", version),
            (nn.Module, "_apply", _apply),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which would write through `.data`: fake tensors don't change their device."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            moved = function(parameter.detach())
            if moved is not parameter and (moved.device, moved.dtype) != (parameter.device, parameter.dtype):
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


class OwnFunctions:
    """Within the block, notes what our own autograd functions keep, to call their backward passes by hand."""

    def __init__(self) -> None:
        self._noted: list[tuple[Any, Any, Tensor, tuple[Any, ...]]] = []
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> OwnFunctions:
        for function in (fused.FusedLinear, fused.FusedConvolution, noisy_base._NoisyForward):
            self._patches.enter_context(mock.patch.object(function, "forward", self._noting(function)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _noting(self, function: Any) -> Any:
        forward = function.forward

        def noting(ctx: Any, *args: Any) -> Tensor:
            result = forward(ctx, *args)
            kept = SimpleNamespace(
                **vars(ctx), saved_tensors=ctx.to_save, needs_input_grad=ctx.needs_input_grad
            )
            self._noted.append((function, kept, result, args))
            return result

        return staticmethod(noting)

    def backward(self) -> int:
        """Call each; gradients have shape, dtype and device of what they belong to. How many there were."""
        for function, kept, result, args in self._noted:
            gradients = function.backward.__wrapped__(kept, torch.randn_like(result))
            for given, gradient in zip(args, gradients, strict=False):
                if isinstance(gradient, Tensor):
                    assert (gradient.shape, gradient.dtype) == (given.shape, given.dtype), function
                    assert gradient.device.type == given.device.type == "cuda", function
        return len(self._noted)


def scheduler() -> DDPMScheduler:
    """The noise levels that SDXL is trained with."""
    with unset_fake_temporarily():
        return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def losses(unet: nn.Module, batch: int, side: int, width: int, pooled: int, device: str) -> Tensor:
    """The trainer's loss of a batch of random latents and embeddings."""
    dtype = unet.conv_in.weight.dtype
    shape = batch, 4, side, side
    prompts = PromptEmbeds(
        torch.randn(batch, 77, width, device=device, dtype=dtype),
        torch.randn(batch, pooled, device=device, dtype=dtype),
    )
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        return diffusion_losses(
            unet,
            scheduler(),
            torch.randn(shape, device=device),
            torch.randn(shape, device=device),
            torch.full((batch,), 500, device=device),
            prompts,
            torch.full((batch, 6), 8 * side, device=device),
            snr_gamma=5.0,
        ).mean()


def rehearse_step(dtype: torch.dtype, source: str, **mode: Any) -> str:
    """A step with text encoders, what follows it, and a step after these were frozen and left the card."""
    with without_a_driver(), OwnFunctions() as functions:
        config = CLIPTextConfig(**TINY_TEXT)
        models: dict[str, nn.Module] = {
            "unet": UNet(**TINY_UNET),
            "text_encoder": CLIPTextModel(config),
            "text_encoder_2": CLIPTextModelWithProjection(config),
        }
        for model in models.values():
            model.requires_grad_(False).to(dtype)
        targets = ALL_LAYERS if mode.get("all_layers") else UNET_TARGETS
        dora = mode.get("dora", False)
        add_lora(models, rank=4, alpha=4, seed=0, unet_targets=targets, use_dora=dora)
        for model in models.values():
            if mode.get("checkpointing"):
                enable_gradient_checkpointing(model)
            model.to("cuda").train()
        flat = FlatLoRA(list(models.values()), sigma=0.1, total_steps=9, schedule="constant", noise=source)
        text_encoders = [model for name, model in models.items() if name != "unet"]
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            for text_encoder in text_encoders:
                ids = torch.zeros(2, 77, dtype=torch.long, device="cuda")
                text_encoder(ids, output_hidden_states=True)
        losses(models["unet"], 2, 8, 128, 64, "cuda")
        done = functions.backward()
        norms, average = UpdateNorms(models.values()), AdapterAverage(models.values(), 0.9)
        norms.measure()
        average.step()
        for text_encoder in text_encoders:
            text_encoder.requires_grad_(False).eval().to("cpu")
        # Moving a fake model makes new parameters: the average is of those on the card before.
        norms.measure()
        average.step()
        flat.step()
        losses(models["unet"], 2, 8, 128, 64, "cuda")
        models["unet"].eval()
        with torch.no_grad():
            losses(models["unet"], 2, 8, 128, 64, "cuda")
        flat.remove()
    return f"{done} backward passes by hand"


def rehearse_drawing(dtype: torch.dtype, name: str) -> str:
    """What validation, evaluation and the page draw with: one of the samplers, and decoding."""
    own = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    with without_a_driver():
        unet, vae = (
            model.to("cuda", dtype).eval() for model in (UNet(**TINY_UNET), AutoencoderKL(**TINY_VAE))
        )
        pipeline = StableDiffusionXLPipeline(
            vae=vae,
            unet=unet,
            scheduler=own,
            add_watermarker=False,
            **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
        )
        pipeline.set_progress_bar_config(disable=True)
        conditions = {
            f"{sign}{kind}": torch.randn(shape, device="cuda", dtype=dtype)
            for sign in ("", "negative_")
            for kind, shape in (("prompt_embeds", (2, 77, 128)), ("pooled_prompt_embeds", (2, 64)))
        }
        with _schedules_with_numbers():
            latents = _denoise(pipeline, [1, 2], Drawing(16, 16, 3, sampler=name), None, **conditions)
        pixels = decode(vae, latents)
        assert latents.device.type == pixels.device.type == "cuda"
        encode_images(vae.float(), torch.randn(1, 3, 16, 16))
    return f"{latents.dtype} latents, {pixels.dtype} pixels"


@contextlib.contextmanager
def _schedules_with_numbers() -> Iterator[None]:
    """Samplers that keep their schedule in numbers, which decide their way: timesteps alone know a device."""
    import flatlora_diffusion.draw.pipeline as drawing

    make = drawing.sampler

    def sampler(name: str, own: Any) -> Any:
        with unset_fake_temporarily():
            made = copy.deepcopy(make(name, own))
        set_timesteps = made.set_timesteps

        def set_with_numbers(steps: int | None = None, device: Any = None, **settings: Any) -> None:
            with unset_fake_temporarily():
                set_timesteps(steps, device="cpu", **settings)
            made.timesteps = made.timesteps.to(device)

        made.set_timesteps = set_with_numbers
        if hasattr(made, "index_for_timestep"):
            made.index_for_timestep = lambda *_, **__: 0
        return made

    with mock.patch.object(drawing, "sampler", sampler):
        yield


# SDXL at 1024 px.


def full_unet(device: str, dtype: torch.dtype, checkpointing: bool) -> nn.Module:
    """SDXL's UNet with the paper's adapter."""
    unet = UNet(**SDXL.unet).requires_grad_(False).to(dtype)
    add_lora({"unet": unet}, rank=4, alpha=4, seed=0)
    if checkpointing:
        enable_gradient_checkpointing(unet)
    return unet.to(device).train()


def kept(unet: nn.Module, batch: int) -> tuple[float, float]:
    """GiB that a forward pass keeps for the backward pass, and of the greatest part that is recomputed."""
    own = {storage_of(p) for p in unet.parameters()}
    parts: list[int] = []

    def weighed(work: Callable[[], Any]) -> tuple[Any, int]:
        sizes: dict[int, int] = {}
        holding: list[Any] = []

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                sizes[storage._cdata] = storage.nbytes()
                holding.append(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return work(), sum(sizes.values())

    def part(function: Callable[..., Any], *args: Any) -> Any:
        """A part that is recomputed: what it keeps then, and of it nothing but its inputs now."""
        result, size = weighed(lambda: function(*args))
        parts.append(size)
        inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()]
        return _Keep.apply(result.detach().requires_grad_(), *inputs)

    for module in unet.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = part
    _, size = weighed(lambda: losses(unet, batch, 128, 2048, 1280, "cuda"))
    return size / GIB, max(parts, default=0) / GIB


class _Keep(torch.autograd.Function):
    """A part that keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return result.view_as(result)


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """The kernels that a card takes: flash in half precision, the efficient one in float32."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if query.dtype == torch.float32:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, None, query.requires_grad)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def memory_lines() -> list[str]:
    """What a step at 1024 px keeps, and what drawing takes, in lines."""
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        for checkpointing in (True, False):
            with (
                without_a_driver(),
                mock.patch.object(nn.functional, "scaled_dot_product_attention", attention),
            ):
                unet = full_unet("cuda", dtype, checkpointing)
                weights = sum(p.nbytes for p in unet.parameters()) / GIB
                plain, part = kept(unet, 1)
                flat = FlatLoRA(unet, sigma=0.1, total_steps=9, schedule="constant")
                noisy, _ = kept(unet, 1)
                flat.remove()
            lines.append(
                f"{dtype}, checkpointing {checkpointing}: weights {weights:.2f} GiB; kept a sample "
                f"{plain:.2f} (Flat {noisy:.2f}); the greatest part that is recomputed {part:.2f}"
            )
            say(lines[-1])
    for dtype in (torch.bfloat16, torch.float32):
        with without_a_driver(), torch.no_grad():
            vae = AutoencoderKL(**SDXL.vae).to("cuda", dtype)
            vae.register_to_config(force_upcast=False)
            for side in (128, 64):
                with Watch("cuda", vae) as watch:
                    decode(vae, torch.randn(1, 4, side, side, device="cuda", dtype=dtype))
                lines.append(f"{dtype}, decoding {8 * side} px: {watch.peak / GIB:.2f} GiB")
                say(lines[-1])
            if dtype == torch.float32:
                with Watch("cuda", vae) as watch:
                    encode_images(vae, torch.randn(1, 3, 1024, 1024))
                lines.append(f"{dtype}, encoding 1024 px: {watch.peak / GIB:.2f} GiB")
                say(lines[-1])
        with without_a_driver(), torch.no_grad():
            unet = full_unet("cuda", dtype, False).eval()
            with Watch("cuda", unet) as watch:
                losses(unet, 2, 128, 2048, 1280, "cuda")
            lines.append(f"{dtype}, denoising one guided picture: {watch.peak / GIB:.2f} GiB")
            say(lines[-1])
    return lines


def launches() -> tuple[int, int]:
    """Of a step of SDXL's UNet with checkpointing, in bf16: plain LoRA's, Flat-LoRA's."""
    counted = []
    for noisy in (False, True):
        with without_a_driver():
            unet = full_unet("cpu", torch.bfloat16, True)
            flat = FlatLoRA(unet, sigma=0.1 * noisy, total_steps=9, schedule="constant")
            for _ in range(1 + noisy):  # the first step with noise also computes what is kept for all
                with Watch("cpu", unet) as watch:
                    losses(unet, 1, 128, 2048, 1280, "cpu").backward()
                flat.step()
            counted.append(watch.launches)
    return counted[0], counted[1]


def say(line: str) -> None:
    """Print at once: a rehearsal takes minutes."""
    print(line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line; the number of modes that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="SDXL at 1024 px too (minutes)")
    given = parser.parse_args(arguments)
    if torch.version.cuda is None:
        say(HOW)
        return 0
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    work: dict[str, Callable[[], str]] = {}
    for dtype, source, mode in (
        (brain, "table", {}),
        (brain, "gaussian", {"checkpointing": True}),
        (half, "table", {"checkpointing": True}),
        (half, "gaussian", {"all_layers": True}),
        (single, "table", {"all_layers": True}),
        (single, "gaussian", {}),
        (brain, "table", {"dora": True}),
        (half, "table", {"dora": True, "checkpointing": True, "all_layers": True}),
    ):
        name = f"step, {dtype}, {source}{''.join(f', {word}' for word in mode)}"
        work[name] = lambda dtype=dtype, source=source, mode=mode: rehearse_step(dtype, source, **mode)
    for dtype in (half, brain, single):
        for name in SAMPLERS:
            work[f"drawing, {dtype}, {name}"] = lambda dtype=dtype, name=name: rehearse_drawing(dtype, name)
    failed = 0
    for name, rehearse in work.items():
        try:
            say(f"{name}: {rehearse()}")
        except DataDependentOutputException:
            say(f"{name}: can't be told, it asks a tensor for a number")
        except Exception as error:
            failed += 1
            say(f"{name}: FAILED, {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if given.full:
        plain, noisy = launches()
        say(f"launches of a step with checkpointing: plain {plain}, Flat-LoRA {noisy - plain} more")
        memory_lines()
    return failed


if __name__ == "__main__":
    sys.exit(main())
