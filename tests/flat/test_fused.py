"""The whole layer as one operation: that it is the layer, and that other layers go the way round."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flatlora_diffusion import FlatLoRA

SIGMA = 0.3
SHAPES = {"linear": (3, 5, 12), "conv1d": (3, 4, 9), "conv2d": (3, 4, 9, 7), "conv3d": (2, 4, 5, 6, 7)}


class Net(nn.Module):
    """Every kind of layer, each by itself."""

    def __init__(self, bias=True):
        super().__init__()
        self.linear = nn.Linear(12, 20, bias=bias)
        self.conv1d = nn.Conv1d(4, 6, 3, bias=bias)
        self.conv2d = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias)
        self.conv3d = nn.Conv3d(4, 6, 2, bias=bias)
        self.dilated = nn.Conv2d(4, 6, 3, dilation=2, padding=2)


def net(targets, dtype=torch.float32, has_bias=True, **config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(has_bias).requires_grad_(False)
        settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **config}
        model = inject_adapter_in_model(LoraConfig(target_modules=targets, **settings), model)
    return model.to(dtype).train()


def attach(model, **settings):
    return FlatLoRA(model, sigma=SIGMA, total_steps=10, schedule="constant", **settings)


def example(kind, dtype=torch.float32):
    x = torch.randn(SHAPES.get(kind, SHAPES["conv2d"]), generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def outcome(layer, kind, dtype=torch.float32):
    """Result, gradients by name, and the operation that made the result."""
    layer.zero_grad()
    x = example(kind, dtype)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **gradients}, y.grad_fn.name()


def twin(model, flat, kind):
    """PEFT's own layer on a base weight that really is `W + eps`."""
    eps = flat.epsilon(kind)
    flat.remove()
    layer = copy.deepcopy(getattr(model, kind))
    weight = layer.get_base_layer().weight
    weight.data += eps.view_as(weight)
    return layer


def assert_same(actual, expected, tolerance):
    assert actual[1].keys() == expected[1].keys()
    torch.testing.assert_close(
        actual[0], expected[0], rtol=0, atol=tolerance * float(expected[0].abs().max())
    )
    for name, gradient in expected[1].items():
        error = (actual[1][name] - gradient).norm() / gradient.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equals_the_layer_of_peft_on_a_noisy_weight(kind, bias, dtype, tolerance):
    model = net([kind], dtype, bias != "none", bias="lora_only" if bias == "trained" else "none")
    flat = attach(model)
    actual = outcome(getattr(model, kind), kind, dtype)
    assert actual[2] == ("FusedLinearBackward" if kind == "linear" else "FusedConvolutionBackward")
    assert ("base_layer.bias" in actual[1]) == (bias == "trained")
    assert_same(actual, outcome(twin(model, flat, kind), kind, dtype), tolerance)


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"lora_alpha": 3}], ids=["rslora", "scaling 1"])
def test_any_scaling(config):
    model = net(["linear"], torch.float64, **config)
    flat = attach(model)
    actual = outcome(model.linear, "linear", torch.float64)
    assert actual[2] == "FusedLinearBackward"
    assert_same(actual, outcome(twin(model, flat, "linear"), "linear", torch.float64), 1e-14)


def test_an_input_that_needs_no_gradient():
    model = net(["linear", "conv2d"], torch.float64)
    flat = attach(model)
    for kind in ("linear", "conv2d"):
        layer = getattr(model, kind)
        expected = outcome(layer, kind, torch.float64)[1]
        layer.zero_grad()
        y = layer(example(kind, torch.float64).detach())
        (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
        for name, p in layer.named_parameters():
            assert p.grad is None or torch.equal(p.grad, expected[name])
    flat.remove()


def test_the_result_may_be_changed_in_place_and_the_input_has_any_strides():
    model = net(["linear"], torch.float64)
    attach(model)
    x = torch.randn(12, 5, 3, dtype=torch.float64).T.requires_grad_()
    y = model.linear(x)
    y += 1
    y.sum().backward()
    gradient, x.grad = x.grad, None
    model.linear(x.detach().contiguous().requires_grad_()).sum().backward()
    again = x.detach().contiguous().requires_grad_()
    model.linear(again).sum().backward()
    torch.testing.assert_close(gradient, again.grad)


def test_a_small_update_survives_half_precision():
    """B A is added to the product, not to the weight, where rounding would swallow it."""
    model = net(["linear"])
    layer = model.linear
    with torch.no_grad():
        for base in (layer.base_layer.weight, layer.base_layer.bias):
            base.copy_(base.sign())
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(1e-3 / 5)  # s * B @ A = 1e-3 everywhere: a unit is 2^-8 near 1
    x = torch.ones(1, 12)
    outputs = {}
    for scaling in (1.0, 0.0):
        layer.scaling["default"] = 5 / 3 * scaling
        flat = FlatLoRA(model, sigma=1e-6, total_steps=10, schedule="constant")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.grad_fn.name() == "FusedLinearBackward"
        outputs[scaling] = y.detach().float()
        flat.remove()
    small = outputs[0.0].abs() <= 1  # where the sum's own rounding leaves room
    difference = (outputs[1.0] - outputs[0.0])[small]
    assert len(difference) > 3
    torch.testing.assert_close(difference, torch.full_like(difference, 12e-3), rtol=0.35, atol=0)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("linear", {"use_dora": True}),
        ("conv2d", {"use_dora": True}),
        ("linear", {"lora_dropout": 0.3}),
        ("linear", {"lora_bias": True}),
        ("dilated", {}),
    ],
    ids=["dora", "dora on a convolution", "dropout", "bias of B", "A is not dilated"],
)
def test_other_layers_go_the_way_round(kind, config):
    model = net([kind], **config)
    attach(model)
    x = example(kind)
    layer = getattr(model, kind)
    if kind == "dilated":  # PEFT itself cannot add results of two sizes
        with pytest.raises(RuntimeError, match="must match the size"):
            layer(x)
    else:
        assert "Fused" not in layer(x).grad_fn.name()


