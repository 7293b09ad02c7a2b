"""What studies measure besides scores."""

import numpy as np
import pytest

from osmose.data.dataset import DataConfig
from osmose.studies.measures import at_equal_time, step_seconds


def test_a_longer_training_is_interpolated_in_the_logarithm_of_time():
    values = [np.array([8.0, 4.0]), np.array([6.0, 2.0]), np.array([5.0, 1.0])]
    times = [1.0, 2.0, 4.0]
    assert at_equal_time(times, values, 2.0).tolist() == [6.0, 2.0]
    assert at_equal_time(times, values, 2**0.5) == pytest.approx([7.0, 3.0])
    assert at_equal_time(times, values, 8**0.5) == pytest.approx([5.5, 1.5])
    assert at_equal_time(times, values, 9.0).tolist() == [5.0, 1.0]


def test_steps_are_timed_under_each_configuration():
    data = DataConfig(source="digits").load()
    small = {"network": "mlp", "network.width": 8, "network.depth": 1, "training.batch_size": 4}
    wide = small | {"network.width": 1024, "network.depth": 4, "training.batch_size": 64}
    found = step_seconds("ddpm", "digits", data, {"small": small, "wide": wide}, steps=3)
    assert list(found) == ["small", "wide"]
    assert 0 < found["small"] < found["wide"]
