"""Gradient noise of a loss whose gradient is known."""

from typing import Any, Literal

import pytest
import torch
from torch import nn

from osmose.analysis.gradients import gradient_noise
from osmose.data.dataset import Dataset, DataSpec
from osmose.methods.base import GenerativeModel, MethodConfig
from osmose.methods.messages import LossTerms

SPEC = DataSpec(kind="points", shape=(3,))


class KnownConfig(MethodConfig):
    kind: Literal["known"] = "known"

    @classmethod
    def recipe(cls, spec, data_std) -> dict[str, Any]:  # noqa: ARG003
        return {}

    def build(self, spec):
        return Known(self, spec)


class Known(GenerativeModel):
    """Loss w (1 + z) for a normal z: the gradient of a batch of B is 1 + mean z, with variance 1 / B."""

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.w, self.unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))
        self.steps, self.silent = 0, 0

    def networks(self):
        return []

    def probe(self, items):
        pass

    def loss(self, batch, draws):  # noqa: ARG002
        self.silent += not torch.is_grad_enabled()
        return LossTerms((self.w * (1 + draws.normal((2,)))).sum(1))

    def after_step(self, parts):
        self.steps += len(parts)

    def generate(self, draws, sampling, condition, on_step):  # noqa: ARG002
        raise AssertionError("nothing is sampled here")


@pytest.fixture
def dataset():
    return Dataset("points", SPEC, torch.randn(50, 3), torch.randn(5, 3), "none")


@pytest.mark.parametrize("batch_size", [4, 16])
def test_variance_and_mean_of_a_known_gradient(dataset, batch_size):
    model = KnownConfig().build(SPEC).eval()
    noise = gradient_noise(model, dataset, batch_size=batch_size, batches=1000, seed=1)
    # Two parameters: trace 2 / B, squared mean 2; 1000 batches know the variance to about 1 / sqrt(1000).
    assert noise.variance == pytest.approx(2 / batch_size, rel=0.1)
    assert noise.squared_mean == pytest.approx(2, rel=0.05)
    assert not model.training
    assert noise == gradient_noise(model, dataset, batch_size=batch_size, batches=1000, seed=1)
    assert noise != gradient_noise(model, dataset, batch_size=batch_size, batches=1000, seed=2)


def test_the_estimates_are_unbiased_with_few_batches(dataset):
    model = KnownConfig().build(SPEC)
    found = [gradient_noise(model, dataset, batch_size=4, batches=2, seed=seed) for seed in range(800)]
    assert sum(noise.variance for noise in found) / len(found) == pytest.approx(0.5, rel=0.1)
    assert sum(noise.squared_mean for noise in found) / len(found) == pytest.approx(2.0, rel=0.05)


def test_the_model_learns_its_law_of_times_before_and_nothing_else(dataset):
    model = KnownConfig().build(SPEC)
    gradient_noise(model, dataset, batch_size=4, batches=3, warmup=5)
    assert (model.steps, model.silent) == (8, 5)
    assert model.w.tolist() == [0.0, 0.0]
    assert model.w.grad is None


def test_one_batch_has_no_variance(dataset):
    with pytest.raises(ValueError, match="at least 2"):
        gradient_noise(KnownConfig().build(SPEC), dataset, batch_size=4, batches=1)
