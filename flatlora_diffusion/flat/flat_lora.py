"""Flat-LoRA for any PyTorch model with PEFT LoRA layers: one object that attaches, steps and detaches."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TypedDict

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from flatlora_diffusion.flat.hooks import (
    Detach,
    attach_to_attention,
    attach_to_layer,
    attach_to_module,
    is_attention,
    is_diffusers_attention,
)
from flatlora_diffusion.flat.layer import Contents, PerturbedLayer, Prepared
from flatlora_diffusion.flat.noise import SCHEDULES, SOURCES, NoiseSource, sigma_at
from flatlora_diffusion.flat.prepare import prepare

_PARALLEL: tuple[type[nn.Module], ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class FlatLoRAState(TypedDict):
    """All that decides the noise of the steps to come."""

    global_step: int
    sigma: float
    total_steps: int
    schedule: str
    seed: int
    noise: str


class FlatLoRA:
    """Trains LoRA layers under random noise on their merged weights (Flat-LoRA, arXiv 2409.14396).

    While a model is in `train()` mode, each LoRA layer of its computes with `W + s*B@A + eps`, where

        eps[i, j] = sigma_t / sqrt(n) * ||(W + s*B@A)[i, :]||_2 * z[i, j],    z ~ N(0, 1)

    (equation 7), so that the adapter minimises the expected loss around the merged weight (equation 4). One
    `eps` holds for all micro-batches of an optimizer step; `step` moves on to the next. Noise behaves like
    dropout: none in `eval()` mode, and never written into a parameter. It is a function of (seed, step, rank,
    layer name), so nothing but the step needs to be saved, and the global RNG is left alone.

    Args:
        models: A module, or several, whose LoRA layers are perturbed. Names in `layers` are those of
            `named_modules()`, preceded by the index of the model where there are several.
        sigma: Strength of the noise at the end of its schedule, relative to the norm of each filter. The
            paper uses 0.1 for SDXL, 0.05 for T5 and Llama, 0.15 for CLIP's vision transformer.
        total_steps: Optimizer steps of the run, over which sigma rises.
        schedule: `cosine` (the paper's), `linear` or `constant`.
        seed: Decides the noise.
        noise: `table` (windows into one table of normals: fast) or `gaussian` (fresh normals).
        adapter_name: Perturb only layers that have this adapter, and only while it is active; all adapters by
            default.

    Raises:
        ValueError: A model without LoRA layers, a LoRA layer of an unsupported kind, a model that has
            Flat-LoRA attached already, or an argument out of range. Nothing stays attached.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        *,
        sigma: float,
        total_steps: int,
        schedule: str = "cosine",
        seed: int = 0,
        noise: str = "table",
        adapter_name: str | None = None,
    ) -> None:
        self._adapter_name = adapter_name
        self._configure(sigma, total_steps, schedule, seed, noise)
        self.global_step = 0
        self._pauses = 0
        self._detach: list[Detach] = []
        self._perturbed: dict[str, PerturbedLayer] = {}
        models = [models] if isinstance(models, nn.Module) else list(models)
        try:
            for index, model in enumerate(models):
                self._attach(_unwrap(model), f"{index}." if len(models) > 1 else "")
            if not models:
                raise ValueError("models is empty; pass the models whose LoRA layers are to be perturbed")
        except BaseException:
            self.remove()
            raise
        self._source = self._make_source()

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """Qualified name -> the PEFT layer that is perturbed."""
        return {name: perturbed.layer for name, perturbed in self._perturbed.items()}

    @property
    def global_step(self) -> int:
        """Optimizer steps done. Set it to resume a run: it alone decides the noise and its strength."""
        return self._global_step

    @global_step.setter
    def global_step(self, step: int) -> None:
        # Not every caller is checked for types.
        if not isinstance(step, int) or step < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"global_step={step!r} must be an integer >= 0")
        self._global_step = step
        # What was prepared is of an earlier moment: some optimizers write through `parameter.data`, which no
        # version counter sees.
        self._begin_moment()

    @property
    def sigma_t(self) -> float:
        """Strength of the noise at the present step."""
        return sigma_at(self._sigma, self._global_step, self._total_steps, self._schedule)

    def step(self) -> None:
        """Next noise, next sigma: call it once after each `optimizer.step()`."""
        self.global_step += 1

    def row_std(self, name: str) -> Tensor:
        """Standard deviation of the noise on each row of a layer's merged weight at this step: (m,), float32.

        With DoRA the merged weight is `magnitude * (W + s*B@A) / ||W + s*B@A||`.
        """
        layer = self._perturbed[name]
        norms = self._prepared(layer).row_norms
        scale = layer.dora_scale()
        if scale is not None:
            norms = norms * scale.abs()
        return norms * (self.sigma_t / layer.shape[1] ** 0.5)

    def epsilon(self, name: str) -> Tensor:
        """The noise (m, n) on a layer's merged weight at this step, in the weight's dtype.

        The forward pass in training computes with `W + epsilon`, by a multiply-add that rounds once where
        that sum rounds twice. Convolutions count as (m, in * kernel).
        """
        layer = self._perturbed[name]
        eps = self._prepared(layer).draw.epsilon()
        scale = layer.dora_scale()
        return eps if scale is None else eps * scale[:, None].to(eps.dtype)

    @contextmanager
    def paused(self) -> Generator[None]:
        """No noise inside the `with` block, whatever the mode of the models."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def remove(self) -> None:
        """Take every processor and hook away; the models are as they were. May be called twice."""
        while self._detach:
            self._detach.pop()()
        self.off(list(self._perturbed.values()))

    def state_dict(self) -> FlatLoRAState:
        """All that decides the noise of the steps to come."""
        return {
            "global_step": self._global_step,
            "sigma": self._sigma,
            "total_steps": self._total_steps,
            "schedule": self._schedule,
            "seed": self._seed,
            "noise": self._noise_name,
        }

    def load_state_dict(self, state: FlatLoRAState) -> None:
        """Continue where `state_dict` was taken; its settings replace those given at construction."""
        self._configure(
            state["sigma"], state["total_steps"], state["schedule"], state["seed"], state["noise"]
        )
        self._source = self._make_source()
        self.global_step = state["global_step"]

    def on(self, layers: Sequence[PerturbedLayer]) -> None:
        """Perturb those of the layers that are in training (called by the hooks)."""
        if self._pauses or self.sigma_t == 0:
            return
        moment = self._now()
        perturbed: list[PerturbedLayer] = []
        all_prepared = True
        for layer in layers:
            if layer.training:
                contents = layer.contents()
                if self._is_perturbed(contents):
                    perturbed.append(layer)
                    all_prepared = all_prepared and layer.is_prepared(moment, contents)
        if not all_prepared:
            self._prepare_all()
        try:
            for layer in perturbed:
                layer.perturb()
        except BaseException:
            self.off(perturbed)
            raise

    def off(self, layers: Sequence[PerturbedLayer]) -> None:
        """Restore all of the layers (called by the hooks)."""
        for layer in layers:
            layer.restore()

    def _configure(self, sigma: float, total_steps: int, schedule: str, seed: int, noise: str) -> None:
        if not math.isfinite(sigma) or sigma < 0:
            raise ValueError(
                f"{sigma=} must be finite and >= 0 (0 is plain LoRA; the paper uses 0.1 for SDXL)"
            )
        if total_steps < 1:
            raise ValueError(f"{total_steps=} must be at least 1: the number of optimizer steps of the run")
        if schedule not in SCHEDULES:
            raise ValueError(f"{schedule=} is unknown; choose one of {', '.join(SCHEDULES)}")
        if noise not in SOURCES:
            raise ValueError(f"{noise=} is unknown; choose one of {', '.join(SOURCES)}")
        self._sigma = float(sigma)
        self._total_steps = total_steps
        self._schedule = schedule
        self._seed = seed
        self._noise_name = noise

    def _make_source(self) -> NoiseSource:
        elements = sum(math.prod(layer.shape) for layer in self._perturbed.values())
        return SOURCES[self._noise_name](self._seed, elements)

    def _attach(self, model: nn.Module, prefix: str) -> None:
        modules: dict[str, nn.Module] = dict(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
        hosts: dict[str, list[PerturbedLayer]] = {}
        for name, module in modules.items():
            if not isinstance(module, LoraLayer):
                continue
            if self._adapter_name is not None and self._adapter_name not in module.lora_A:
                continue
            layer = PerturbedLayer(prefix + name, module)
            self._perturbed[layer.name] = layer
            hosts.setdefault(_host(name, modules), []).append(layer)
        if not hosts:
            wanted = (
                "LoRA layer"
                if self._adapter_name is None
                else f"LoRA layer with adapter {self._adapter_name!r}"
            )
            raise ValueError(
                f"{type(model).__name__} has no {wanted}; call model.add_adapter(LoraConfig(...)) first"
            )
        for name, layers in hosts.items():
            host = modules[name]
            if is_diffusers_attention(host):
                self._detach.append(attach_to_attention(host, layers, self))
            elif host is layers[0].module:
                self._detach.append(attach_to_layer(layers[0], self))
            else:
                self._detach.append(attach_to_module(host, layers, self))

    def _is_perturbed(self, contents: Contents) -> bool:
        names = contents.names
        return bool(names) if self._adapter_name is None else self._adapter_name in names

    def _begin_moment(self) -> None:
        self._moment, self._rank = object(), _rank()

    def _now(self) -> object:
        """The moment for which layers must be prepared; another process is another one."""
        if self._rank != _rank():
            self._begin_moment()
        return self._moment

    def _prepare_all(self) -> None:
        """Prepare all layers that the noise of this step reaches, together."""
        training = [(layer, layer.contents()) for layer in self._perturbed.values() if layer.training]
        self._prepare([(layer, contents) for layer, contents in training if self._is_perturbed(contents)])

    def _prepare(self, layers: Sequence[tuple[PerturbedLayer, Contents]]) -> None:
        key = self._seed, self._global_step, self._rank
        prepare(layers, self._moment, self.sigma_t, self._source, key)

    def _prepared(self, layer: PerturbedLayer) -> Prepared:
        """What holds for a layer at this step, whether it is in training or not."""
        contents = layer.contents()
        if not layer.is_prepared(self._now(), contents):
            self._prepare([(layer, contents)])
        return layer.prepared


def _host(name: str, modules: dict[str, nn.Module]) -> str:
    """Name of the module to hang a layer's noise on: the attention block around it, else the layer itself."""
    ancestor = name
    while ancestor:
        ancestor = ancestor.rpartition(".")[0]
        if is_diffusers_attention(modules[ancestor]) or is_attention(modules[ancestor]):
            return ancestor
    return name


def _rank() -> int:
    """In data-parallel runs each rank draws noise of its own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def _unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside the wrappers of data parallelism and torch.compile: names must not change."""
    while isinstance(model, _PARALLEL) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod" if hasattr(model, "_orig_mod") else "module")
    return model
