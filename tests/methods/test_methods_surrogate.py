"""A chain entered in the middle: laws in closed form, limits, counts, refusals."""

import json
import math

import pytest
import torch

from osmose.data.dataset import DataSpec
from osmose.errors import UserError
from osmose.gaussian.chain import reverse_step
from osmose.gaussian.draws import SampleDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.oracles import GaussianDenoiser
from osmose.gaussian.schedule import CosineSchedule, LinearSchedule
from osmose.gaussian.solvers import Ancestral, State
from osmose.methods import METHODS
from osmose.methods.diffusion import DDPMConfig, EDMConfig
from osmose.methods.surrogate import LowResolutionSource, Rough, RunSource, StoredSource, SurrogateConfig
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig

LINE = DataSpec(kind="points", shape=(1,))
IMAGES = DataSpec(kind="image", shape=(1, 8, 8), range=(-1, 1))
SMALL = DataSpec(kind="image", shape=(1, 4, 4), range=(-1, 1))
TINY = MLPConfig(width=8, depth=1)
ORIGIN = {"origin": "runs/other", "sha256": "0" * 64}
STORED = StoredSource(**ORIGIN, count=40)


def quiet(done, of, state=None):
    pass


class Point(Rough):
    """The same rough sample for all, float64."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def draw(self, draws, level, sampling, condition, on_step):  # noqa: ARG002
        return torch.full((draws.count, 1), self.value, dtype=torch.float64), 0


class Impulses:
    """The i-th draw is 1 for item i and 0 for all others: one run gives the response to every draw."""

    def __init__(self, count):
        self.count, self.drawn = count, 0

    def normal(self, event_shape):
        out = torch.zeros(self.count, *event_shape, dtype=torch.float64)
        if self.drawn < self.count:
            out[self.drawn] = 1
        self.drawn += 1
        return out

    def branch(self, *names):  # noqa: ARG002
        return self


def on_the_line(variance, schedule=None, **sampling):
    """A pair on N(0, variance) with the exact denoiser."""
    chain = DDPMConfig(network=TINY, schedule=schedule or LinearSchedule())
    model = SurrogateConfig(chain=chain, generator=STORED, sampling=sampling).build(LINE)
    del model.chain.denoiser
    one = torch.ones(1, dtype=torch.float64)
    model.chain.denoiser = GaussianDenoiser(0 * one, variance * one)
    return model


def law(model, draws):
    """The output is affine: its response to the rough sample, and the variance that all draws together give it."""

    def run(value):
        model.generator, noise = Point(value), Impulses(draws)
        out = model.generate(noise, model.sampling(), None, quiet)[0]
        assert noise.drawn == draws, "the start and every stochastic step but the last draw noise"
        return out

    noisy = run(0.0)
    return float((run(1.0) - noisy)[0]), float(noisy.square().sum())


def abar(model, t):
    return float(model.chain.schedule.alpha(t)) ** 2


@pytest.mark.parametrize(("step", "mean"), [(50, 0.8933), (250, 0.2159), (500, 0.0209), (750, 0.0008), (1000, 1e-5)])
def test_the_mean_of_a_gaussian_pair(step, mean):
    """Data N(0, s^2 = 1/4), surrogate at 1: the mean of the output is a s^2 / (a s^2 + 1 - a), a = abar at t_mid."""
    model = on_the_line(0.25, num_steps=1000, solver="ancestral", t_mid=step / 1000)
    model.generator, a = Point(1.0), abar(model, step / 1000)
    silence = Impulses(1)
    silence.drawn = 1
    found = float(model.generate(silence, model.sampling(), None, quiet)[0])
    assert found == pytest.approx(a * 0.25 / (a * 0.25 + 1 - a), rel=1e-6)
    assert found == pytest.approx(mean, abs=6e-5)


@pytest.mark.parametrize("step", [2, 5, 30, 60])
def test_the_variance_of_a_gaussian_pair(step):
    """Data N(0, 1), where beta is the exact reverse variance: a (a v + 1 - a) + 1 - a - beta_1 for a surrogate's v."""
    solver = {"kind": "ancestral", "variance": "fixed_large"}
    model = on_the_line(1.0, LinearSchedule(num_steps=60), num_steps=60, solver=solver, t_mid=step / 60)
    a, beta_1 = abar(model, step / 60), 1 - abar(model, 1 / 60)
    gain, noise = law(model, step)
    for v in (0.01, 1.0, 4.0):
        assert gain**2 * v + noise == pytest.approx(a * (a * v + 1 - a) + 1 - a - beta_1, rel=1e-9)


