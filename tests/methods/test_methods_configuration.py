import json

import pytest

from osmose.configuration import ConfigError
from osmose.data.dataset import DataSpec
from osmose.gaussian.parametrization import EDMParametrization, VParametrization
from osmose.gaussian.schedule import CosineSchedule, VarianceExploding
from osmose.gaussian.solvers import DDIM, Ancestral, DPMSolverPP2M, Heun
from osmose.methods import METHODS
from osmose.methods.chain import GuidedSampling
from osmose.methods.diffusion import DDPMConfig, EDMConfig
from osmose.methods.times import LogNormalTimes, UniformTimes
from osmose.networks.mlp import MLPConfig
from osmose.networks.unet import UNetConfig

CONFIGS = [
    DDPMConfig(network=UNetConfig()),
    DDPMConfig(
        network=UNetConfig(channels=24, mult=(1, 3), attention=(), group_channels=2, padding="asymmetric"),
        schedule=CosineSchedule(num_steps=4000, offset=0.01),
        parametrization=VParametrization(),
        times=LogNormalTimes(mean=0.5, stratified=True),
        sampling=GuidedSampling(num_steps=7, solver=Ancestral(variance="fixed_large"), spacing="karras", clip=False),
        conditional=True,
    ),
    DDPMConfig(network=MLPConfig(width=8), sampling=GuidedSampling(solver=DPMSolverPP2M())),
    EDMConfig(network=UNetConfig()),
    EDMConfig(
        network=MLPConfig(),
        schedule=VarianceExploding(sigma_min=0.01, sigma_max=10.0, rho=3.0),
        parametrization=EDMParametrization(sigma_data=0.123),
        times=UniformTimes(),
        sampling=GuidedSampling(solver=DDIM(eta=0.3)),
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.kind}-{c.network.kind}-{c.sampling.solver.kind}")
def test_json_and_back(config):
    values = json.loads(json.dumps(config.to_json()))
    again = METHODS.parse(values)
    assert again == config
    assert type(again) is type(config)
    assert again.to_json() == values
    for part in ("network", "schedule", "parametrization", "times", "noise", "sampling"):
        assert type(getattr(again, part)) is type(getattr(config, part))
    # The parts are written with their own fields, not only those of their base class.
    assert values["network"]["kind"] == config.network.kind
    assert set(values["schedule"]) == set(type(config.schedule).model_fields)
    assert set(values["sampling"]["solver"]) == set(type(config.sampling.solver).model_fields)


def test_used_configurations_still_compare():
    a, b = (DDPMConfig(network=MLPConfig()) for _ in range(2))
    a.schedule.level(0.5), b.schedule.level(0.3)
    assert a == b
    assert a != b.replace(**{"schedule.num_steps": 999})


def test_the_published_defaults():
    ddpm = DDPMConfig(network="unet")
    assert (ddpm.schedule.kind, ddpm.schedule.num_steps) == ("linear", 1000)
    assert (ddpm.parametrization.kind, ddpm.times.kind, ddpm.times.stratified) == ("eps", "uniform", False)
    assert ddpm.sampling.clip
    assert ddpm.network == UNetConfig()
    edm = EDMConfig(network="unet")
    assert edm.schedule == VarianceExploding(sigma_min=0.002, sigma_max=80, rho=7)
    assert edm.parametrization == EDMParametrization(sigma_data=0.5)
    assert edm.times == LogNormalTimes(mean=-1.2, std=1.2)
    assert edm.sampling == GuidedSampling(num_steps=18, solver=Heun(), spacing="even", clip=False)


@pytest.mark.parametrize("kind", ["ddpm", "iddpm", "edm"])
@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_the_recipe_completes_a_configuration(kind, shape):
    cls = METHODS.resolve(kind)
    spec = DataSpec(kind="points" if len(shape) == 1 else "image", shape=shape)
    config = METHODS.parse({"kind": kind, **cls.recipe(spec, 0.61234)})
    assert config.network.resolutions(shape) if config.network.kind == "unet" else config.network.kind == "mlp"
    if kind == "edm":
        assert config.parametrization.sigma_data == 0.612


def test_changes_by_name_reach_into_the_parts():
    config = CONFIGS[0].replace(**{"schedule": "cosine", "schedule.num_steps": 200, "sampling.solver.eta": 0.5})
    assert config.schedule == CosineSchedule(num_steps=200)
    assert config.sampling.solver == DDIM(eta=0.5)
    assert CONFIGS[0].replace(network="mlp").network == MLPConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "ddpm"}, "network: required, but not given"),
        ({"kind": "dpm", "network": "unet"}, "unknown method 'dpm'; did you mean 'ddpm'"),
        ({"kind": "ddpm", "network": "unt"}, "network.kind: unknown network 'unt'; did you mean 'unet'"),
        ({"kind": "ddpm", "network": "unet", "shedule": "cosine"}, "shedule: unknown field; did you mean 'schedule'"),
        ({"kind": "ddpm", "network": "unet", "schedule": {"kind": "cosine", "T": 5}}, r"schedule\.T: unknown field"),
        ({"kind": "ddpm", "network": "unet", "times": {"kind": "log-normal", "std": 0}}, r"times\.std.*greater than 0"),
        ({"kind": "ddpm", "network": "unet", "noise": "pink"}, "noise.*unknown noise 'pink'"),
        ({"kind": "ddpm", "network": "unet", "sampling": {"num_steps": 0}}, r"sampling\.num_steps: 0"),
        ({"kind": "ddpm", "network": "unet", "sampling": {"solver": {"kind": "ddim", "eta": 2}}}, r"eta.*less than"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        METHODS.parse(values)
