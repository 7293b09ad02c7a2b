"""From two runs, or a run and a file, to a run that starts its chain in the middle."""

import json
import shutil

import numpy as np
import pytest
import torch

from osmose.acceleration.hand_over import HandOver, choose, hand_overs, metric_for, sweep, times_for, write_sweep
from osmose.acceleration.surrogate import Pair, surrogate
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.training import files
from osmose.training.recipes import train
from osmose.training.run import Run, data_of, load

SHORT = {"training.batch_size": 8, "training.preview_samples": 4, "training.steps": 3, "training.precision": "fp32"}
MLP = {"network": "mlp", "network.width": 16, "network.depth": 1}
FEW = {"sampling.num_steps": 10}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that hardly learned anything; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name, method, data, **changes):
        source = data if isinstance(data, DataConfig) else DataConfig(source=data, num_points=400)
        train(method, source, folder / name, progress=False, **{**SHORT, **MLP, **FEW, **changes})

    make("ddpm", "ddpm", "digits")
    make("edm", "edm", "digits")
    make("small", "ddpm", DataConfig(source="digits", downsample=2))
    make("tiny", "ddpm", DataConfig(source="digits", downsample=4))
    make("told", "ddpm", "digits", conditional=True)
    make("moons", "ddpm", "toy:two-moons")
    for name in ("one", "other"):
        images = np.random.default_rng(len(name)).integers(0, 256, (40, 8, 8), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images)
        (folder / name).mkdir()
        (folder / f"{name}.npz").rename(folder / name / "same.npz")
    make("one-large", "ddpm", f"npz:{folder / 'one' / 'same.npz'}")
    make("one-small", "ddpm", DataConfig(source=f"npz:{folder / 'one' / 'same.npz'}", downsample=2))
    make("other-small", "ddpm", DataConfig(source=f"npz:{folder / 'other' / 'same.npz'}", downsample=2))
    train("gaussian", "digits", folder / "gaussian", progress=False)
    train("gaussian", DataConfig(source="digits", downsample=2), folder / "small-gaussian", progress=False)
    (folder / "empty").mkdir()
    (folder / "unfinished").mkdir()
    shutil.copy(folder / "ddpm" / "config.json", folder / "unfinished")
    dataset = DataConfig(source="digits").load()
    np.savez(folder / "real.npz", samples=dataset.train[:900].numpy())
    np.savez(folder / "noise.npz", samples=torch.randint(0, 17, (900, 1, 8, 8)).numpy())
    np.savez(folder / "wide.npz", samples=np.zeros((20, 1, 9, 8)))
    np.savez(folder / "model-units.npz", samples=np.linspace(-1, 1, 64 * 20).reshape(20, 1, 8, 8))
    np.savez(folder / "nan.npz", samples=np.full((20, 1, 8, 8), np.nan))
    return folder


@pytest.fixture(scope="module")
def digits():
    return DataConfig(source="digits").load()


def test_a_pair_is_a_run_like_any_other(runs, tmp_path):
    made = surrogate(runs / "ddpm", runs / "gaussian", tmp_path / "pair", t_mid=0.3)
    chain, config = Run.open(runs / "ddpm"), made.config
    assert (config.data, config.spec, config.identity) == (chain.config.data, chain.config.spec, chain.config.identity)
    assert (config.parent.folder, config.parent.sha256) == ("ddpm", chain.hash())
    assert config.method.generator.sha256 == Run.open(runs / "gaussian").hash()
    assert config.method.chain == chain.config.method
    assert config.method.sampling.t_mid == 0.3
    assert config.method.sampling.num_steps == 10
    samples = load(tmp_path / "pair").sample(5, seed=2)
    assert torch.equal(samples.data, Pair(runs / "ddpm", runs / "gaussian", t_mid=0.3).model.sample(5, seed=2).data)
    # at 0 the samples are the surrogate's: of the stream that the pair keeps for it
    assert samples.nfe == 3
    assert sorted(path.name for path in (tmp_path / "pair").iterdir()) == ["config.json", "model.safetensors"]
    data_of(made)


def test_what_is_said_of_sampling_replaces_the_run_s(runs):
    sampling = Pair(
        runs / "ddpm", runs / "gaussian", num_steps=20, solver="dpmpp-2m", clip=False
    ).config.method.sampling
    assert (sampling.num_steps, sampling.solver.kind, sampling.clip, sampling.t_mid) == (20, "dpmpp-2m", False, 1.0)


def test_a_chain_in_continuous_time_and_a_pair_as_a_surrogate(runs, tmp_path):
    first = surrogate(runs / "ddpm", runs / "gaussian", tmp_path / "first", t_mid=0.5)
    both = surrogate(runs / "edm", first.folder, tmp_path / "both", t_mid=0.37, num_steps=8)
    assert load(both.folder).sample(3).nfe == first.model().sample(1).nfe + 2 * 3 - 1


