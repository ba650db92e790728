"""Callbacks: when they are called, what they see, what they may replace, and what becomes of their errors."""

import dataclasses
import json
import re
import signal
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.errors import RunInterruptedError, UserError
from flatlora_diffusion.common.lock import LOCK_NAME
from flatlora_diffusion.flat.hooks import FlatLoRAAttnProcessor
from flatlora_diffusion.flat.noise import sigma_at
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.callbacks import Callback
from tests.processes import in_processes
from tests.tiny import assert_equal, run

EVENTS = ("on_train_begin", "on_step_end", "on_checkpoint", "on_train_end")
METHODS = (*EVENTS, "loss", "backward")


class Notes(Callback):
    """Notes every call, and changes nothing."""

    def __init__(self):
        self.calls = []

    def note(self, name, run):
        self.calls.append((name, run.step))

    def on_train_begin(self, run):
        self.note("begin", run)

    def on_step_end(self, run):
        self.note("step", run)

    def on_checkpoint(self, run):
        assert (run.output / f"checkpoint-{run.step}" / WEIGHTS_NAME).is_file()
        self.note("checkpoint", run)

    def on_train_end(self, run):
        assert not (run.output / WEIGHTS_NAME).exists()
        self.note("end", run)

    def loss(self, run, compute):
        self.note("loss", run)
        return compute()

    def backward(self, run, compute):
        self.note("backward", run)
        return compute()


def trained(run) -> list[torch.nn.Parameter]:
    return [p for model in run.models.values() for p in model.parameters() if p.requires_grad]


def step_calls(step: int) -> list[tuple[str, int]]:
    """Those of a step with two micro-batches."""
    return [("backward", step), ("loss", step), ("loss", step), ("step", step + 1)]


@pytest.mark.slow
def test_a_callback_that_changes_nothing_leaves_the_bits(config, tmp_path):
    settings = {"train_text_encoder": True, "lora_dropout": 0.1, "flat_sigma": 0.3, "use_ema": True}
    config = dataclasses.replace(config, max_train_steps=2, gradient_accumulation_steps=2, **settings)
    plain = run(config)
    notes = Notes()
    assert_equal(run(config, callbacks=[Callback(), notes], output_dir=str(tmp_path / "noted")), plain)
    assert notes.calls == [("begin", 0), *step_calls(0), *step_calls(1), ("end", 2)]


@pytest.mark.slow
def test_both_arms_of_a_comparison_call_and_say_which_they_are(config):
    seen = []

    class Look(Callback):
        def on_step_end(self, run):
            assert run.sigma == (0.0 if run.method == "LoRA" else sigma_at(0.1, run.step - 1, 2, "cosine"))
            seen.append((run.method, run.output.name, run.config.flat_sigma, run.step, run.total_steps))

    undrawn = {"num_validation_images": 0}
    train(dataclasses.replace(config, compare=True, max_train_steps=2, **undrawn), callbacks=[Look()])
    assert seen == [
        ("LoRA", "lora", 0.0, 1, 2),
        ("LoRA", "lora", 0.0, 2, 2),
        ("Flat-LoRA", "flat_lora", 0.1, 1, 2),
        ("Flat-LoRA", "flat_lora", 0.1, 2, 2),
    ]


