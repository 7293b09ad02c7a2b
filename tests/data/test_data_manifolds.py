import numpy as np
import pytest

from osmose.data.dataset import DataConfig
from osmose.data.manifolds import APART, frame
from osmose.data.toy import law_of
from osmose.errors import UserError


def drawn(name, count=400):
    law = law_of(name)
    return law, *law.draw(count, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "spanned", "intrinsic"), [("plane:3:10", 3, 3), ("sphere:2:10", 3, 2), ("torus:2:7", 4, 2)]
)
def test_each_lies_where_it_says(name, spanned, intrinsic):
    law, points, labels = drawn(name)
    assert (law.dimension, law.intrinsic, law.num_components, labels) == (
        int(name.split(":")[2]),
        (intrinsic,),
        None,
        None,
    )
    assert np.linalg.matrix_rank(points, tol=1e-9) == spanned
    inside = points @ frame(law.dimension)[:, :spanned]  # an isometry: distances are those before
    assert np.allclose(np.linalg.norm(inside, axis=1), np.linalg.norm(points, axis=1))
    if name.startswith("sphere"):
        assert np.allclose((inside**2).sum(1), 1)
    if name.startswith("torus"):
        assert np.allclose(inside[:, :2] ** 2 + inside[:, 2:] ** 2, 1)
    if name.startswith("plane"):
        assert np.allclose(np.cov(inside.T), np.eye(3), atol=0.25)


def test_strata_have_a_dimension_each():
    law, points, labels = drawn("strata:10", 900)
    assert (law.intrinsic, law.num_components) == ((1, 2, 4), 3)
    for index, k in enumerate(law.intrinsic):
        here = points[labels == index]
        assert len(here) > 200
        assert np.linalg.matrix_rank(here - here[0], tol=1e-9) == k
        assert np.allclose(here.mean(0), APART * frame(10)[:, index], atol=0.25)


def test_they_are_data_like_any_other():
    config = DataConfig(source="toy:strata:6", num_points=60)
    dataset = config.load()
    assert dataset.train.shape == (54, 6)
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.identity == config.load().identity
    with pytest.raises(UserError, match=r"no such law; .*plane:K:D, sphere:K:D, torus:K:D, strata:D"):
        DataConfig(source="toy:ball").load()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sphere", "toy:sphere: 0 numbers given; write toy:sphere:K:D, for example toy:sphere:2:10"),
        ("sphere:2", "toy:sphere:2: 1 numbers given; write toy:sphere:K:D"),
        ("strata:4:10", "toy:strata:4:10: 2 numbers given; write toy:strata:D, for example toy:strata:10"),
        ("plane:0:10", "toy:plane:0:10: '0' is not valid: should be an integer from 1 to 1024"),
        ("plane:1.5:10", "toy:plane:1.5:10: '1.5' is not valid: should be an integer"),
        ("sphere:2:2", "toy:sphere:2:2: 2 dimensions do not fit into 2 values: D should be at least 3"),
        ("torus:2:3", "toy:torus:2:3: 2 dimensions do not fit into 3 values: D should be at least 4"),
        ("plane:1:1", "toy:plane:1:1: 1 dimensions do not fit into 1 values: D should be at least 2"),
        ("strata:3", "toy:strata:3: D = 3 is too small: should be at least 4"),
        ("spheer:2:9", "toy:spheer:2:9: no such law with arguments; did you mean 'sphere'?"),
    ],
)
def test_refused(name, message):
    with pytest.raises(UserError) as error:
        law_of(name)
    assert str(error.value).startswith(message)