class Exact(Ancestral):
    """The chain with the exact reverse variance of N(0, s^2): btilde and what x0 varies by, given x_t."""

    def run(self, denoise, x, grid, noise):
        v = float(denoise.denoiser.variances)
        for t, s in grid.steps():
            step, x0 = reverse_step(t, s), denoise(x, t)
            x = step.keep * x + step.pull * x0
            if s.sigma > 0:
                hidden = v * t.sigma**2 / (t.alpha**2 * v + t.sigma**2)
                x = x + (step.btilde + step.pull**2 * hidden) ** 0.5 * noise()
            yield State(x, x0)


@pytest.mark.parametrize("step", [50, 250, 500, 1000])
def test_mean_and_variance_with_the_exact_reverse_variance(step):
    """Data N(0, s^2 = 1/4), surrogate of variance v = 0.01, M = a s^2 + 1 - a."""
    model = on_the_line(0.25, num_steps=1000, t_mid=step / 1000)
    sampling = model.sampling().model_copy(update={"solver": Exact()})
    model.generator, noise = Point(0.0), Impulses(step)
    noisy = model.generate(noise, sampling, None, quiet)[0]
    model.generator = Point(1.0)
    gain = float((model.generate(Impulses(step), sampling, None, quiet)[0] - noisy)[0])
    a, s2, v = abar(model, step / 1000), 0.25, 0.01
    M, beta_1 = a * s2 + 1 - a, 1 - abar(model, 1 / 1000)
    assert gain == pytest.approx(a * s2 / M, rel=1e-9)
    wanted = (a * s2**2 / M**2) * (a * v + 1 - a) + s2 * (1 - a) / M
    # the last step adds no noise: what it leaves out is the variance of x0 given x_1
    assert gain**2 * v + float(noisy.square().sum()) == pytest.approx(
        wanted - beta_1 * s2 / (s2 * (1 - beta_1) + beta_1), rel=1e-9
    )


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp-2m"])
@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_the_law_of_a_gaussian_pair_under_the_flow(solver, t):
    """The flow on N(0, s^2) scales by s / sqrt(a s^2 + 1 - a)."""
    model = on_the_line(0.25, num_steps=1000, solver=solver, t_mid=t)
    a = abar(model, t)
    scale = 0.5 / math.sqrt(a * 0.25 + 1 - a)
    gain, noise = law(model, 1)
    assert gain == pytest.approx(scale * math.sqrt(a), rel=0.01)
    assert noise == pytest.approx(scale**2 * (1 - a), rel=0.02)


def test_a_perfect_surrogate_leaves_the_law_as_it_is():
    solver, found = {"kind": "ancestral", "variance": "fixed_large"}, []
    for step in (1, 20, 60):
        model = on_the_line(1.0, LinearSchedule(num_steps=60), num_steps=60, solver=solver, t_mid=step / 60)
        gain, noise = law(model, step)
        found.append(gain**2 + noise)
    assert found == pytest.approx([found[0]] * 3, rel=1e-9)


# ------------------------------------------------------------------------------------------------ limits and counts


def chain_of(steps=20, used=None, **values):
    sampling = {"num_steps": used or steps}
    return DDPMConfig(network=TINY, schedule=CosineSchedule(num_steps=steps), sampling=sampling, **values)


def pair(chain=None, generator=STORED, spec=IMAGES, **sampling):
    torch.manual_seed(0)
    values = {"chain": chain or chain_of(), "generator": generator, "sampling": sampling}
    model = SurrogateConfig.parse(values).build(spec)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    for buffer in model.generator.buffers():
        buffer.copy_(torch.rand_like(buffer) * 2 - 1)
    return model.eval()


def small(schedule=None):
    method = DDPMConfig(network=TINY, schedule=schedule) if schedule else chain_of()
    return LowResolutionSource(**ORIGIN, method=method, spec=SMALL, factor=2)


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


