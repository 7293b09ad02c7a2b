"""DiffusionBlocks: who owns which noise, that nothing passes between blocks, and what is made of them."""

import contextlib
import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from osmose.acceleration.blocks import Blocks, merge
from osmose.acceleration.blocks_plan import BlocksPlan
from osmose.analysis.memory import peak_bytes
from osmose.configuration import ConfigError
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws, StepDraws
from osmose.gaussian.grid import TimeGrid
from osmose.gaussian.schedule import VarianceExploding
from osmose.methods.diffusion import EDMConfig
from osmose.methods.messages import Batch
from osmose.methods.times import LogNormalTimes
from osmose.networks.dit import DiTConfig
from osmose.networks.mlp import MLPConfig
from osmose.training.recipes import recipe, train
from osmose.training.run import Run, load
from osmose.training.trainer import Trainer, built

POINTS = DataConfig(source="toy:checkerboard", num_points=200)
TINY = {
    "network": "mlp",
    "network.width": 16,
    "network.depth": 6,
    "training.batch_size": 8,
    "training.steps": 6,
    "training.validation_items": 8,
    "training.preview_samples": 4,
    "training.checkpoint_every": 2,
    "training.precision": "fp32",
}


def whole(**changes):
    return recipe("edm", POINTS, POINTS.load(), 0, TINY | changes)


def plan(count=3, **options):
    changes = options.pop("changes", {})
    return BlocksPlan.parse({"count": count, "whole": whole(**changes).to_json(), **options})


# --- who owns which noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "edges"),
    [
        (1, [0.002, 80]),
        (2, [0.002, 0.301194, 80]),
        (3, [0.002, 0.179632, 0.505041, 80]),
        (6, [0.002, 0.0943401, 0.179632, 0.3012, 0.505041, 0.961665, 80]),
    ],
)
def test_edges_of_equal_mass_are_those_of_the_paper(count, edges):
    assert plan(count).edges() == pytest.approx(edges, rel=5e-5)


def test_intervals_hold_what_they_are_equal_in():
    law = LogNormalTimes()
    assert (law.share_below(0.002), 1 - law.share_below(80.0)) == (
        pytest.approx(1.465e-5, rel=1e-3),
        pytest.approx(1.646e-6, rel=1e-3),
    )

    def masses(partition):
        shares = [law.share_below(edge) for edge in plan(partition=partition).edges()]
        return [high - low for low, high in itertools.pairwise(shares)]

    assert masses("equal-mass") == pytest.approx([(1 - 1.63e-5) / 3] * 3, rel=1e-6)
    assert masses("equal-log") == pytest.approx([0.108, 0.848, 0.044], abs=5e-4)
    assert plan(partition="equal-log").edges() == pytest.approx([0.002, 0.06840, 2.3392, 80], rel=1e-4)
    assert masses("equal-sigma") == pytest.approx([0.99989, 8.5e-5, 6.4e-6], rel=0.02)
    assert law.ratio_at(law.share_below(0.7)) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("gamma", "intervals", "masses"),
    [
        (0.05, [(0.392, 80), (0.1706, 0.5318), (0.002, 0.2249)], [0.4131, 0.3644, 0.4039]),
        (0.1, [(0.3043, 80), (0.162, 0.56), (0.002, 0.2817)], None),
        (0.0, [(0.505041, 80), (0.179632, 0.505041), (0.002, 0.179632)], [1 / 3] * 3),
    ],
)
def test_in_training_intervals_are_wider_and_end_where_the_noise_does(gamma, intervals, masses):
    found = plan(overlap=gamma)
    for block, ends in enumerate(intervals):
        assert found.widened(block) == pytest.approx(ends, rel=5e-4)
    law = LogNormalTimes()
    if masses:
        shares = [[law.share_below(edge) for edge in found.widened(block)] for block in range(3)]
        assert [high - low for low, high in shares] == pytest.approx(masses, abs=2e-4)