@pytest.mark.parametrize(("name", "factor"), [("small", 2), ("tiny", 4)])
def test_a_run_on_smaller_images_is_handed_over(runs, tmp_path, name, factor):
    made = surrogate(runs / "ddpm", runs / name, tmp_path / "pair", num_steps=10, t_mid=0.5)
    generator = made.config.method.generator
    assert (generator.kind, generator.factor) == ("low-resolution", factor)
    assert load(made.folder).sample(3).data.shape == (3, 1, 8, 8)


def test_images_of_one_name_are_told_apart_by_their_hash(runs, tmp_path):
    surrogate(runs / "one-large", runs / "one-small", tmp_path / "pair", t_mid=0.5)
    large, small, other = (Run.open(runs / name).config.identity for name in ("one-large", "one-small", "other-small"))
    assert small.full_sha256 == large.sha256 != other.full_sha256
    assert (small.source, small.num_train) == (other.source, other.num_train)


def test_stored_samples(runs, tmp_path):
    made = surrogate(runs / "ddpm", runs / "real.npz", tmp_path / "pair", t_mid=0)
    model = load(made.folder)
    with np.load(runs / "real.npz") as archive:
        known = {tuple(row.ravel()) for row in archive["samples"].astype(np.float64)}
    drawn = model.sample(50).data
    assert {tuple(row.flatten().tolist()) for row in drawn} <= known
    with pytest.raises(UserError, match="901 is more than the 900 different samples"):
        model.sample(901)
    again = surrogate(runs / "edm", made.folder, tmp_path / "again", t_mid=0.5)
    with pytest.raises(UserError, match="901 is more than the 900 different samples"):
        load(again.folder).sample(901)