def test_at_0_the_samples_are_the_surrogate_s():
    inner = chain_of(5, 3)
    model = pair(generator=RunSource(**ORIGIN, method=inner), num_steps=20, t_mid=0)
    source = model.generator.model
    own, nfe = source.generate(SampleDraws(3, 0, 6).branch("surrogate"), source.sampling(), None, quiet)
    samples = model.sample(6, seed=3)
    assert torch.equal(samples.data, model.spec.decode(own))
    assert samples.nfe == nfe == 3


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "heun", "dpmpp-2m"])
def test_at_1_a_surrogate_of_zeros_gives_plain_sampling_up_to_the_start_s_scale(solver):
    model = pair(num_steps=20, solver=solver, t_mid=1.0, clip=False)
    model.generator.samples.zero_()
    draws, sampling = SampleDraws(5, 0, 4), model.sampling()
    x = draws.normal(IMAGES.shape) * float(model.chain.schedule.sigma(1.0))
    grid = TimeGrid.of(model.chain.schedule, 20)
    for state in sampling.solver.run(model.chain.denoiser, x, grid, lambda: draws.normal(IMAGES.shape)):
        x = state.x
    entered, nfe = model.generate(SampleDraws(5, 0, 4), sampling, None, quiet)
    plain, same = model.chain.generate(SampleDraws(5, 0, 4), sampling, None, quiet)
    assert torch.equal(entered, x)
    assert nfe == same
    assert (entered - plain).abs().max() < 0.2 * plain.std()  # the start differs by the factor sqrt(1 - abar_T)


@pytest.mark.parametrize(("solver", "cost"), [("ancestral", 1), ("ddim", 1), ("dpmpp-2m", 1), ("heun", 2)])
@pytest.mark.parametrize(
    ("num_steps", "t", "left"), [(20, 0.5, 10), (20, 0.05, 1), (20, 1, 20), (5, 0.5, 2), (5, 0.3, 2)]
)
def test_evaluations_are_counted(solver, cost, num_steps, t, left):
    """5 of 20 steps are 1, 6, 11, 15, 20, three of them at or below 14."""
    model, calls = pair(num_steps=num_steps, solver=solver, t_mid=t), []
    model.chain.denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    steps = []
    samples = model.sample(3, on_step=lambda done, of: steps.append((done, of)))
    assert samples.nfe == len(calls) == (left if cost == 1 else 2 * left - 1)
    assert steps == [(index + 1, left) for index in range(left)]


def test_a_surrogate_s_own_evaluations_are_counted_too():
    inner = chain_of(5, 3)
    assert pair(generator=RunSource(**ORIGIN, method=inner), num_steps=20, t_mid=0.5).sample(2).nfe == 13


def test_the_chain_is_entered_at_the_largest_step_that_is_not_above():
    model = pair(num_steps=5, t_mid=0.6)
    for t, step in ((1.0, 20), (0.95, 15), (0.75, 15), (0.7, 11), (0.5, 6), (0.3, 6), (0.05, 1)):
        assert model.chain.entry(t, model.sampling()).t == step / 20


def test_rough_samples_stay_inside_the_data_s_range():
    inner = chain_of(5, 3).replace(**{"sampling.clip": False})
    model = pair(generator=RunSource(**ORIGIN, method=inner), num_steps=20)
    x0, _ = model.rough(SampleDraws(0, 0, 8), model.sampling(), None, quiet)
    assert x0.abs().max() == 1


def test_samples_do_not_depend_on_the_batch():
    for generator in (STORED, small(), RunSource(**ORIGIN, method=DDPMConfig(network=TINY))):
        model = pair(generator=generator, num_steps=20, solver="ancestral", t_mid=0.3)
        whole = model.sample(7, seed=1).data
        assert torch.allclose(model.sample(7, seed=1, batch_size=3).data, whole, atol=1e-5)
        assert not torch.allclose(model.sample(7, seed=2).data, whole, atol=1e-2)


# ------------------------------------------------------------------------------------------------ sources