def test_noise_of_a_block_is_the_law_between_its_ends():
    law, schedule = LogNormalTimes(), VarianceExploding()
    u = torch.linspace(0, 1 - 1e-9, 2001, dtype=torch.float64)
    part = law.replace(lowest=0.2, highest=0.6)
    sigma = schedule.sigma(part.times(u, schedule))
    assert (float(sigma.min()), float(sigma.max())) == (pytest.approx(0.2), pytest.approx(0.6))
    low, high = law.share_below(0.2), law.share_below(0.6)
    torch.testing.assert_close(sigma, schedule.sigma(law.times(low + u * (high - low), schedule)))
    with pytest.raises(ConfigError, match="lowest: 2 is not valid: has to be below highest, 1"):
        law.replace(lowest=2.0, highest=1.0)


def test_every_step_of_sampling_has_one_owner():
    run = plan(changes={"network.depth": 6})
    model = built(run.merged())
    network = model.denoiser.network

    def counts(spacing):
        labels = [25 * math.log(level.sigma) for level in TimeGrid.of(VarianceExploding(), 50, spacing).levels[:-1]]
        return network.owner(torch.tensor(labels)).bincount(minlength=3).tolist()

    assert counts("karras") == [33, 4, 13]
    assert all(16 <= count <= 17 for count in counts("equal-mass"))
    calls = []
    for index, part in enumerate(network.parts):
        part.register_forward_hook(lambda *_, index=index: calls.append(index))
    model.sample(2, num_steps=50, solver={"kind": "ddim"})
    assert sorted(calls, key=lambda i: i) == calls  # from the noisiest on
    assert [calls.count(i) for i in range(3)] == [33, 4, 13]
    assert [len(part.blocks) for part in network.parts] == [2, 2, 2]
    calls.clear()
    model.sample(2, num_steps=10)  # two evaluations a step: each by the owner of its own level
    assert len(calls) == 19


