"""The shipped feature networks, the recipe that makes two of them, and the FID network without its weights."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.metrics import FEATURES, inception
from osmose.metrics.features import DEFAULTS, default_features, load_features
from osmose.metrics.inception import Inception2015, load_inception, resize_like_tensorflow1
from osmose.metrics.train_features import RECIPES, accuracy, augment, main, train

#: Scores refer to exactly these files.
HASHES = {
    "digits-mlp-v1": "b66ff56ebc6638d7d5b33b1c13af9a00684540102150673946da2f20eb23330c",
    "fashion-cnn-v1": "20eb8edfa049e909126c2b06521fe984d599ff5aa84ebdf9d774415afb3294d5",
    "lenet5-mnist": "bc94444b8c127c53a81924fbeb8758c3dd346a300fdd12a985ad706be719833d",
    "resnet20-cifar10": "55754e307097eb72d1dfc1253ab9b2ce85e361d0bd2f8e4308668ac589ef52f9",
}
#: Mean and deviation of the features of `pattern`, so that a change of preprocessing cannot go unnoticed.
GOLDEN = {
    "digits-mlp-v1": (2.48784, 2.81504),
    "fashion-cnn-v1": (0.30105, 0.65065),
    "lenet5-mnist": (-0.09256, 0.83811),
    "resnet20-cifar10": (0.32733, 0.72965),
}


@pytest.fixture(scope="module")
def digits():
    return DataConfig(source="digits").load()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pattern(network):
    """Two images that are the same everywhere."""
    values = torch.arange(2 * math.prod(network.shape)).reshape(2, *network.shape)
    return (values * 37) % (int(network.value_range[1]) + 1)


# --- shipped networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(HASHES))
def test_shipped_network_is_the_recorded_one_and_computes_the_recorded_features(name):
    network = load_features(name)
    assert (network.name, network.sha256, network.suffix) == (name, HASHES[name], "clf")
    embedding = network.embed(pattern(network))
    assert embedding.features.shape == (2, network.dim)
    assert embedding.probabilities.shape == (2, network.num_classes) == (2, 10)
    assert torch.allclose(embedding.probabilities.sum(dim=1), torch.ones(2), atol=1e-5)
    seen = (float(embedding.features.mean()), float(embedding.features.std()))
    assert seen == pytest.approx(GOLDEN[name], rel=1e-3)


def test_digits_classifier_has_its_accuracy_on_digits_it_never_saw(digits):
    network = load_features("digits-mlp-v1")
    right = network.probabilities(digits.held_out).argmax(dim=1) == digits.held_out_labels
    assert float(right.double().mean()) >= 0.97


def test_networks_are_the_defaults_of_their_data_only(digits):
    assert set(DEFAULTS.values()) == set(HASHES) == set(FEATURES.entries) - {"inception-2015"}
    assert default_features("digits", digits.spec).name == "digits-mlp-v1"
    assert default_features("folder:cats", digits.spec) is None
    other_size = digits.spec.replace(shape=(1, 28, 28))
    other_range = digits.spec.replace(range=(0.0, 255.0), levels=256)
    assert default_features("digits", other_size) is None
    assert default_features("digits", other_range) is None


def test_batches_and_input_types_do_not_change_features(digits):
    network = load_features("digits-mlp-v1")
    whole = network.features(digits.train[:600])
    single = torch.cat([network.features(row[None].double()) for row in digits.train[:5]])
    assert torch.allclose(whole[:5], single, atol=1e-4)
    scaled = network.embed(digits.train[:5].float() / 16, value_range=(0.0, 1.0)).features
    assert torch.allclose(whole[:5], scaled, atol=1e-4)


def test_a_shape_that_the_network_does_not_take_is_refused():
    with pytest.raises(UserError, match=r"digits-mlp-v1 takes images of shape.*\(3, 1, 28, 28\) given"):
        load_features("digits-mlp-v1").features(torch.zeros(3, 1, 28, 28))


def test_unknown_and_unshipped_networks_are_refused_with_help():
    with pytest.raises(UserError, match="did you mean 'lenet5-mnist'"):
        load_features("lenet-mnist")
    with pytest.raises(UserError, match="--inception-weights PATH"):
        load_features("inception-2015")


def test_weights_come_with_their_licences():
    folder = Path(inception.__file__).parent / "weights"
    notice = (folder / "NOTICE.md").read_text()
    for file in folder.glob("*.safetensors"):
        assert file.name in notice
    assert "Yerlan Idelbayev" in notice
    with safe_open(folder / "digits-mlp-v1.safetensors", "pt") as file:
        assert file.metadata()["data"] == "digits"
        assert json.loads(file.metadata()["recipe"])["seed"] == RECIPES["digits"].seed


# --- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_recipe_makes_a_file_with_its_history(tmp_path, capsys):
    out = tmp_path / "new" / "digits.safetensors"
    assert main(["digits", "--out", str(out)]) == 0
    assert [file.name for file in out.parent.iterdir()] == ["digits.safetensors"]
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
        shipped = load_features("digits-mlp-v1").module.state_dict()
        assert sorted(file.keys()) == sorted(shipped)
    assert float(metadata["accuracy_held_out"]) >= 0.96
    assert metadata["data_sha256"] == DataConfig(source="digits").load().identity.sha256
    assert "held-out" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_recipe_repeats_bit_by_bit_and_leaves_held_out_data_alone(digits):
    torch.set_num_threads(1)
    recipe = RECIPES["digits"].__class__(**{**vars(RECIPES["digits"]), "epochs": 2})
    poisoned = digits.__class__(**{**vars(digits), "held_out": digits.held_out * 0})
    networks = [train(recipe, data, report=lambda _: None) for data in (digits, poisoned)]
    first, second = (network.state_dict() for network in networks)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert accuracy(networks[0], digits.held_out, digits.held_out_labels) > 0.5


def test_augmentation_shifts_by_at_most_its_pixels():
    images = torch.zeros(64, 1, 9, 9)
    images[:, :, 4, 4] = 1
    moved = augment(images, RECIPES["fashion-mnist"], torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert torch.equal(moved[:, :, 3:6, 3:6].sum(dim=(1, 2, 3)), torch.ones(64))
    assert augment(images, RECIPES["digits"], torch.Generator()) is images


@pytest.mark.usefixtures("one_thread")
def test_recipe_without_its_data_says_what_is_missing(tmp_path, capsys):
    assert main(["fashion-mnist", "--data-root", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "fashion-mnist" in capsys.readouterr().err


# --- Inception ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(Inception2015().state_dict(), path)
    return path


def test_inception_has_the_tensors_of_the_published_file():
    known = json.loads((Path(__file__).parent / "inception_keys.json").read_text())
    shapes = {key: tuple(value.shape) for key, value in Inception2015().state_dict().items()}
    lines = sorted(f"{key}:{','.join(map(str, shape))}" for key, shape in shapes.items())
    assert len(lines) == known["tensors"]
    assert sum(math.prod(shape) for shape in shapes.values()) == known["numbers"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == known["sha256"]


def test_inception_runs_on_grey_and_colour_images_and_is_never_called_fid_with_other_weights(weights, monkeypatch):
    network = load_inception(weights)
    assert (network.name, network.suffix) == ("inception-unverified", "inception-unverified")
    grey = torch.randint(256, (1, 1, 28, 28), dtype=torch.uint8)
    embedding = network.embed(torch.cat([grey.expand(-1, 3, -1, -1), 255 - grey.expand(-1, 3, -1, -1)]))
    assert embedding.features.shape == (2, 2048)
    assert embedding.probabilities.shape == (2, 1008)
    assert bool(embedding.features.isfinite().all())
    assert not torch.equal(embedding.features[0], embedding.features[1])
    assert torch.allclose(network.features(grey), embedding.features[:1], atol=1e-5)
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", network.sha256[:8])
    verified = load_inception(weights)
    assert (verified.name, verified.suffix) == ("inception-2015", "")


def test_resize_is_that_of_tensorflow_1():
    image = torch.rand(1, 2, 5, 7, dtype=torch.float64)
    wanted = torch.empty(1, 2, 11, 11, dtype=torch.float64)
    for i in range(11):
        for j in range(11):
            y, x = i * 5 / 11, j * 7 / 11
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 4), min(left + 1, 6)
            above = image[..., top, left] * (1 - (x - left)) + image[..., top, right] * (x - left)
            below = image[..., bottom, left] * (1 - (x - left)) + image[..., bottom, right] * (x - left)
            wanted[..., i, j] = above * (1 - (y - top)) + below * (y - top)
    assert torch.allclose(resize_like_tensorflow1(image, 11), wanted)
    assert torch.equal(resize_like_tensorflow1(image[..., :5], 5), image[..., :5])


def test_average_pool_leaves_the_padding_out():
    assert torch.equal(inception._average(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_safetensors_load_as_well_and_counters_may_be_missing(weights, tmp_path):
    tensors = torch.load(weights, weights_only=True)
    kept = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "w.safetensors")
    network = load_inception(tmp_path / "w.safetensors")
    assert torch.equal(network.module.fc.weight, tensors["fc.weight"])


def test_bad_weight_files_are_refused_with_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_inception(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_inception(tmp_path / "text.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(UserError, match=r"not the FID network of 2015; 472 tensors differ, the first is Conv2d_1a"):
        load_inception(tmp_path / "torchvision.pth")
