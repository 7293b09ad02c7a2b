import itertools
import math
import re

import numpy as np
import pytest
import torch

from osmose.cli.main import main
from osmose.data import laws
from osmose.data.dataset import DataConfig
from osmose.data.toy import law_of
from osmose.errors import UserError

POINTS = 40_000
EVERY = ("gaussian:5", "product:6", "chain:6", "chain:4:0.05", "chain:3:0.5", "mixture:5", "8-gaussians")


def load(source, **settings):
    return DataConfig(source=source, **settings).load()


def drawn(argument, seed=0):
    return law_of(argument).draw(POINTS, np.random.default_rng(seed))


def assert_mean(values, want):
    """Means over the first axis agree with what they should be, within 5 standard errors."""
    error = np.maximum(values.std(0) / math.sqrt(len(values)), 1e-12)
    assert np.abs((values.mean(0) - want) / error).max() < 5


# --- what is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", EVERY)
def test_samples_have_the_moments_that_the_law_tells(argument):
    law = law_of(argument)
    points, labels = drawn(argument)
    assert points.shape == (POINTS, law.dimension)
    assert (labels is None) == (law.num_components is None)
    centred = points - law.mean
    assert_mean(points, law.mean)
    assert_mean(centred[:, :, None] * centred[:, None, :], law.covariance)


def test_the_gaussian_has_a_full_covariance_that_decays():
    covariance = law_of("gaussian:4").covariance
    assert covariance[0].tolist() == pytest.approx([1, 0.8, 0.64, 0.512])
    assert np.array_equal(covariance, covariance.T)
    assert [covariance[i, i + 1] for i in range(3)] == pytest.approx([0.8] * 3)
    assert not law_of("gaussian:4").mean.any()
    points, _ = drawn("gaussian:4")
    assert_mean(points**4, 3)  # normal, and not only of the right variance


def test_coordinates_of_the_product_are_the_mixtures_of_the_table():
    points, _ = drawn("product:6")
    for i in range(6):
        components = laws.PRODUCT_TABLE[i % 4]
        assert math.fsum(weight for _, weight in components) == pytest.approx(1)
        centres = np.array([centre for centre, _ in components])
        distance = points[:, i, None] - centres
        nearest = np.abs(distance).argmin(1)
        assert_mean(nearest[:, None] == np.arange(len(centres)), [weight for _, weight in components])
        rest = distance[np.arange(POINTS), nearest]
        assert np.abs(rest).max() < 6 * laws.PRODUCT_DEVIATION
        assert rest.std() == pytest.approx(laws.PRODUCT_DEVIATION, rel=0.02)
    # Independent, not only uncorrelated.
    squares = points**2 - (points**2).mean(0)
    assert_mean(np.stack([squares[:, i] * squares[:, j] for i, j in itertools.combinations(range(6), 2)], 1), 0)


def test_the_product_does_not_depend_on_the_number_of_coordinates():
    few, many = law_of("product:3"), law_of("product:11")
    assert np.array_equal(few.centres, many.centres[:3])
    assert np.array_equal(many.weights[4:8], many.weights[:4])


@pytest.mark.parametrize(("argument", "flip"), [("chain:6", 0.2), ("chain:6:0.05", 0.05), ("chain:6:0.5", 0.5)])
def test_signs_of_the_chain_flip_from_neighbour_to_neighbour(argument, flip):
    points, _ = drawn(argument)
    signs = np.sign(points)  # wrong once in 1,200: noise of 0.3 around 1
    wrong = 0.5 * math.erfc(1 / laws.CHAIN_DEVIATION / math.sqrt(2))
    once = 2 * wrong * (1 - wrong)
    assert_mean(signs, 0)
    flips = signs[:, 1:] != signs[:, :-1]
    assert_mean(flips, flip * (1 - once) + (1 - flip) * once)
    # A flip says nothing of the next one: the chain has no longer memory.
    centred = flips - flips.mean(0)
    product = (centred[:, 1:] * centred[:, :-1]).mean()
    assert abs(product) < 5 * flip / math.sqrt(4 * POINTS) + 2 * wrong
    rest = points - signs
    assert rest.std() == pytest.approx(laws.CHAIN_DEVIATION, rel=0.02)
    correlation = law_of(argument).covariance[0] - laws.CHAIN_DEVIATION**2 * np.eye(6)[0]
    assert correlation.tolist() == pytest.approx([(1 - 2 * flip) ** i for i in range(6)])