# --- exact cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_untrained_head_is_exact_on_gaussian_data_in_every_block(count):
    """F = 0 is the best that there is: a loss of 1 at every noise, and the chain of Euler's rule in closed form."""
    parts = plan(count, changes={"network.depth": 6})
    for block in range(count):
        model = built(parts.member(block))
        data = model.denoiser.parametrization.sigma_data * torch.randn(
            4000, 2, generator=torch.Generator().manual_seed(block)
        )
        losses = model.loss(Batch(data), StepDraws(0, 0, 0, 4000, 4000)).per_item
        assert float(losses.mean()) == pytest.approx(1.0, abs=0.05)
    config = parts.merged().replace(**{"method.parametrization": {"kind": "edm", "sigma_data": 0.5}})
    model = built(config)
    for spacing, steps, deviation in (
        ("karras", 50, 0.47182),
        ("karras", 18, 0.42304),
        ("equal-mass", 50, 0.48376),
        ("equal-mass", 18, 0.45746),
    ):
        z = model.noise(SampleDraws(0, 0, 4, "cpu"))
        x = model.sample(4, num_steps=steps, spacing=spacing, solver={"kind": "ddim"}).data
        torch.testing.assert_close(model.spec.encode(x), deviation * z, rtol=3e-4, atol=1e-5)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Blocks that were trained one after the other; not to be changed."""
    folder = tmp_path_factory.mktemp("blocks") / "run"
    assert Blocks.begin(folder, plan()).carry_out(POINTS.load(), progress=False)
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_made_is_a_run(made):
    run = Run.open(made)
    assert (run.config.method.kind, run.config.method.network.kind) == ("edm", "experts")
    model = load(made)
    for block in range(3):
        part = weights(made / "blocks" / str(block))
        own = dict(model.denoiser.network.parts[block].named_parameters())
        assert all(torch.equal(value, part[f"denoiser.network.{name}"]) for name, value in own.items())
    assert model.sample(4, num_steps=4).data.shape == (4, 2)
    assert (made / "samples" / "blocks.png").is_file()
    assert not (made / "blocks" / "0" / "samples").exists()  # by itself it draws nothing
    assert [line["block"] for line in run.metrics() if "validation_loss" in line] == [0, 1, 2]


def test_a_single_block_is_training_from_end_to_end(tmp_path):
    for gamma in (0.0, 0.3):
        Blocks.begin(tmp_path / f"one{gamma}", plan(1, overlap=gamma)).carry_out(POINTS.load(), progress=False)
    train("edm", POINTS, tmp_path / "plain", progress=False, **TINY)
    assert same(tmp_path / "one0.0", tmp_path / "plain")
    assert same(tmp_path / "one0.3", tmp_path / "plain")


def test_in_turns_and_by_workers_it_is_the_same(made, tmp_path, monkeypatch):
    Blocks.begin(tmp_path / "turns", plan()).carry_out(POINTS.load(), order="interleaved", progress=False)
    assert same(tmp_path / "turns", made)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        blocks = Blocks.begin(tmp_path / "workers", plan())
        assert blocks.carry_out(POINTS.load(), progress=False)
        assert blocks.missing() == ([0, 2] if rank == "1" else [])
    monkeypatch.delenv("WORLD_SIZE")
    assert same(tmp_path / "workers", made)


@pytest.mark.parametrize("order", ["sequential", "interleaved"])
def test_a_training_that_was_stopped_is_taken_up_again(made, tmp_path, monkeypatch, order):
    optimise, count = Trainer.optimise, []

    def stopping(trainer, window):
        count.append(trainer)
        return 1 / 0 if len(count) == 11 else optimise(trainer, window)

    monkeypatch.setattr(Trainer, "optimise", stopping)
    with contextlib.suppress(ZeroDivisionError):
        Blocks.begin(tmp_path / "run", plan()).carry_out(POINTS.load(), order=order, progress=False)
    assert not Blocks.open(tmp_path / "run").finished
    with pytest.raises(UserError, match="blocks that are not all trained; osmose train blocks --out"):
        Run.open(tmp_path / "run")
    monkeypatch.setattr(Trainer, "optimise", optimise)
    assert Blocks.open(tmp_path / "run").carry_out(POINTS.load(), order=order, progress=False)
    assert same(tmp_path / "run", made)


def test_a_step_of_one_block_leaves_the_bytes_of_others(tmp_path):
    blocks, dataset = Blocks.begin(tmp_path / "run", plan()), POINTS.load()
    blocks.carry_out(dataset, only=[0, 1], progress=False)
    assert blocks.missing() == [2]

    def content(block):
        folder = tmp_path / "run" / "blocks" / str(block)
        return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    before = [content(block) for block in (0, 1)]
    assert len(before[0]) >= 5
    blocks.carry_out(dataset, progress=False)
    assert [content(block) for block in (0, 1)] == before


def test_memory_is_that_of_one_block():
    """What is kept for the backward pass, and what an optimizer holds: those of a third of the layers, and the ends."""
    parts = plan(changes={"network.depth": 12, "network.width": 32})
    one, undivided = built(parts.member(0)), built(parts.whole)

    def size(model, inner):
        network = model.denoiser.network
        return sum(p.numel() for p in (network.blocks if inner else network).parameters())

    ends = size(undivided, False) - size(undivided, True)
    assert 3 * (size(one, False) - ends) == size(undivided, False) - ends

    def kept(model):
        batch = Batch(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))
        with peak_bytes() as count:
            loss = model.loss(batch, StepDraws(0, 0, 0, 64, 64)).per_item.mean()
            found = count.live
        assert loss.requires_grad
        return found

    shorter = built(plan(6, changes={"network.depth": 12, "network.width": 32}).member(0))  # 2 layers, and 4, and 12
    layer = (kept(one) - kept(shorter)) / 2
    assert kept(undivided) - kept(one) == pytest.approx(8 * layer, rel=0.01)
    assert kept(one) < 0.45 * kept(undivided)


# --- merging --------------------------------------------------------------------------------------------------------


def test_blocks_of_several_folders_are_put_together(made, tmp_path):
    dataset = POINTS.load()
    Blocks.begin(tmp_path / "a", plan()).carry_out(dataset, only=[0, 2], progress=False)
    Blocks.begin(tmp_path / "b", plan()).carry_out(dataset, only=[1], progress=False)
    with pytest.raises(
        UserError, match="number 1 of the blocks 0 to 2 is trained in none of the folders; train with --only"
    ):
        merge([tmp_path / "a"], tmp_path / "x", dataset)
    assert not (tmp_path / "x").exists()
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab", dataset)
    assert same(tmp_path / "ab", made)
    assert Blocks.open(tmp_path / "ab").missing() == []
    with pytest.raises(UserError, match="exists already"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab", dataset)


def test_what_does_not_belong_together(made, tmp_path):
    dataset = POINTS.load()
    Blocks.begin(tmp_path / "wide", plan(overlap=0.2)).carry_out(dataset, only=[0], progress=False)
    with pytest.raises(UserError, match=r"wide: was begun otherwise than .*run"):
        merge([made, tmp_path / "wide"], tmp_path / "x", dataset)
    shutil.copytree(made, tmp_path / "other")
    path = tmp_path / "other" / "blocks" / "1" / "model.safetensors"
    shutil.copy(made / "blocks" / "2" / "model.safetensors", path)
    with pytest.raises(UserError, match=r"block 1 is trained in .*run and in .*other, and differs; leave one out"):
        merge([made, tmp_path / "other"], tmp_path / "x", dataset)
    with pytest.raises(UserError, match="no blocks were begun here"):
        merge([tmp_path], tmp_path / "x", dataset)
    with pytest.raises(UserError, match="RUN: name the folders"):
        merge([], tmp_path / "x", dataset)
    with pytest.raises(UserError, match="only: there is no block 3; they are 0 to 2"):
        Blocks.open(tmp_path / "wide").carry_out(dataset, only=[3], progress=False)
    Path(tmp_path / "wide" / "blocks.json").write_text("{}")
    with pytest.raises(UserError, match=r"blocks.json: not written by osmose"):
        Blocks.open(tmp_path / "wide")


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 4}, "6 layers do not fall into 4 equal blocks; say split"),
        ({"count": 7}, "7 blocks of 6 layers; take at most as many"),
        ({"count": 0}, "count: 0 is not valid"),
        ({"split": (2, 3)}, r"split: \(2, 3\) is not valid: 3 numbers from 1 whose sum is 6"),
        ({"split": (2, 3, 2)}, r"split: \(2, 3, 2\) is not valid: 3 numbers from 1 whose sum is 6"),
        ({"split": (0, 3, 3)}, r"split: \(0, 3, 3\) is not valid"),
        ({"overlap": -0.1}, "overlap: -0.1 is not valid"),
        ({"partition": "equal"}, "partition: 'equal' is not valid: should be 'equal-mass', 'equal-log' or"),
        ({"changes": {"schedule": "trig"}}, "blocks share noise levels of edm: schedule ve and times log-normal"),
        ({"changes": {"times": "uniform"}}, "blocks share noise levels of edm"),
        ({"changes": {"times.lowest": 0.1}}, "times.lowest and times.highest are what blocks are given"),
    ],
)
def test_what_cannot_be_cut(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(**options)


def test_unequal_splits_and_networks_that_are_no_stacks():
    parts = plan(split=(1, 2, 3))
    assert [parts.member(block).method.network.depth for block in range(3)] == [1, 2, 3]
    digits = DataConfig(source="digits")
    config = recipe("edm", digits, digits.load(), 0, {"network.channels": 8})
    experts = BlocksPlan.parse({"count": 2, "whole": config.to_json()})
    assert experts.member(0).method.network == experts.member(1).method.network == config.method.network
    with pytest.raises(ConfigError, match="split: unet is no stack of layers; every block has a whole one"):
        BlocksPlan.parse({"count": 2, "whole": config.to_json(), "split": (1, 1)})
    assert isinstance(config.method, EDMConfig)
    assert not isinstance(config.method.network, DiTConfig | MLPConfig)
