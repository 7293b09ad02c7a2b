"""Images averaged over blocks of pixels: the same items at a lower resolution, from every source of images."""

import json
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from osmose.cli.main import main
from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.training.recipes import checked, recipe
from osmose.training.run import Run

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 2, 1, 0], np.uint8)


def load(source, **settings):
    return DataConfig.parse({"source": source, **settings}).load()


def blocks(images, factor):
    """Means over blocks, in float64, by an independent way."""
    n, channels, height, width = images.shape
    parts = images.double().reshape(n, channels, height // factor, factor, width // factor, factor)
    return parts.mean((3, 5))


def idx(values):
    return struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Files of one source of images; how `--data` names them."""
    monkeypatch.delenv("OSMOSE_DATA_ROOT", raising=False)

    def write(name):
        if name == "digits":
            return "digits"
        if name in ("idx", "fashion-mnist"):
            folder = tmp_path / name
            folder.mkdir()
            for part in ("train", "t10k"):
                (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(PIXELS[:, 0]))
                (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(LABELS))
            return f"idx:{folder}" if name == "idx" else name
        if name == "cifar10":
            (tmp_path / "cifar10").mkdir()
            records = np.concatenate([LABELS[:, None], PIXELS.reshape(6, -1)], axis=1).tobytes()
            for stem in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
                (tmp_path / "cifar10" / f"{stem}.bin").write_bytes(records)
            return name
        if name == "folder":
            for number, image in enumerate(PIXELS):
                kind = tmp_path / "pictures" / str(LABELS[number])
                kind.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.transpose(1, 2, 0)).save(kind / f"{number}.png")
            return f"folder:{tmp_path / 'pictures'}"
        if name == "hub":
            datasets = pytest.importorskip("datasets")
            datasets.disable_progress_bars()
            columns = {"image": [Image.fromarray(image.transpose(1, 2, 0)) for image in PIXELS]}
            form = datasets.Features({"image": datasets.Image()})
            datasets.Dataset.from_dict(columns, features=form).save_to_disk(str(tmp_path / "hub"))
            return f"hub:{tmp_path / 'hub'}"
        values = {"npz-floats": PIXELS.astype(np.float32) / 255, "npz-bytes": PIXELS}[name]
        labels = {"y": LABELS} if name == "npz-bytes" else {}
        np.savez(tmp_path / f"{name}.npz", x=values, **labels)
        return f"npz:{tmp_path / name}.npz"

    return write


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize(
    "name", ["digits", "idx", "fashion-mnist", "cifar10", "folder", "hub", "npz-floats", "npz-bytes"]
)
def test_every_source_of_images_is_averaged_over_blocks(write, tmp_path, name, factor):
    source = write(name)
    whole, small = load(source, root=tmp_path), load(source, root=tmp_path, downsample=factor)
    for part in ("train", "held-out"):
        (images, labels), (means, same) = whole.part(part), small.part(part)
        assert means.dtype == torch.float32
        torch.testing.assert_close(means.double(), blocks(images, factor), rtol=1e-6, atol=0)
        assert (labels is None and same is None) or torch.equal(labels, same)
    assert (whole.train_labels is None) == (name in ("hub", "npz-floats"))
    channels, height, width = whole.spec.shape
    assert small.spec == whole.spec.replace(shape=(channels, height // factor, width // factor), levels=None)
    assert (small.source, small.split, small.class_names) == (whole.source, whole.split, whole.class_names)


def test_means_of_bytes_are_exact_and_not_rounded():
    whole, small = load("digits"), load("digits", downsample=4)
    assert torch.equal(small.train.double(), blocks(whole.train, 4))
    assert not torch.equal(small.train, small.train.round())
    assert torch.equal(small.spec.decode(small.spec.encode(small.train)), small.train)
    assert small.spec.model_range == (-1.0, 1.0)


def test_the_two_resolutions_commute_with_the_units_of_the_model():
    whole, small = load("digits"), load("digits", downsample=2)
    torch.testing.assert_close(
        blocks(whole.spec.encode(whole.train), 2).float(), small.spec.encode(small.train), atol=1e-6, rtol=0
    )


def test_more_images_than_one_chunk_keep_their_order(tmp_path):
    pixels = RNG.integers(0, 256, (4500, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "many.npz", x=pixels, test=pixels[:3])
    small = load(f"npz:{tmp_path / 'many.npz'}", downsample=2)
    assert torch.equal(small.train.double(), blocks(torch.from_numpy(pixels)[:, None], 2))


def test_the_identity_tells_resolutions_apart():
    identities = [load("digits", **settings).identity for settings in ({}, {"downsample": 2}, {"downsample": 4})]
    assert len({identity.sha256 for identity in identities}) == 3
    assert {(identity.source, identity.num_train) for identity in identities} == {("digits", 1617)}


@pytest.mark.parametrize("factor", [-2, 0, 1, 3, 6, "two", True, 2.5])
def test_only_powers_of_two_are_taken(factor):
    with pytest.raises(UserError, match=f"^downsample: {re.escape(repr(factor))} is not valid: ") as error:
        load("digits", downsample=factor)
    assert "\n" not in str(error.value)


def test_points_have_no_pixels(tmp_path):
    with pytest.raises(UserError, match=r"^downsample: 2 is for images; toy:two-moons has points of shape \(2,\)$"):
        load("toy:two-moons", num_points=50, downsample=2)
    (tmp_path / "p.csv").write_text("a,b\n" + "".join(f"{i},{i * i}\n" for i in range(20)))
    with pytest.raises(UserError, match=r"^downsample: 2 is for images; csv:p.csv has points"):
        load(f"csv:{tmp_path / 'p.csv'}", downsample=2)


@pytest.mark.parametrize(
    ("shape", "factor", "hint"),
    [
        ((12, 8), 8, "use at most 4"),
        ((8, 12), 8, "use at most 4"),
        ((6, 5), 2, "they do not halve"),
        ((4, 4), 8, "use at most 4"),
    ],
)
def test_sides_that_it_does_not_divide_are_refused(tmp_path, shape, factor, hint):
    np.savez(tmp_path / "x.npz", x=RNG.integers(0, 256, (12, *shape), dtype=np.uint8))
    message = f"downsample: {factor} does not divide the sides of npz:x.npz, images of shape {(1, *shape)}; {hint}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load(f"npz:{tmp_path / 'x.npz'}", downsample=factor)


@pytest.mark.parametrize("network", ["unet", "mlp"])
@pytest.mark.parametrize(("side", "factor"), [(8, 2), (8, 8), (28, 2), (28, 4)])
def test_the_recipes_suit_small_images(tmp_path, side, factor, network):
    np.savez(tmp_path / "x.npz", x=RNG.integers(0, 256, (20, side, side), dtype=np.uint8))
    config = DataConfig.parse({"source": f"npz:{tmp_path / 'x.npz'}", "downsample": factor})
    dataset = config.load()
    made = checked(recipe("ddpm", config, dataset, 0, {"network": network, "training.steps": 1}))
    samples = made.method.build(made.spec).sample(2, num_steps=1, seed=0).data
    assert samples.shape == (2, 1, side // factor, side // factor)
    assert bool(torch.isfinite(samples).all())


def test_a_run_remembers_its_resolution(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--steps", "2", "--quiet", "network=mlp", "network.width=16", "training.batch_size=8"]
    main(["train", "ddpm", "--data", "digits", "--downsample", "2", "--out", "run", *common])
    run = Run.open("run")
    assert (run.config.data.downsample, run.config.spec.shape, run.config.spec.levels) == (2, (1, 4, 4), None)
    assert run.config.data.load().identity == run.config.identity
    main(["train", "--out", "run", "--resume", "--downsample", "2", "--quiet"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train", "--out", "run", "--resume", "--downsample", "4", "--quiet"])
    assert "data.downsample: 4 given, but run was started with 2" in capsys.readouterr().err
    main(["sample", "run", "-n", "3", "--steps", "2", "--quiet", "--out", "s.npz"])
    assert np.load("s.npz")["samples"].dtype == np.float32  # averages lie between the levels
    capsys.readouterr()
    main(["evaluate", "run", "-n", "40", "--steps", "2", "--quiet"])
    told = capsys.readouterr().out
    assert "no feature network fits digits (1, 4, 4)" in " ".join(told.split())
    (evaluation,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())["evaluations"]
    names = {score["name"] for score in evaluation["scores"]}
    assert "sw2" in names
    assert "fd_clf" not in names  # the classifier of the digits takes images of 8x8