def test_all_modes_of_a_chain_are_visited():
    points, _ = drawn("chain:5")
    assert len(np.unique(points > 0, axis=0)) == 2**5


def test_components_of_the_mixture_are_its_labels():
    law = law_of("mixture:5")
    points, labels = drawn("mixture:5")
    assert law.centres.shape == (8, 5)
    assert_mean(labels[:, None] == np.arange(8), 1 / 8)
    rest = points - law.centres[labels]
    assert_mean(rest, 0)
    assert_mean(rest[:, :, None] * rest[:, None, :], 0.3**2 * np.eye(5))
    assert np.array_equal(law.centres, law_of("mixture:5").centres)
    # Standard normal, over many of them.
    many = law_of("mixture:2000").centres
    assert_mean(many.reshape(-1, 1), 0)
    assert_mean(many.reshape(-1, 1) ** 2, 1)


# --- as data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "dimension"), [("gaussian:5", 5), ("product:2", 2), ("chain:9:0.1", 9)])
def test_they_load_standardised_and_without_classes(source, dimension):
    data = load(f"toy:{source}", num_points=5000)
    assert data.source == f"toy:{source}"
    assert (data.spec.kind, data.spec.shape, data.spec.num_classes) == ("points", (dimension,), None)
    assert data.train_labels is None
    model = data.spec.encode(data.train)
    torch.testing.assert_close(model.mean(0), torch.zeros(dimension), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.std(0, correction=0), torch.ones(dimension), atol=1e-4, rtol=0)


def test_the_mixture_has_eight_classes_even_where_few_points_miss_some():
    assert load("toy:mixture:3", num_points=10).spec.num_classes == 8


@pytest.mark.parametrize("source", ["gaussian:3", "product:3", "chain:3", "mixture:3"])
def test_they_are_functions_of_the_split_seed(source):
    first, again = load(f"toy:{source}", num_points=100), load(f"toy:{source}", num_points=100)
    other = load(f"toy:{source}", num_points=100, split_seed=1)
    assert first.identity == again.identity
    assert not torch.equal(first.train, other.train)


def test_the_chain_s_usual_probability_is_a_fifth():
    assert torch.equal(load("toy:chain:4", num_points=50).train, load("toy:chain:4:0.2", num_points=50).train)


def test_info_describes_them(capsys):
    main(["info", "toy:chain:8"])
    assert re.search(r"^form +points 8, unbounded$", capsys.readouterr().out, re.M)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("chain", r"^toy:chain: the dimension D is missing; write toy:chain:D or chain:D:P, for example toy:chain:8$"),
        ("gaussian:", r"^toy:gaussian:: the dimension D is missing; write toy:gaussian:D, for example toy:gaussian:8$"),
        ("product:many", r"^toy:product:many: D = 'many' is not valid: should be an integer from 2 to 4096$"),
        ("product:2.0", r"D = '2.0' is not valid"),
        ("product:-3", r"D = '-3' is not valid"),
        ("product:²", r"D = '²' is not valid"),
        ("mixture:1", r"^toy:mixture:1: D = '1' is not valid: should be an integer from 2 to 4096$"),
        ("mixture:4097", r"D = '4097' is not valid"),
        ("chain:8:0", r"^toy:chain:8:0: P = '0' is not valid: should be a number above 0 and at most 0.5$"),
        ("chain:8:0.51", r"P = '0.51' is not valid"),
        ("chain:8:-0.1", r"P = '-0.1' is not valid"),
        ("chain:8:nan", r"P = 'nan' is not valid"),
        ("chain:8:often", r"P = 'often' is not valid"),
        ("chain:8:", r"P = '' is not valid"),
        ("chain:8:0.1:2", r"^toy:chain:8:0.1:2: '2' is one argument too many; write toy:chain:D or chain:D:P$"),
        ("gaussian:8:0.1", r"^toy:gaussian:8:0.1: '0.1' is one argument too many; write toy:gaussian:D$"),
        ("gausian:8", r"^toy:gausian:8: no such law with arguments; did you mean 'gaussian'\?"),
        ("rings", r"^toy:rings: no such law; choose one of 8-gaussians.*or of any dimension D: chain:D or chain:D:P, "),
        ("pinwheel:3", r"^toy:pinwheel:3: 'pinwheel' is a law in the plane, without arguments; write toy:pinwheel$"),
        ("8-gaussians:", r"^toy:8-gaussians:: '8-gaussians' is a law in the plane"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(source, message):
    with pytest.raises(UserError, match=message):
        load(f"toy:{source}")
