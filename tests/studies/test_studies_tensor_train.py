"""The study of tensor trains: its arithmetic, and its quick form from beginning to end."""

import pytest

from osmose.studies.tensor_train import NETWORKS, TensorTrainStudy, steps_to


def test_the_step_at_which_an_error_comes_down_to_a_level():
    curve = ([100, 200, 400], [0.4, 0.1, -0.01])
    assert steps_to(curve, 0.5) == 100
    assert steps_to(curve, 0.2) == pytest.approx(100 * 2**0.5)  # halfway in both logarithms
    assert steps_to(curve, 0.1) == pytest.approx(200)
    assert steps_to(curve, 0.05) == 400  # a look below 0 has no logarithm
    assert steps_to(([100, 200], [0.4, 0.3]), 0.1) == 200  # never


def test_its_quick_form_compares_trains_and_networks():
    names = TensorTrainStudy(quick=True).models(2)
    assert {name in NETWORKS for name in names} == {True, False}