def test_several_active_adapters_go_the_way_round():
    model = net(["linear"], torch.float64)
    model = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False), model, adapter_name="other"
    ).double()
    model.linear.set_adapter(["default", "other"])
    flat = attach(model)
    actual = outcome(model.linear, "linear", torch.float64)
    assert "Fused" not in actual[2]
    assert_same(actual, outcome(twin(model, flat, "linear"), "linear", torch.float64), 1e-14)
    flat = attach(model)
    model.linear.set_adapter("other")
    actual = outcome(model.linear, "linear", torch.float64)
    assert actual[2] == "FusedLinearBackward"
    assert_same(actual, outcome(twin(model, flat, "linear"), "linear", torch.float64), 1e-14)


def test_what_hangs_on_the_factors_is_called():
    model = net(["linear"], torch.float64)
    attach(model)
    layer, seen = model.linear, []
    fused = outcome(layer, "linear", torch.float64)
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        handle = module.register_forward_hook(lambda module, args, output: seen.append(module))
        actual = outcome(layer, "linear", torch.float64)
        assert seen.pop() is module and not seen
        assert "Fused" not in actual[2]
        assert_same(actual, fused, 1e-13)
        handle.remove()
    factor = layer.lora_A["default"]
    factor.forward = lambda x: seen.append("own") or nn.Linear.forward(factor, x)
    assert "Fused" not in layer(example("linear", torch.float64)).grad_fn.name() and seen == ["own"]
    del factor.forward
    assert outcome(layer, "linear", torch.float64)[2] == "FusedLinearBackward"


def test_mixed_precision_without_autocast_goes_the_way_round():
    model = net(["linear"])
    model.linear.base_layer.bfloat16()
    attach(model)
    x = example("linear", torch.bfloat16)
    assert "Fused" not in model.linear(x).grad_fn.name()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model.linear(x)
    assert y.grad_fn.name() == "FusedLinearBackward" and y.dtype == torch.bfloat16


def test_autocast_around_the_backward_pass_changes_nothing():
    model = net(["linear", "conv2d"])
    attach(model)
    for kind in ("linear", "conv2d"):
        layer = getattr(model, kind)
        expected = outcome(layer, kind)[1]
        layer.zero_grad()
        x = example(kind)
        y = layer(x)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
        assert torch.equal(x.grad, expected["x"])
        for name, p in layer.named_parameters():
            assert p.grad is None or torch.equal(p.grad, expected[name])


def test_nothing_of_the_weight_s_size_is_kept_for_the_backward_pass():
    model = net(["linear"])
    attach(model)
    weight, kept = model.linear.base_layer.weight, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.linear(example("linear"))
    new = [t for t in kept if t.numel() >= weight.numel() and t.data_ptr() != weight.data_ptr()]
    assert not new or all(t.shape == (15, 12) for t in new)  # x itself
    assert len(kept) == 5


@pytest.mark.slow
def test_torch_compile_gives_the_same():
    model = net(["linear"], torch.float64)
    flat = attach(model)
    expected = outcome(model.linear, "linear", torch.float64)
    compiled = torch.compile(model.linear, backend="aot_eager")
    x = example("linear", torch.float64)
    y = compiled(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    torch.testing.assert_close(y, expected[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x.grad, expected[1]["x"], rtol=1e-13, atol=1e-13)
    flat.step()
    assert not torch.equal(compiled(x), y), "the next step has another noise"
