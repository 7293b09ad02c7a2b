"""Data that samples begin with: one form at both ends, pairs that stay together, starts that a seed decides."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from osmose.configuration import ConfigError
from osmose.data.dataset import DataConfig, DataSpec
from osmose.errors import UserError
from osmose.methods.interpolant import Interpolant
from osmose.training.recipes import checked, recipe
from osmose.training.run import Run
from osmose.training.trainer import Trainer, validation_batches

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((60, 2)) * [1.0, 10.0] + 3.0
IMAGES = RNG.integers(0, 256, (24, 4, 4), dtype=np.uint8)
SMALL = {
    "network.width": 8,
    "network.depth": 1,
    "training.batch_size": 8,
    "training.preview_samples": 4,
    "training.preview_every": 100,
    "training.validate_every": 100,
    "training.checkpoint_every": 100,
    "sampling.num_steps": 1,
}


def saved(folder, name, **arrays):
    np.savez(folder / f"{name}.npz", **arrays)
    return f"npz:{folder}/{name}.npz"


def follows(rows):
    """What belongs to rows (N, 2): every row to another, and they can be told apart."""
    return rows * [-2.0, 0.5] + [100.0, 7.0]


@pytest.fixture
def pair(tmp_path):
    """The sources of rows and of what belongs to them."""
    return {
        "source": saved(tmp_path, "after", x=follows(ROWS), y=np.arange(60) % 3),
        "start": saved(tmp_path, "before", x=ROWS),
    }


# --- reading --------------------------------------------------------------------------------------------------------


def test_both_ends_are_read_alike(pair):
    data = DataConfig(**pair, held_out=0.25, split_seed=3).load()
    assert (data.start.source, data.paired) == ("npz:before.npz", False)
    for end, name in ((data, "source"), (data.start, "start")):
        alone = DataConfig(source=pair[name], held_out=0.25, split_seed=3).load()
        assert torch.equal(end.train, alone.train)
        assert torch.equal(end.held_out, alone.held_out)
        assert end.spec.replace(start=None) == alone.spec
    assert (len(data.train), len(data.held_out)) == (45, 15)
    assert data.spec.start == data.start.spec
    assert data.spec.start.shift != data.spec.shift  # each has mean 0 and deviation 1 by itself
    for end in (data, data.start):
        model = end.spec.encode(end.train)
        torch.testing.assert_close(model.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(model.std(0, correction=0), torch.ones(2))
    assert DataConfig(source=pair["source"]).load().start is None


def test_the_ends_may_have_any_number_of_items_unless_they_are_paired(tmp_path, pair):
    start = saved(tmp_path, "few", x=ROWS[:20])
    data = DataConfig(**{**pair, "start": start}).load()
    assert (len(data.train), len(data.start.train)) == (54, 18)
    with pytest.raises(UserError) as error:
        DataConfig(**{**pair, "start": start}, paired=True).load()
    assert str(error.value) == (
        "paired: npz:after.npz has 54 + 6 items (6 items chosen at random with split seed 0), npz:few.npz 18 + 2 (2 "
        "items chosen at random with split seed 0); pairs need as many of both, split alike"
    )
    split = saved(tmp_path, "split", x=ROWS[:54], test=ROWS[54:])  # as many of both parts, and not the same ones
    with pytest.raises(UserError, match=r"^paired: .* 54 \+ 6 \(the array 'test'\); pairs need .* split alike$"):
        DataConfig(**{**pair, "start": split}, paired=True).load()
    split_too = saved(tmp_path, "split-too", x=follows(ROWS[:54]), test=follows(ROWS[54:]))
    data = DataConfig(source=split_too, start=split, paired=True).load()
    assert np.allclose(data.held_out, follows(data.start.held_out.numpy()), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "other"), [((60, 3), (60, 2)), ((20, 4, 4), (60, 2)), ((20, 4, 4), (20, 6, 6)), ((20, 4, 4, 3),) * 2]
)
def test_shapes_that_differ_are_refused(tmp_path, shape, other):
    if shape == other:  # of images, channels too
        other = shape[:3]
    arrays = [
        RNG.standard_normal(form) if len(form) == 2 else RNG.integers(0, 256, form, dtype=np.uint8)
        for form in (shape, other)
    ]
    sources = [saved(tmp_path, name, x=array) for name, array in zip(("one", "other"), arrays, strict=True)]
    alone = [DataConfig(source=source).load().spec.shape for source in sources]
    with pytest.raises(UserError) as error:
        DataConfig(source=sources[0], start=sources[1]).load()
    assert str(error.value) == (
        f"start: npz:other.npz has events of shape {alone[1]}, and npz:one.npz of {alone[0]}; both ends need one shape "
        "(--size resizes images)"
    )


def test_other_settings_are_refused(tmp_path, pair):
    for settings, message in (
        ({"source": pair["source"], "paired": True}, r"^paired: true needs data to begin with \(start\)$"),
        ({**pair, "start": "npz:nowhere.npz"}, r"^npz:nowhere\.npz: no such file or folder$"),
        ({**pair, "start": "digit"}, r"^unknown data set 'digit'; did you mean 'digits'\?"),
        ({**pair, "size": 4}, r"^size: 4 is for square images; npz:after\.npz has points \(2,\)$"),
        ({**pair, "levels": 4}, r"^levels: 4 needs data with a range, and npz:after\.npz has none \(points\)$"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(**settings).load()
    tall = saved(tmp_path, "tall", x=RNG.integers(0, 256, (20, 6, 4), dtype=np.uint8))
    with pytest.raises(UserError, match=r"^size: 4 is for square images; npz:tall\.npz has image \(1, 6, 4\)$"):
        DataConfig(source="digits", start=tall, size=4).load()
    for values, message in (
        ({"source": "digits", "paired": "perhaps"}, "paired: 'perhaps' is not valid"),
        ({"source": "digits", "start": 3}, "start: 3 is not valid"),
        ({"source": "digits", "size": 0}, "size: 0 is not valid"),
    ):
        with pytest.raises(ConfigError, match=message):
            DataConfig.parse(values)


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_images_are_brought_to_one_size(tmp_path):
    wide = saved(tmp_path, "wide", x=RNG.integers(0, 256, (30, 12, 12), dtype=np.uint8))
    data = DataConfig(source="digits", start=wide, size=8).load()
    plain, original = DataConfig(source="digits").load(), DataConfig(source=wide).load()
    assert data.spec.shape == data.spec.start.shape == (1, 8, 8)
    # What has the size already is left as it is, with its levels.
    assert torch.equal(data.train, plain.train)
    assert (data.train.dtype, data.spec.levels, data.spec.start.levels) == (plain.train.dtype, 17, None)
    assert data.spec.start.range == (0, 255)
    assert data.start.train.dtype == torch.float32
    assert 0 <= data.start.train.min() < data.start.train.max() <= 255
    # Resizing keeps the brightness, and where things are.
    for part, whole in ((data.start.train, original.train), (data.start.held_out, original.held_out)):
        assert part.shape == (len(whole), 1, 8, 8)
        brightness = whole.float().mean((1, 2, 3))
        torch.testing.assert_close(part.mean((1, 2, 3)), brightness, atol=8.0, rtol=0)
        quarters = (torch.nn.functional.avg_pool2d(x.float(), x.shape[-1] // 2).flatten(1) for x in (part, whole))
        assert float(torch.corrcoef(torch.stack([q.flatten() for q in quarters]))[0, 1]) > 0.9


@pytest.mark.parametrize("size", [4, 16])
def test_a_size_changes_all_images_alike(size):
    data, plain = DataConfig(source="digits", size=size).load(), DataConfig(source="digits").load()
    assert data.spec == plain.spec.replace(shape=(1, size, size), levels=None)
    assert data.train.shape == (len(plain.train), 1, size, size)
    assert torch.equal(data.train_labels, plain.train_labels)
    assert data.identity.sha256 != plain.identity.sha256
    flat = torch.full((3, 1, 8, 8), 5, dtype=plain.train.dtype)
    brought = replace(plain, train=flat).resized(size).train
    torch.testing.assert_close(brought, torch.full((3, 1, size, size), 5.0))
    # With averaging: what lies between the places of the pixels that are left is not lost.
    stripes = torch.tensor([16, 0, 0, 16] * 2).expand(3, 1, 8, 8).to(plain.train.dtype)
    assert float((replace(plain, train=stripes).resized(2).train - 8).abs().max()) < 3


def test_averages_and_levels_are_of_both_ends(tmp_path):
    start = saved(tmp_path, "images", x=RNG.integers(0, 256, (30, 8, 8), dtype=np.uint8))
    data = DataConfig(source="digits", start=start, downsample=2, levels=3).load()
    assert data.spec.shape == data.spec.start.shape == (1, 4, 4)
    assert (data.spec.levels, data.spec.start.levels) == (3, 3)
    assert set(data.train.unique().tolist()) == {0, 8, 16}
    assert set(data.start.train.unique().tolist()) <= {0, 127.5, 255}


# --- what is recorded -----------------------------------------------------------------------------------------------


def test_a_specification_keeps_its_start_through_json(pair):
    data = DataConfig(**pair, paired=True).load()
    again = DataSpec.parse(data.spec.to_json())
    assert again == data.spec
    assert again.start == data.start.spec
    assert again.start.start is None
    x = torch.from_numpy(ROWS[:5])
    assert torch.equal(again.start.encode(x), data.start.spec.encode(x))
    assert DataSpec.model_validate_json(data.spec.model_dump_json()) == data.spec
    alone = DataSpec.parse(data.spec.replace(start=None, paired=False).to_json())
    assert alone.start is None
    with pytest.raises(ConfigError, match=r"shape \(3,\) is not that of the data to begin with, \(2,\)"):
        DataSpec.parse({"kind": "points", "shape": [3], "start": {"kind": "points", "shape": [2]}})
    with pytest.raises(ConfigError, match=r"start\.scale: .*|start: .*scale must be positive"):
        DataSpec.parse({"kind": "points", "shape": [2], "start": {"kind": "points", "shape": [2], "scale": [0]}})
    config = DataConfig(**pair, paired=True)
    assert DataConfig.parse(config.to_json()) == config


def test_the_identity_is_of_both_ends_and_of_the_pairing(tmp_path, pair):
    plain = DataConfig(source=pair["source"]).load().identity
    loose, paired = DataConfig(**pair).load().identity, DataConfig(**pair, paired=True).load().identity
    moved = ROWS.copy()
    moved[7, 1] += 1
    other = DataConfig(**{**pair, "start": saved(tmp_path, "moved", x=moved)}).load().identity
    assert len({identity.sha256 for identity in (plain, loose, paired, other)}) == 4
    renamed = DataConfig(**{**pair, "start": saved(tmp_path, "renamed", x=ROWS)}).load().identity
    assert renamed.sha256 == loose.sha256
    assert str(tmp_path) not in loose.model_dump_json()


# --- pairs stay together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"split_seed": 5, "held_out": 0.4}])
def test_pairs_stay_together_in_both_parts(pair, settings):
    data = DataConfig(**pair, paired=True, **settings).load()
    for part in ("train", "held_out"):
        values, starts = getattr(data, part), getattr(data.start, part)
        assert np.allclose(values, follows(starts.numpy()), atol=1e-3)
    assert not np.allclose(data.start.train, ROWS[: len(data.start.train)])  # the split has shuffled them
    rows = {tuple(np.float32(row)): k for k, row in enumerate(ROWS)}
    places = [rows[tuple(row)] for row in data.start.train.numpy()]
    assert data.train_labels.tolist() == [k % 3 for k in places]


def trained(tmp_path, monkeypatch, name, data, seed=0, steps=7, method=None):
    """The batches, in data units, of a short training: x, start and classes; and the run."""
    dataset = data.load()
    values = {**SMALL, "training.steps": steps, **(method or {})}
    if dataset.spec.kind == "image":
        values = {"network.kind": "mlp", **values}
    run = Run.create(tmp_path / name, checked(recipe("interpolant", data, dataset, seed, values)))
    batches, loss = [], Interpolant.loss

    def watched(self, batch, draws):
        if self.training:
            batches.append(batch)
        return loss(self, batch, draws)

    with monkeypatch.context() as patch:
        patch.setattr(Interpolant, "loss", watched)
        assert Trainer(run, dataset).fit()
    return [
        (dataset.spec.decode(b.x0), None if b.start is None else dataset.start.spec.decode(b.start), b.condition)
        for b in batches
    ], run


@pytest.mark.parametrize("method", [{}, {"training.accumulate": 2}, {"conditional": True}], ids=str)
def test_training_sees_pairs(tmp_path, monkeypatch, pair, method):
    batches, run = trained(tmp_path, monkeypatch, "run", DataConfig(**pair, paired=True), method=method)
    parts = method.get("training.accumulate", 1)
    assert [len(x) for x, _, _ in batches] == [8 // parts] * 7 * parts
    for x, start, classes in batches:
        np.testing.assert_allclose(x, follows(start.numpy()), atol=1e-2)
        if "conditional" in method:
            places = [int(np.abs(ROWS - row).sum(1).argmin()) for row in start.numpy()]
            assert classes.tolist() == [k % 3 for k in places]
    rows = torch.cat([start for _, start, _ in batches])
    assert len({tuple(row) for row in rows[:54].round(decimals=3).tolist()}) == 54  # an epoch has each once
    dataset = run.config.data.load()
    seen = 0
    for batch, _ in validation_batches(run.config, dataset):
        x, start = dataset.spec.decode(batch.x0), dataset.start.spec.decode(batch.start)
        np.testing.assert_allclose(x, follows(start.numpy()), atol=1e-2)
        seen += len(x)
    assert seen == 6


@pytest.mark.parametrize("paired", [True, False])
def test_micro_batches_are_parts_of_the_batch(tmp_path, monkeypatch, pair, paired):
    config = DataConfig(**pair, paired=paired)
    whole, _ = trained(tmp_path, monkeypatch, "whole", config)
    parts, _ = trained(tmp_path, monkeypatch, "parts", config, method={"training.accumulate": 4})
    assert (len(whole), len(parts)) == (7, 28)
    for end in (0, 1):
        assert torch.equal(torch.cat([batch[end] for batch in parts]), torch.cat([batch[end] for batch in whole]))


def test_mirrored_images_stay_pairs(tmp_path, monkeypatch):
    config = DataConfig(
        source=saved(tmp_path, "after", x=255 - IMAGES), start=saved(tmp_path, "before", x=IMAGES), paired=True
    )
    batches, _ = trained(tmp_path, monkeypatch, "run", config, method={"training.flip": True})
    for x, start, _ in batches:
        assert torch.equal(x, 255 - start)
    known = torch.from_numpy(IMAGES)[:, None].float()
    ways = [
        [bool((image == known).all((1, 2, 3)).any()), bool((image.flip(-1) == known).all((1, 2, 3)).any())]
        for _, start, _ in batches
        for image in start
    ]
    assert {tuple(way) for way in ways} == {(True, False), (False, True)}


def test_starts_without_partners_are_drawn_by_the_seed(tmp_path, monkeypatch, pair):
    config = DataConfig(**{**pair, "start": saved(tmp_path, "few", x=ROWS[:20])})
    first, run = trained(tmp_path, monkeypatch, "one", config)
    again, same = trained(tmp_path, monkeypatch, "again", config)
    other, _ = trained(tmp_path, monkeypatch, "other", config, seed=1)
    for (x, start, _), (x_again, start_again, _) in zip(first, again, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(start, start_again)
    assert not any(torch.equal(start, others) for (_, start, _), (_, others, _) in zip(first, other, strict=True))
    assert run.hash() == same.hash()
    # Every epoch of theirs has each of them once, whatever the epoch of the data is.
    starts = torch.cat([start for _, start, _ in first])
    assert len(starts) == 56
    for epoch in starts[:54].split(18):
        assert len({tuple(row) for row in epoch.round(decimals=3).tolist()}) == 18
    x = torch.cat([x for x, _, _ in first])
    assert len({tuple(row) for row in x[:54].round(decimals=3).tolist()}) == 54
    # They do not go together: the items that one start meets are not the same every time.
    pairs = torch.cat([x, starts], 1)
    assert len({tuple(row) for row in pairs[:54].round(decimals=2).tolist()}) == 54
    # Validation has fewer of them than items, and takes them again.
    dataset = config.load()
    found = [list(validation_batches(run.config, dataset)) for _ in range(2)]
    for (batch, _), (batch_again, _) in zip(*found, strict=True):
        assert torch.equal(batch.start, batch_again.start)
    starts = dataset.start.spec.decode(torch.cat([batch.start for batch, _ in found[0]]))
    assert len(starts) == 6
    distance = (starts[:, None] - dataset.start.held_out).abs().sum(2)
    assert float(distance.min(1).values.max()) < 1e-3
    assert torch.bincount(distance.argmin(1)).tolist() == [3, 3]


def test_held_out_starts_are_kept_and_training_ones_are_not(tmp_path, monkeypatch, pair):
    config = DataConfig(**pair)
    _, run = trained(tmp_path, monkeypatch, "run", config)
    dataset, model = config.load(), run.model()
    kept = dataset.start.spec.decode(model.starts)
    distance = (kept[:, None] - dataset.start.held_out).abs().sum(2).min(1)
    assert float(distance.values.max()) < 1e-3
    assert sorted(distance.indices[:6].tolist()) == list(range(6))