@pytest.mark.slow
def test_a_run_is_seen_as_it_is(config):
    losses = []

    class Look(Callback):
        def on_train_begin(self, run):
            assert (run.step, run.loss, run.sigma) == (0, None, None)
            assert list(run.models) == ["unet", "text_encoder", "text_encoder_2"]
            assert run.output == Path(run.config.output_dir) and run.accelerator.is_main_process
            layers = [m for model in run.models.values() for m in model.modules() if isinstance(m, LoraLayer)]
            assert set(run.flat.layers.values()) == set(layers)
            own = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
            assert sorted(own) == sorted(map(id, trained(run)))

        def on_step_end(self, run):
            losses.append(run.loss)
            assert run.flat.global_step == run.step

    run(config, train_text_encoder=True, max_train_steps=2, callbacks=[Look()])
    assert losses == json.loads(Path(config.output_dir, "summary.json").read_text())["losses"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_callbacks(config):
    config = dataclasses.replace(config, max_train_steps=5, gradient_accumulation_steps=2)
    config = dataclasses.replace(config, checkpointing_steps=2)

    class Stopped(Notes):
        def __init__(self, step):
            super().__init__()
            self.step = step

        def on_step_end(self, run):
            super().on_step_end(run)
            if run.step == self.step:  # it is answered in the step that follows
                signal.raise_signal(signal.SIGINT)

    first, second, third = Stopped(1), Stopped(3), Notes()
    resumed = dataclasses.replace(config, resume_from_checkpoint="latest")
    with pytest.raises(RunInterruptedError):
        train(config, callbacks=[first])
    assert first.calls == [("begin", 0), *step_calls(0), *step_calls(1), ("checkpoint", 2)], "written once"
    with pytest.raises(RunInterruptedError):
        train(dataclasses.replace(resumed, checkpointing_steps=100), callbacks=[second])
    assert second.calls == [("begin", 2), *step_calls(2), *step_calls(3), ("checkpoint", 4)]
    train(resumed, callbacks=[third])
    assert third.calls == [("begin", 4), *step_calls(4), ("end", 5)]
    third.calls.clear()
    train(resumed, callbacks=[third])
    assert third.calls == [], "it was complete"


@pytest.mark.slow
def test_a_loss_that_is_replaced_is_descended(config, tmp_path):
    """A penalty `w * ||p||^2` adds `2 w p` to the gradient of the step, whatever its micro-batches."""
    config = dataclasses.replace(config, max_train_steps=1, gradient_accumulation_steps=2)

    class Look(Callback):
        def backward(self, run, compute):
            self.loss_there = compute()
            self.gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained(run)]
            self.parameters = [p.detach().clone() for p in trained(run)]
            return self.loss_there

    class Penalty(Callback):
        def loss(self, run, compute):
            return compute() + 0.5 * sum(p.square().sum() for p in trained(run))

    plain, penalised = Look(), Look()
    run(config, callbacks=[plain])
    run(config, callbacks=[penalised, Penalty()], output_dir=str(tmp_path / "penalised"))
    assert_equal(dict(enumerate(plain.parameters)), dict(enumerate(penalised.parameters)))
    for without, with_it, p in zip(plain.gradients, penalised.gradients, plain.parameters, strict=True):
        torch.testing.assert_close(with_it, without + p)
    size = sum(p.square().sum() for p in plain.parameters)
    torch.testing.assert_close(penalised.loss_there, plain.loss_there + 0.5 * size)
    told = json.loads((tmp_path / "penalised" / "summary.json").read_text())["losses"]
    assert told == [pytest.approx(penalised.loss_there.item())]


@pytest.mark.slow
def test_gradients_that_are_replaced_update(config):
    """With the parameters for gradients, the first step of Adam takes each by the learning rate towards 0."""
    seen = {}

    class Decay(Callback):
        def backward(self, run, compute):
            seen["start"] = [p.detach().clone() for p in trained(run)]
            for p in trained(run):
                p.grad = p.detach().clone()
            return torch.tensor(0.25)

        def on_train_end(self, run):
            seen["end"] = [p.detach().clone() for p in trained(run)]
            with torch.no_grad():
                for p in trained(run):
                    p.fill_(0.5)

    changes = {"max_train_steps": 1, "gradient_accumulation_steps": 2, "adam_weight_decay": 0.0}
    tensors = run(config, **changes, callbacks=[Decay()])
    for start, end in zip(seen["start"], seen["end"], strict=True):
        large = start.abs() > 1e-3  # of AdamW's epsilon, and of a gradient's norm that is clipped
        torch.testing.assert_close(end[large], (start - config.learning_rate * start.sign())[large])
        assert torch.equal(start == 0, end == 0)
    assert json.loads(Path(config.output_dir, "summary.json").read_text())["losses"] == [0.25]
    assert all((tensor == 0.5).all() for tensor in tensors.values()), "on_train_end comes before the saving"


