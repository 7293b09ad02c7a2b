import math

import numpy as np
import pytest
import torch

from osmose.data import toy
from osmose.data.dataset import DataConfig
from osmose.errors import UserError


def load(source, **settings):
    return DataConfig(source=source, **settings).load()


def law(name, num_points=20_000):
    return toy.LAWS[name].draw(num_points, np.random.default_rng(0))


def test_digits_facts():
    digits = load("digits")
    everything = torch.cat([digits.train, digits.held_out])
    assert everything.shape == (1797, 1, 8, 8)
    assert everything.dtype == torch.uint8
    assert everything.unique().tolist() == list(range(17))
    assert len(digits.held_out) == 180
    assert digits.spec.model_range == (-1.0, 1.0)
    assert (digits.spec.levels, digits.spec.num_classes) == (17, 10)
    labels = torch.cat([digits.train_labels, digits.held_out_labels])
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.class_names == tuple("0123456789")


def test_digits_split_is_not_by_position():
    digits = load("digits")
    # First 180 of scikit-learn's order would have these labels in this order.
    assert digits.held_out_labels[:10].tolist() != list(range(10))
    assert digits.held_out_labels.bincount(minlength=10).min() > 5


def test_encode_and_decode_are_inverse():
    digits = load("digits")
    model = digits.spec.encode(digits.train)
    assert model.dtype == torch.float32
    assert (model.min(), model.max()) == (-1, 1)
    assert torch.equal(digits.spec.decode(model), digits.train.float())
    points = load("toy:two-moons", num_points=500)
    torch.testing.assert_close(points.spec.decode(points.spec.encode(points.train)), points.train)


@pytest.mark.parametrize("source", ["digits", "toy:checkerboard"])
def test_identity_is_stable_and_follows_the_split_seed(source):
    first, second = load(source, num_points=500).identity, load(source, num_points=500).identity
    other = load(source, num_points=500, split_seed=1).identity
    assert first == second
    assert first.sha256 != other.sha256


@pytest.mark.parametrize("source", ["digits:8x8", "mnist:there", "fashion-mnist:there", "cifar10:there"])
def test_arguments_that_mean_nothing_are_refused(source):
    name = source.partition(":")[0]
    with pytest.raises(UserError, match=f"^{name} takes no argument, but '{source.partition(':')[2]}' was given"):
        load(source)


@pytest.mark.parametrize("name", toy.LAWS)
def test_every_law_loads_standardised(name):
    data = load(f"toy:{name}", num_points=5000)
    assert data.spec.kind == "points"
    assert data.spec.shape == (2,)
    assert (len(data.train), len(data.held_out)) == (4500, 500)
    assert data.train.dtype == torch.float32
    model = data.spec.encode(data.train)
    torch.testing.assert_close(model.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert data.spec.num_classes == toy.LAWS[name].num_components
    assert (data.train_labels is None) == (name == "swiss-roll")


def test_components_are_counted_even_where_few_points_miss_some():
    assert load("toy:8-gaussians", num_points=10).spec.num_classes == 8


def test_eight_gaussians_have_their_centres_weights_and_deviation():
    points, labels = law("8-gaussians")
    assert np.allclose(np.linalg.norm(toy.EIGHT_CENTRES, axis=1), 4)
    share = np.bincount(labels, minlength=8) / len(points)
    assert np.abs(share - 1 / 8).max() < 4 * math.sqrt(1 / 8 * 7 / 8 / len(points))
    rest = points - toy.EIGHT_CENTRES[labels]
    assert np.abs(rest.mean(0)).max() < 4 * toy.EIGHT_DEVIATION / math.sqrt(len(points))
    assert np.allclose(rest.std(0), toy.EIGHT_DEVIATION, rtol=0.03)


def test_checkerboard_lies_on_black_squares_and_fills_them():
    points, labels = law("checkerboard")
    assert toy.on_black_square(points).all()
    assert not toy.on_black_square(np.array([[-3.0, -1.0], [5.0, 5.0], [-5.0, -5.0], [4.0, 4.0]])).any()
    within = points - toy.BLACK_SQUARES[labels]
    assert within.min() >= 0
    assert within.max() <= toy.SQUARE_SIDE
    assert np.abs(np.bincount(labels) / len(points) - 1 / 8).max() < 0.01
    assert np.allclose(within.mean(0), 1, atol=0.02)


def test_two_moons_lie_around_their_circles():
    points, moon = law("two-moons")
    centres = np.array([[0.0, 0.0], [1.0, 0.5]])[moon]
    distance = np.linalg.norm(points - centres, axis=1) - 1
    # Of noise of deviation s on a unit circle, the radius sees a mean of s^2 / 2 and a deviation of s.
    assert np.isclose(distance.mean(), toy.MOON_NOISE**2 / 2, atol=3e-3)
    assert np.isclose(distance.std(), toy.MOON_NOISE, rtol=0.03)
    assert np.abs(points[moon == 0].mean(0) - [0, 2 / math.pi]).max() < 0.03


def test_swiss_roll_lies_around_its_spiral():
    points, labels = law("swiss-roll")
    assert labels is None
    angles = np.linspace(*toy.ROLL_ANGLES, 4000)
    spiral = angles[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    distance = np.linalg.norm(points[:1000, None] - spiral[None], axis=2).min(1)
    # Off the curve, only the normal part of the noise counts: the mean of |N(0, s)| is s sqrt(2 / pi).
    assert np.isclose(distance.mean(), toy.ROLL_NOISE * math.sqrt(2 / math.pi), rtol=0.1)


def test_pinwheel_arms_are_turned_copies_of_each_other():
    points, arm = law("pinwheel")
    back = -2 * math.pi * arm / toy.PINWHEEL_ARMS
    turned = np.stack(
        [
            points[:, 0] * np.cos(back) - points[:, 1] * np.sin(back),
            points[:, 0] * np.sin(back) + points[:, 1] * np.cos(back),
        ],
        axis=1,
    )
    means = np.stack([turned[arm == index].mean(0) for index in range(5)])
    assert np.ptp(means, axis=0).max() < 0.05
    radius = np.linalg.norm(points, axis=1) / 2
    assert np.isclose((radius**2).mean(), 1 + 0.3**2 + 0.1**2, rtol=0.02)


def test_unknown_law_names_the_nearest():
    with pytest.raises(UserError, match=r"^toy:checkerbord: no such law; did you mean 'checkerboard'\?"):
        load("toy:checkerbord")
    with pytest.raises(UserError, match="choose one of 8-gaussians, checkerboard"):
        load("toy")


def test_unknown_source_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load("digit")