def test_a_stored_sample_is_used_once():
    model = pair(num_steps=20, t_mid=0)
    drawn = model.sample(40, seed=4, batch_size=16).data
    found = {tuple(row.flatten().tolist()) for row in drawn}
    assert found == {tuple(row.flatten().tolist()) for row in model.spec.decode(model.generator.samples)}
    assert not torch.equal(model.sample(40, seed=5).data, drawn)
    with pytest.raises(UserError, match="num_samples: 41 is more than the 40 different samples that there are"):
        model.sample(41)


@pytest.mark.parametrize("t", [0.3, 0.5, 1.0])
def test_a_small_chain_is_left_at_the_matching_level(t):
    """A block of f x f pixels averages the noise: sigma / alpha of the small chain is 1 / f of the large one's."""
    model, seen = pair(generator=small(LinearSchedule()), chain=DDPMConfig(network=TINY), num_steps=1000, t_mid=t), []
    schedule, network = model.chain.schedule, model.generator.model.denoiser.network
    network.register_forward_pre_hook(lambda _, given: seen.append(int(given[1][0]) + 1))
    x0, nfe = model.rough(SampleDraws(0, 0, 2), model.sampling(), None, quiet)
    assert x0.shape == (2, 1, 8, 8)
    assert nfe == len(seen)

    def ratio(step):
        return float(schedule.sigma(step / 1000) / schedule.alpha(step / 1000))

    wanted = ratio(round(1000 * t)) / 2
    assert seen[0] == 1000
    assert seen == list(range(1000, seen[-1] - 1, -1))
    assert abs(seen[-1] - 1000 * float(schedule.time_of(-2 * math.log(wanted)))) <= 0.5
    assert ratio(seen[-1]) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("num_steps", [5, 50])
def test_few_steps_of_a_small_chain_end_at_the_matching_level_too(num_steps):
    sizes = {"num_steps": num_steps, "t_mid": 0.5}
    model = pair(generator=small(LinearSchedule()), chain=DDPMConfig(network=TINY), **sizes)
    sampling, seen = model.sampling(), []
    network = model.generator.model.denoiser.network
    network.register_forward_pre_hook(lambda _, given: seen.append(int(given[1][0]) + 1))
    level = model.chain.entry(0.5, sampling)
    left = model.generator.left_at(level, sampling)
    _, nfe = model.rough(SampleDraws(0, 0, 2), sampling, None, quiet)
    assert left.sigma / left.alpha == pytest.approx(level.sigma / level.alpha / 2, rel=0.01)
    grid = [round(1000 * one.t) for one in TimeGrid.of(LinearSchedule(), num_steps).levels[:-1]]
    assert seen == [*(step for step in grid if step > round(1000 * left.t)), round(1000 * left.t)]
    assert nfe == len(seen)


def test_a_small_chain_without_so_quiet_a_level_is_left_at_its_last():
    model = pair(generator=small(), num_steps=20, t_mid=0.05)
    x0, nfe = model.rough(SampleDraws(3, 0, 6), model.sampling(), None, quiet)
    source = model.generator.model
    own, _ = source.generate(SampleDraws(3, 0, 6).branch("surrogate"), model.sampling(), None, quiet)
    assert nfe == 20
    assert torch.allclose(x0, torch.nn.functional.interpolate(own, scale_factor=2, mode="bilinear"), atol=1e-6)


def test_a_small_chain_is_finished_where_the_large_one_is_not_entered():
    model = pair(generator=small(), num_steps=20, t_mid=0)
    source = model.generator.model
    own, nfe = source.generate(SampleDraws(3, 0, 6).branch("surrogate"), model.sampling(), None, quiet)
    large = torch.nn.functional.interpolate(own, scale_factor=2, mode="bilinear", align_corners=False)
    samples = model.sample(6, seed=3)
    assert torch.equal(samples.data, model.spec.decode(large))
    assert samples.nfe == nfe == 20


