import math

import pytest
import torch

from flatlora_diffusion.common.seeds import hash64
from flatlora_diffusion.flat.noise import GaussianSource, TableSource, sigma_at
from flatlora_diffusion.flat.row_norms import merged_row_norms, row_norms_squared

SOURCES = [GaussianSource(), TableSource(0, elements=1 << 20)]
source_of_each_kind = pytest.mark.parametrize("source", SOURCES, ids=["gaussian", "table"])


def draw(source, key, std, inputs):
    return source.draws([key], std[None], inputs)[0]


def normals(source, key, *shape, dtype=torch.float32):
    return draw(source, key, torch.ones(shape[0], dtype=dtype), shape[1]).epsilon()


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [0.0, 0.0146447, 0.05, 0.1]), ("linear", [0.0, 0.025, 0.05, 0.1]), ("constant", [0.1] * 4)],
)
def test_sigma_follows_its_schedule(schedule, expected):
    values = [sigma_at(0.1, step, 8, schedule) for step in (0, 2, 4, 8)]
    assert values == pytest.approx(expected, abs=1e-7)
    assert sigma_at(0.1, 100, 8, schedule) == pytest.approx(0.1)


def test_hash_is_fixed_across_processes():
    assert hash64(0, 1, "a") == 0xAAB316D1CB0CB8A9


def norms_of(weights, a, b):
    norms_squared = torch.stack([row_norms_squared(weight) for weight in weights])
    return merged_row_norms(weights, norms_squared, a, b)


@pytest.mark.parametrize("rank", [0, 1, 2, 16, 64])
@pytest.mark.parametrize("scale", [0.125, 1.0, 7.5])
def test_row_norms_equal_those_of_the_materialised_weights(rank, scale):
    weights, a, b = random(3, 96, 80), random(3, rank, 80, seed=1), scale * random(3, 96, rank, seed=2)
    expected = (weights.double() + b.double() @ a.double()).norm(dim=2)
    torch.testing.assert_close(norms_of(list(weights), a, b).double(), expected, rtol=2e-6, atol=0)


def test_row_norms_of_bfloat16_weights_are_computed_in_float32():
    weight, a, b = (
        random(3000, 1500, dtype=torch.bfloat16),
        random(1, 4, 1500, seed=1),
        random(1, 3000, 4, seed=2),
    )
    expected = (weight.float() + b[0] @ a[0]).norm(dim=1)
    torch.testing.assert_close(norms_of([weight], a, b)[0], expected, rtol=2e-6, atol=0)


def test_row_norms_survive_an_adapter_that_cancels_the_weight():
    b, a = random(1, 8, 2), random(1, 2, 6, seed=1)
    norms = norms_of([b[0] @ a[0]], a, -b)
    assert norms.isfinite().all() and norms.max() < 3e-3


@source_of_each_kind
@pytest.mark.parametrize("n", [64, 256, 1024, 4096])
def test_variance_of_the_noise_and_of_the_output(source, n):
    """Proposition 3.2: Var[eps_ij] = sigma^2 / n * ||W'_i||^2; the output's variance grows by 1 + sigma^2."""
    sigma, m, draws = 0.3, 16, 400
    weight = random(m, n, seed=3)
    norms = weight.norm(dim=1)
    std = sigma / math.sqrt(n) * norms
    eps = torch.stack([draw(source, hash64(n, d), std, n).epsilon() for d in range(draws)])
    per_row = eps.square().mean(dim=(0, 2)) / std.square()
    assert (per_row - 1).abs().max() < 6 * math.sqrt(2 / (draws * n)) + 0.006
    # For inputs of unit variance, output i has variance ||W_i||^2, and ||W_i + eps_i||^2 with noise.
    ratio = (weight + eps).square().sum(dim=2).mean(dim=0) / norms.square()
    standard_error = sigma * math.sqrt((4 + 2 * sigma**2) / (draws * n))
    assert (ratio - (1 + sigma**2)).abs().max() < 5 * standard_error + 0.002


@source_of_each_kind
def test_a_key_always_gives_the_same_noise_and_another_key_another(source):
    first = normals(source, 1, 64, 128)
    assert torch.equal(first, normals(source, 1, 64, 128))
    for key in range(2, 40):
        other = normals(source, key, 64, 128)
        correlation = (first * other).mean() / (first.std() * other.std())
        assert abs(correlation) < 5 / math.sqrt(first.numel())


@source_of_each_kind
@pytest.mark.parametrize("shape", [(33, 100), (33, 4, 5, 5)], ids=["linear", "convolution"])
def test_a_weight_takes_the_noise_in_its_flattened_filters(source, shape):
    weight, std = random(*shape).double(), random(33, seed=1).abs().double()
    expected = weight + (std[:, None] * normals(source, 7, 33, 100, dtype=torch.float64)).view(shape)
    before = weight.clone()
    torch.testing.assert_close(draw(source, 7, std, 100).added_to(weight), expected, rtol=1e-14, atol=1e-15)
    assert torch.equal(weight, before)


@source_of_each_kind
def test_draws_taken_together_are_those_taken_alone(source):
    std = random(3, 40, seed=1).abs()
    together = source.draws([5, 6, 7], std, 50)
    for key, row_std, one in zip([5, 6, 7], std, together, strict=True):
        assert torch.equal(one.epsilon(), draw(source, key, row_std, 50).epsilon())


def test_table_draws_look_like_fresh_normals():
    """Moments, and independence of rows, neighbours and keys, within the bounds of fresh normals."""
    source = TableSource(3)
    z = torch.stack([normals(source, hash64("key", k), 256, 512) for k in range(60)]).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(z.pow(3).mean()) < 5 * math.sqrt(15 / n)
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    pairs = {
        "rows": (z[:, :-1], z[:, 1:]),
        "columns": (z[:, :, :-1], z[:, :, 1:]),
        "keys": (z[:-1], z[1:]),
        "rows of other keys": (z[:-1, :-1], z[1:, 1:]),
    }
    for what, (one, other) in pairs.items():
        assert abs((one * other).mean()) < 5 / math.sqrt(one.numel()), what
    # Row variances scatter as those of independent normals do.
    row_variances = z.var(dim=2)
    assert row_variances.std() == pytest.approx(math.sqrt(2 / 512), rel=0.03)


def test_a_weight_larger_than_the_table_is_covered():
    source = TableSource(0, elements=1)  # 2^20 normals: the weight takes seven windows and a rest
    z = normals(source, 1, 1850, 1000)
    assert z.shape == (1850, 1000)
    assert abs(z.std() - 1) < 0.005
    assert len(z[:, 0].unique()) > 1800
    starts = z[::262]  # the first rows of the windows
    assert len(starts[:, 0].unique()) == len(starts)
    weight, std = random(1850, 1000), random(1850, seed=1).abs()
    one = draw(source, 1, std, 1000)
    torch.testing.assert_close(one.added_to(weight), weight + one.epsilon(), rtol=1e-6, atol=1e-6)


def test_the_same_table_in_every_precision():
    exact, rounded = (normals(TableSource(5), 1, 8, 8, dtype=d) for d in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(exact, rounded.float(), rtol=2**-8, atol=0)