@pytest.mark.slow
def test_a_callbacks_loss_that_is_not_finite_ends_the_run(config):
    class Diverging(Callback):
        def backward(self, run, compute):
            return compute() * torch.nan

    with pytest.raises(UserError, match="the loss became nan at step 1 and nothing was updated"):
        train(config, callbacks=[Diverging()])


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_ends_the_run(config):
    seen = {}

    class Spoiling(Callback):
        def backward(self, run, compute):
            loss = compute()
            seen["before"] = [(p, p.detach().clone()) for p in trained(run)]
            trained(run)[-1].grad.fill_(torch.nan)
            return loss

    with pytest.raises(UserError, match="the gradient's norm became nan at step 1 and nothing was updated"):
        train(config, callbacks=[Spoiling()])
    assert all(torch.equal(p, old) for p, old in seen["before"])


@pytest.mark.parametrize("method", ["loss", "backward"])
def test_two_that_replace_the_same_are_refused(config, method):
    one, other = (type(name, (Callback,), {method: lambda *_: None})() for name in ("One", "Other"))
    with pytest.raises(ValueError, match=f"One and Other define `{method}`: a run can have only one"):
        train(config, callbacks=[one, Notes.__base__(), other])
    assert not Path(config.output_dir).exists()


def test_what_is_no_callback_is_refused(config):
    with pytest.raises(TypeError, match=r"class .*Notes.* is no callback; give objects of classes derived"):
        train(config, callbacks=[Notes])
    assert not Path(config.output_dir).exists()


def hung(model) -> list:
    """What the noise has hung on a model."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    own = [
        hook for hook in hooks if (getattr(hook, "__module__", None) or "").startswith("flatlora_diffusion")
    ]
    processors = getattr(model, "attn_processors", {}).values()
    return [*own, *(p for p in processors if isinstance(p, FlatLoRAAttnProcessor))]


@pytest.mark.slow
def test_an_error_of_a_callback_is_its_authors_and_leaves_nothing_behind(config):
    """Of each method in turn, as a run calls them; each run goes on in the folder that the last one left."""
    models = {}

    class Keeping(Callback):
        def on_train_begin(self, run):
            models.update(run.models)
            assert all(hung(model) for model in models.values())

    def fail(self, run, *arguments):
        if method == "on_train_begin":
            Keeping.on_train_begin(self, run)
        raise ZeroDivisionError(f"mine, in {method}")

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    config = dataclasses.replace(config, max_train_steps=2, checkpointing_steps=1, train_text_encoder=True)
    methods = ("on_train_begin", "backward", "loss", "on_step_end", "on_checkpoint", "on_train_end")
    assert sorted(methods) == sorted(METHODS)
    for method in methods:
        models.clear()
        with pytest.raises(ZeroDivisionError, match=f"mine, in {method}"):
            train(config, callbacks=[type("Broken", (Keeping,), {method: fail})()])
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert models and not any(hung(model) for model in models.values())
        assert not (Path(config.output_dir) / LOCK_NAME).exists()
        assert not (Path(config.output_dir) / WEIGHTS_NAME).exists()
        config = dataclasses.replace(config, resume_from_checkpoint="latest")
    train(config)  # the folder is free, and sound
    assert (Path(config.output_dir) / WEIGHTS_NAME).exists()


@pytest.mark.distributed
def test_every_process_calls_and_has_the_mean_gradient(config):
    config = dataclasses.replace(config, max_train_steps=2, checkpointing_steps=1, train_batch_size=1)

    class Look(Notes):
        def backward(self, run, compute):
            loss = super().backward(run, compute)
            self.calls.append(sum(p.grad.double().square().sum().item() for p in trained(run)))
            self.calls.append(("own loss", loss.item()))
            return loss

    def work(rank):
        look = Look()
        train(config, callbacks=[look])
        return look.calls

    one, other = in_processes(work)
    names = ["begin", *2 * ["backward", "loss", "norm", "own loss", "step", "checkpoint"], "end"]
    assert [call[0] if isinstance(call, list) else "norm" for call in one] == names
    for mine, theirs in zip(one, other, strict=True):
        assert (mine == theirs) == (not isinstance(mine, list) or mine[0] != "own loss")


@pytest.mark.slow
def test_the_example_of_the_docs(config, capsys):
    text = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, {"config": dataclasses.replace(config, max_train_steps=2)})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", loss")[0] for line in lines] == [f"Flat-LoRA: step {step} of 2" for step in (1, 2)]
    assert load_file(Path(config.output_dir) / WEIGHTS_NAME)
    described = re.findall(r"^\| `(\w+)\(run", text, re.MULTILINE)
    assert sorted(described) == sorted(METHODS)