def test_what_is_left_of_noised_items():
    model = on_the_line(0.25, num_steps=10, t_mid=0.5)
    x0, noise = torch.tensor([[2.0]], dtype=torch.float64), Impulses(1)
    found = float(model.chain.recall(x0, 0.5, noise, model.sampling(), None))
    level = model.chain.entry(0.5, model.sampling())
    x_t = level.alpha * 2 + level.sigma
    assert found == pytest.approx(level.alpha * 0.25 * x_t / (level.alpha**2 * 0.25 + level.sigma**2), rel=1e-12)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"t_mid": 1.5}, "sampling.t_mid: 1.5 is not valid"),
        ({"t_mid": -0.1}, "sampling.t_mid: -0.1 is not valid"),
        ({"t_mid": 0.33}, r"t_mid: 0.33 is not on the grid of the 20 steps .*take 0.3 \(step 6\) or 0.35 \(step 7\)"),
        ({"t_mid": 0.01}, r"t_mid: 0.01 is not on the grid .*take 0.05 \(step 1\)"),
        (
            {"num_steps": 1, "t_mid": 0.5},
            "t_mid: 0.5 lies below all 1 steps of the chain, whose last is at 1;",
        ),
        ({"num_steps": 30}, "num_steps: 30 is more than the 20 steps"),
        ({"solver": {"kind": "ancestral", "variance": "learned_range"}}, "learned_range needs a model with a learned"),
    ],
)
def test_sampling_that_does_not_fit_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        pair(**({"num_steps": 20} | values))


def test_a_continuous_chain_is_entered_anywhere():
    model = pair(chain=EDMConfig(network=TINY), num_steps=18, solver="heun", t_mid=0.4321)
    levels = TimeGrid.of(model.chain.schedule, 18).levels
    entry = model.chain.entry(0.4321, model.sampling())
    assert entry in levels
    assert levels[levels.index(entry) - 1].t > 0.4321 >= entry.t


def test_parts_that_do_not_fit_are_refused():
    point = RunSource(**ORIGIN, method=DDPMConfig(network=TINY))
    with pytest.raises(UserError, match="surrogate: has no chain that can be entered; ddpm, iddpm and edm have"):
        pair(chain=SurrogateConfig(chain=DDPMConfig(network=TINY), generator=STORED))
    told = DDPMConfig(network=TINY, conditional=True)
    with pytest.raises(UserError, match="the run is told the class of each sample and the surrogate is not; both"):
        SurrogateConfig.parse({"chain": told, "generator": point, "conditional": True})
    with pytest.raises(UserError, match="the surrogate is told the class of each sample and the run is not"):
        SurrogateConfig.parse({"chain": DDPMConfig(network=TINY), "generator": RunSource(**ORIGIN, method=told)})
    with pytest.raises(UserError, match="generator: 1x4x4 times 2 is not 1x12x12"):
        pair(generator=small(), spec=DataSpec(kind="image", shape=(1, 12, 12), range=(-1, 1)))
    with pytest.raises(UserError, match=r"generator\.kind: 'file' is not valid: should be one of run, low-res"):
        SurrogateConfig.parse({"chain": {"kind": "ddpm", "network": "mlp"}, "generator": {"kind": "file"}})


def test_classes_reach_both():
    told = chain_of(5, conditional=True)
    generator = RunSource(**ORIGIN, method=told.replace(**{"sampling.num_steps": 2}))
    torch.manual_seed(0)
    config = SurrogateConfig(chain=told, generator=generator, conditional=True, sampling={"num_steps": 5, "t_mid": 0.4})
    model, seen = config.build(IMAGES.replace(num_classes=3)).eval(), []
    for network in model.networks():
        network.register_forward_pre_hook(lambda _, given: seen.append(given[2].tolist()))
    assert model.sample(4).condition.tolist() == [0, 1, 2, 0]
    assert seen == [[0, 1, 2, 0]] * 4


def test_a_pair_has_nothing_to_train():
    model = pair(num_steps=20)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="has nothing to train"):
        model.loss(None, None)
    with pytest.raises(UserError, match="use osmose surrogate RUN --with RUN2"):
        SurrogateConfig.recipe(IMAGES, 1.0)


def test_a_configuration_survives_json():
    for generator in (STORED, small(), RunSource(**ORIGIN, method=EDMConfig(network=TINY))):
        config = SurrogateConfig(chain=DDPMConfig(network=UNetConfig(channels=8)), generator=generator)
        assert METHODS.parse(json.loads(json.dumps(config.to_json()))) == config