@pytest.mark.parametrize(
    ("run", "partner", "options", "message"),
    [
        ("ddpm", "moons", {}, "moons was trained on data of another source, toy:two-moons, than .*ddpm, digits"),
        ("small", "ddpm", {}, r"ddpm was trained on data of another shape, \(1, 8, 8\), than .*small, \(1, 4, 4\)"),
        ("ddpm", "small-gaussian", {}, "generator: gaussian on smaller images has no chain to hand over; ddpm, iddpm"),
        (
            "gaussian",
            "ddpm",
            {},
            "has no chain that can be entered; ddpm, iddpm and edm have; RUN is the diffusion, and --with",
        ),
        ("told", "gaussian", {}, "told is told the class of each sample and .*gaussian is not; train both"),
        ("ddpm", "told", {}, "told is told the class of each sample and .*ddpm is not; train both with"),
        ("told", "real.npz", {}, "real.npz is not; stored samples go with a run that was trained without"),
        ("ddpm", "empty", {}, "empty: not a run folder"),
        ("ddpm", "ddpm/config.json", {}, "config.json is neither a run folder nor an .npz of samples"),
        ("ddpm", "unfinished", {}, "unfinished: has no model.safetensors yet"),
        ("unfinished", "ddpm", {}, "unfinished: has no model.safetensors yet"),
        ("empty", "ddpm", {}, "empty: not a run folder"),
        ("ddpm", "none.npz", {}, "none.npz: no such file"),
        ("ddpm", "wide.npz", {}, r"--with: .*wide.npz: samples: shape \(20, 1, 9, 8\) given, \(n, 1, 8, 8\)"),
        ("ddpm", "model-units.npz", {}, "these look like the model's units"),
        ("ddpm", "nan.npz", {}, "20 of 20 hold NaN"),
        ("ddpm", "gaussian", {"t_mid": 1.2}, "sampling.t_mid: 1.2 is not valid: should be less than or equal to 1"),
        ("ddpm", "gaussian", {"t_mid": 0.0005}, "t_mid: 0.0005 is not on the grid of the 1000 steps of the schedule"),
        ("ddpm", "gaussian", {"num_steps": 1001}, "num_steps: 1001 is more than the 1000 steps"),
        ("ddpm", "gaussian", {"solver": "rk4"}, "sampling.solver.kind: unknown solver 'rk4'"),
        ("ddpm", "gaussian", {"t_min": 0.5}, "sampling.t_min: unknown field; did you mean 't_mid'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(runs, tmp_path, run, partner, options, message):
    with pytest.raises(UserError, match=message):
        surrogate(runs / run, runs / partner, tmp_path / "pair", **{"t_mid": 0.5, **options})
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_taken_is_refused(runs, tmp_path):
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already; choose another folder"):
        surrogate(runs / "ddpm", runs / "gaussian", tmp_path / "pair", t_mid=0.5)
    assert (tmp_path / "pair" / "notes.txt").read_text() == "mine"
    (tmp_path / "free").mkdir()
    assert surrogate(runs / "ddpm", runs / "gaussian", tmp_path / "free", t_mid=0.5).weights.is_file()


def test_half_a_run_folder_is_never_seen(runs, tmp_path, monkeypatch):
    def full(path, _):
        raise UserError(f"{path}: no space left on the disk")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(UserError, match="no space left"):
        surrogate(runs / "ddpm", runs / "gaussian", tmp_path / "pair", t_mid=0.5)
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ where to enter


def test_real_data_as_a_surrogate_are_as_far_from_data_as_data_are(runs, digits):
    found = hand_overs(Pair(runs / "ddpm", runs / "real.npz"), digits, [0.01, 0.5], n=600, seed=1)
    for one in found:
        assert one.distance == pytest.approx(one.floor, rel=0.7)
    assert choose(found) == 0.01


def test_a_perfect_surrogate_passes_everywhere(runs, digits):
    """A dozen times over seeds: means over several splits do not fail by luck."""
    both = Pair(runs / "ddpm", runs / "real.npz")
    assert [choose(hand_overs(both, digits, [0.05, 0.5, 1.0], n=150, seed=seed)) for seed in range(4)] == [0.05] * 4


def test_more_samples_than_are_stored_are_refused(runs, digits):
    with pytest.raises(UserError, match="n: 901 is not valid: the surrogate has only 900 different samples"):
        hand_overs(Pair(runs / "ddpm", runs / "real.npz"), digits, [0.5], n=901)
    with pytest.raises(UserError, match="n: 3 is not valid: must be at least 4"):
        hand_overs(Pair(runs / "ddpm", runs / "real.npz"), digits, [0.5], n=3)


def test_noise_as_a_surrogate_is_far_at_little_noise_and_near_at_much(runs, digits):
    times = [0.02, 0.3, 1.0]
    found = hand_overs(Pair(runs / "ddpm", runs / "noise.npz"), digits, times, n=600)
    assert [one.t_mid for one in found] == times
    ratios = [one.distance / one.floor for one in found]
    assert ratios[0] > 5 > ratios[2]
    assert hand_overs(Pair(runs / "ddpm", runs / "noise.npz"), digits, times, n=600) == found
    assert hand_overs(Pair(runs / "ddpm", runs / "noise.npz"), digits, times, n=600, seed=1) != found


def test_more_samples_than_real_data_are_refused(runs, digits):
    with pytest.raises(UserError, match="n: 900 is not valid: twice as many real items are needed, and there are 1617"):
        hand_overs(Pair(runs / "ddpm", runs / "real.npz"), digits, [0.5], n=900)


@pytest.mark.parametrize(
    ("ratios", "chosen"),
    [
        ([9, 5, 1.9, 1, 1], 0.3),
        ([1, 5, 1.9, 1, 1], 0.3),  # a lucky small time does not count
        ([2, 2, 2, 2, 2], 0.1),
        ([9, 9, 9, 9, 2], 0.5),
        ([9, 1, 1, 1, 2.1], None),
    ],
)
def test_the_smallest_time_from_which_on_the_distance_is_small_is_chosen(ratios, chosen):
    found = [HandOver(t, 3 * ratio, 3.0) for t, ratio in zip((0.1, 0.2, 0.3, 0.4, 0.5), ratios, strict=True)]
    assert choose(found) == choose(found[::-1]) == chosen
    assert choose(found, 10) == 0.1


def test_times_that_few_steps_do_not_have_are_left_out_unless_they_are_asked_for(runs):
    few = Pair(runs / "ddpm", runs / "gaussian", num_steps=1, t_mid=1)
    assert times_for(few) == [1.0]
    assert times_for(Pair(runs / "ddpm", runs / "gaussian"), [0.5, 0.25, 0.5]) == [0.25, 0.5]
    with pytest.raises(UserError, match=r"t_mid: 0\.5 lies below all 1 steps"):
        times_for(few, [0.5, 1])


def test_a_sweep_and_its_files(runs, digits, tmp_path):
    both, steps = Pair(runs / "ddpm", runs / "gaussian"), []
    result = sweep(both, digits, [0.2, 1.0], n=100, on_step=lambda *done: steps.append(done))
    assert metric_for(digits) == result.metric == "fd_clf"
    assert [point.t_mid for point in result.points] == [0.0, 0.2, 1.0, None]
    assert [point.nfe for point in result.points] == [0, 2, 10, 10]
    assert [one.t_mid for one in result.hand_overs] == [0.2, 1.0]
    assert steps == [(done, 5) for done in range(1, 6)]
    again = sweep(Pair(runs / "ddpm", runs / "gaussian"), digits, [0.2, 1.0], n=100)
    assert [point.scores for point in again.points] == [point.scores for point in result.points]
    paths = write_sweep(result, both, tmp_path / "out")
    assert [path.name for path in paths] == ["surrogate.json", "surrogate.png", "beside.png"]
    stored = json.loads(paths[0].read_text())
    assert stored["points"][1]["scores"] == result.points[1].scores
    assert (stored["conditions"]["run"], stored["conditions"]["with"]) == ("ddpm", "gaussian")
    rough, finished = result.pictures
    shown = result.chosen or 1.0
    assert torch.equal(finished, both.model.sample(32, t_mid=shown).data)
    assert torch.equal(rough, both.model.sample(32, t_mid=0).data)
