"""The benchmarks of cost: that every arm is the method it is called, and that memory and rows are right."""

import dataclasses
import json
import math
import os

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import CLIPTextModel

from benchmarks import cases, common, full_sdxl, growth, host_profile, overhead, steps
from benchmarks.bases import Sizes
from benchmarks.cases import Case, Stack, WithTextEncoders, cached_prompts_case, predict_of_stack
from benchmarks.memory import MIB
from benchmarks.sam import base_weights
from benchmarks.step_arms import ARMS, FLAT, IN_PLACE, PLAIN, SAM, UNFUSED
from tests.tiny import build_text_encoders

WIDTH, CONTEXT = 128, 64
SMALLEST_TABLE = 1 << 20
NOTHING = {"at_rest_mib": 0.0, "between_layers_mib": 0.0, "peak_mib": 0.0}


@pytest.fixture(autouse=True)
def own_rng():
    """The benchmarks seed the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def tiny(base_path, monkeypatch):
    """The demo base is a tiny one, and so are the block's widths and numbers of tokens."""
    for module in (cases, growth):
        monkeypatch.setattr(module, "DEMO_BASE", base_path)
    sweeps = {
        what: {
            name: [
                (label, dataclasses.replace(setting, tokens=setting.tokens // 64))
                for label, setting in settings
            ]
            for name, settings in of_what.items()
        }
        for what, of_what in growth.SWEEPS.items()
    }
    monkeypatch.setattr(growth, "SWEEPS", sweeps)
    parts = Sizes.of(base_path, 16)
    return growth.BlockSizes(1, WIDTH, parts.text_encoder, parts.text_encoder_2)


def block_case(checkpointing: bool = False, dtype: torch.dtype = torch.float32) -> Case:
    stack = Stack(1, checkpointing, WIDTH, CONTEXT).to(dtype)
    return cached_prompts_case("a block", stack, *predict_of_stack(stack, 8, WIDTH, CONTEXT))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


# SAM.


def test_the_sam_arm_equals_a_twin_with_merged_weights():
    """The adapter descends by the chain rule from the gradient at W' + rho * g / ||g||."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    x, y = torch.randn(16, 6), torch.randn(16, 4)
    one, two = model[0], model[2]
    before = bits(model)
    merged = [layer.weight + layer.get_delta_weight("default") for layer in (one, two)]

    def twin_gradients(weights: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [weight.detach().requires_grad_() for weight in weights]
        hidden = torch.tanh(x @ leaves[0].T + one.bias)
        loss = (hidden @ leaves[1].T + two.bias - y).square().mean()
        return torch.autograd.grad(loss, leaves)

    first = twin_gradients(merged)
    length = math.sqrt(sum(float(g.square().sum()) for g in first))
    rho = 0.5
    second = twin_gradients([w + rho * g / length for w, g in zip(merged, first, strict=True)])
    expected = {}
    for index, (layer, gradient) in enumerate(zip((one, two), second, strict=True)):
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        expected[index, "A"] = 3 * b.T @ gradient
        expected[index, "B"] = 3 * gradient @ a.T

    arm = ARMS[SAM](model, model)
    arm.rho = rho
    gradients = {}

    def update():
        for index, layer in enumerate((one, two)):
            gradients[index, "A"] = layer.lora_A["default"].weight.grad
            gradients[index, "B"] = layer.lora_B["default"].weight.grad

    arm.update = update
    arm.train_step(lambda model: (model(x) - y).square().mean())
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [PLAIN, FLAT, UNFUSED, "Flat-LoRA, gaussian", SAM])
def test_an_arm_trains_the_adapter_and_leaves_the_base(name, checkpointing):
    case = block_case(checkpointing, torch.bfloat16)  # where adding and subtracting would leave other bits
    before = bits(case.model)
    adapter = {n: p.detach().clone() for n, p in case.model.named_parameters() if p.requires_grad}
    arm = ARMS[name](case.model, case.model)
    arm.train_step(case.loss)
    assert all(torch.equal(value, before[key]) for key, value in bits(case.model).items())
    trained = dict(case.model.named_parameters())
    assert not any(torch.equal(trained[key], value) for key, value in adapter.items())


def test_the_arms_of_flat_lora_take_either_way():
    for name, operation in ((FLAT, "FusedLinearBackward"), (UNFUSED, "AddBackward0")):
        case = block_case()
        taken = []
        layer = case.model.blocks[0].attn1.to_q
        layer.register_forward_hook(lambda module, args, output, to=taken: to.append(output.grad_fn.name()))
        ARMS[name](case.model, case.model).train_step(case.loss)
        assert taken == [operation]


# Memory.


def test_memory_is_what_the_methods_keep():
    case = block_case()
    result = steps.measure(case, math.inf, 1)
    assert result.adapted_layers == 8
    weights = result.all_weights_mib
    assert weights == pytest.approx((6 * WIDTH * WIDTH + 2 * WIDTH * CONTEXT) * 4 / MIB)
    of = result.memory
    for name in (IN_PLACE, SAM):
        assert of[name]["at_rest_mib"] == 0
        assert weights <= of[name]["between_layers_mib"] < 1.3 * weights
    assert SMALLEST_TABLE * 4 / MIB <= of[FLAT]["at_rest_mib"] < SMALLEST_TABLE * 4 / MIB + 0.1 * weights
    assert of["Flat-LoRA, gaussian"]["between_layers_mib"] < 0.1 * weights
    rows = [line.split(" | ")[0].strip("| ") for line in overhead.table(result).splitlines()[4:]]
    assert rows[2:] == list(ARMS)


def test_fields_of_proc_are_bytes():
    status = "Name:\tpython\nVmPeak:\t  900000 kB\nVmHWM:\t  123456 kB\nVmRSS:\t  100000 kB\n"
    assert common.proc_bytes(status, "VmHWM") == 123456 * 1024
    assert common.proc_bytes("MemTotal:  9 kB\nMemAvailable:       7 kB\n", "MemAvailable") == 7 * 1024
    with pytest.raises(KeyError):
        common.proc_bytes(status, "VmSwap")


# Growth.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "field", "values", "layers"),
    [
        ("rank", "rank", [1, 4, 16, 64], [8] * 4),
        ("tokens", "tokens", [4, 16, 64], [8] * 3),
        ("layers", "targets", list(growth.LAYERS.values()), [8, 10, 12]),
        ("checkpointing", "checkpointing", [False, True], [8] * 2),
        ("text", "text", [None, False, True], [8, 8, 8 + 2 * 3 * 4]),  # three layers of four projections
    ],
)
def test_a_sweep_varies_one_setting(tiny, monkeypatch, sweep, field, values, layers):
    seen = []

    def measure(case, deadline, repeats, names):
        part = case.model.get_submodule(case.perturbed)
        seen.append((case, len(base_weights([part]))))
        return steps.Result(case.name, 1, 1.0, 1.0, {PLAIN: [1.0], FLAT: [1.0]}, {FLAT: NOTHING})

    monkeypatch.setattr(growth, "measure", measure)
    results = growth.measure_sweep(sweep, 1, tiny, torch.float32, torch.device("cpu"))
    settings = [setting for _, setting in growth.SWEEPS["block"][sweep]]
    assert [getattr(setting, field) for setting in settings] == values
    normal = dataclasses.replace(growth.Setting(), tokens=16)
    for setting, value in zip(settings, values, strict=True):
        assert setting == dataclasses.replace(normal, **{field: value})
    assert [count for _, count in seen[: len(values)]] == layers
    labels = [result.case for result in results]
    assert len(set(labels)) == 2 * len(values) and labels[len(values)].startswith("demo base, ")
    for case, _ in seen[: len(values)]:
        trained = {name for name, p in case.model.named_parameters() if p.requires_grad}
        assert any("text_encoder" in name for name in trained) == isinstance(case.model, WithTextEncoders)
    if sweep == "rank":
        ranks = [min(p.shape[0] for n, p in c.model.named_parameters() if "lora_A" in n) for c, _ in seen]
        assert ranks == values * 2
    if sweep == "checkpointing":
        assert [case.model.checkpointing for case, _ in seen[:2]] == values
        assert [case.model.is_gradient_checkpointing for case, _ in seen[2:]] == values


@pytest.mark.slow
def test_growth_is_measured(tiny, tmp_path, capsys, monkeypatch):
    for sweeps in growth.SWEEPS.values():
        monkeypatch.setitem(sweeps, "text", sweeps["text"][-1:])
    path = tmp_path / "growth.json"
    growth.main(["--sweep", "text", "--repeats", "1", "--dtype", "fp32", "--output", str(path)], tiny)
    results = [steps.Result(**result) for result in json.loads(path.read_text())["text"]]
    for result in results:
        assert {name: len(seconds) for name, seconds in result.seconds.items()} == {PLAIN: 1, FLAT: 1}
        assert SMALLEST_TABLE * 4 / MIB <= result.memory[FLAT]["at_rest_mib"] < 1.1 * SMALLEST_TABLE * 4 / MIB
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith(("| block", "| demo"))] == [
        growth.row(result) for result in results
    ]


def test_a_row_pairs_the_repeats():
    seconds = {PLAIN: [1.0, 2.0, 4.0], FLAT: [1.1, 2.4, 4.2]}
    memory = {FLAT: {"at_rest_mib": 3.0, "between_layers_mib": 4.0, "peak_mib": 5.0}}
    row = growth.row(steps.Result("block, rank 1", 8, 1.0, 7.5, seconds, memory))
    assert row == "| block, rank 1 | 8 | 7.5 | 2 | 2.4 | 1.100 (1.050-1.200) | 3.00 | 4.00 | 5.00 |"


# The whole SDXL.


@pytest.fixture
def task(base_path, monkeypatch):
    monkeypatch.setattr(full_sdxl, "limit_memory", lambda: None)  # it would hold for all the tests to come
    return full_sdxl.Task(
        Sizes.of(base_path, 16), torch.bfloat16, resolution=64, text_encoders=False, steps=2, threads=None
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_random_weights_are_drawn_in_their_precision(dtype):
    expected, _ = build_text_encoders()
    model = full_sdxl.random_model(lambda: CLIPTextModel(expected.config), dtype, torch.device("cpu"))
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in expected.named_parameters()
    }
    assert all(p.dtype == dtype and not p.is_meta for p in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers and all(torch.equal(buffers[n], b) for n, b in expected.named_buffers())
    weight = model.get_parameter("embeddings.token_embedding.weight").float()
    assert weight.std().item() == pytest.approx(32**-0.5, rel=0.02)
    ids = torch.arange(77)[None]
    assert model(ids).last_hidden_state.isfinite().all()


@pytest.mark.slow
def test_the_whole_model_is_measured(task, tmp_path, monkeypatch):
    monkeypatch.setattr(full_sdxl, "in_own_process", lambda function, *arguments: function(*arguments))
    path = tmp_path / "full.json"
    words = ["--arms", "plain", "flat", "sam", "--text_encoders", "--output", str(path)]
    words += ["--resolution", "32", "--steps", "1"]
    full_sdxl.main(words, task.sizes)
    arms = json.loads(path.read_text())["arms"]
    assert list(arms) == [PLAIN, FLAT, SAM]
    plain = arms[PLAIN]
    # The tiny UNet has one transformer block; each text encoder three layers.
    assert plain["adapted_layers"] == 8 + 2 * 3 * 4
    for name, arm in arms.items():
        assert not arm["seconds"]  # the first step is not timed
        assert arm["frozen_bytes"] == plain["frozen_bytes"], name
    beyond = {name: arm["tensors_peak"] - plain["tensors_peak"] for name, arm in arms.items()}
    kept = plain["adapted_bytes"]
    # Less than all: so small a model has its peak, without them, in AdamW.
    assert 0.5 * kept <= beyond[SAM] < 1.5 * kept
    table = SMALLEST_TABLE * 2
    assert table <= arms[FLAT]["tensors_at_rest"] - plain["tensors_at_rest"] < table + 0.2 * kept


def test_the_profile_names_parts_that_there_are(tmp_path):
    path = tmp_path / "profile.md"
    host_profile.main(["--steps", "1", "--output", str(path)])
    rows = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("|")]
    flat = {name: int(value) for name, _, value in rows[2:]}
    assert set(flat) == {"the step", *host_profile.PARTS}
    assert all(value > 0 for value in flat.values()), "a function is called otherwise now"


def test_an_arm_that_does_not_fit_is_reported(task, monkeypatch):
    def too_large(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore")

    monkeypatch.setattr(full_sdxl, "make_case", too_large)
    said = full_sdxl.measure(SAM, task)
    assert "can't allocate memory" in said and "more" not in said
    measured = full_sdxl.Measured(PLAIN, 8, 2 * MIB, 9 * MIB, 30 * MIB, 10 * MIB, 20 * MIB, [])
    flat = dataclasses.replace(measured, arm=FLAT, tensors_peak=25 * MIB, seconds=[1.0, 2.0, 6.0])
    lines = full_sdxl.table({PLAIN: measured, FLAT: flat, SAM: said}).splitlines()
    assert lines[2:4] == [
        "| plain LoRA | 30 | - | 10 | - | 20 | - | - |",
        "| Flat-LoRA, table | 30 | 0.0 | 10 | 0.0 | 25 | 5.0 | 2 (1-6) |",
    ]
    assert lines[4].startswith("| SAM | did not fit: Default")
    assert {line.count("|") for line in lines} == {9}

    def broken(*arguments):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(full_sdxl, "make_case", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        full_sdxl.measure(PLAIN, task)


def test_each_arm_has_a_process_of_its_own_and_may_be_killed():
    first, second = (full_sdxl.in_own_process(os.getpid) for _ in range(2))
    assert len({first, second, os.getpid()}) == 3
    assert "was killed" in full_sdxl.in_own_process(os._exit, 9)


def test_a_resolution_that_the_unet_cannot_halve_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        full_sdxl.parse(["--resolution", "100"])
    assert stopped.value.code == 2 and "100 must be a multiple of 32" in capsys.readouterr().err
