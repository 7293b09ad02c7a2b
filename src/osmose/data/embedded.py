"""Real data that comes with the dependencies: scikit-learn's handwritten digits, no download needed."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits as sklearn_digits

from osmose.data.assembly import Part, image_dataset
from osmose.data.dataset import DataConfig, Dataset
from osmose.errors import UserError


def load_digits(argument: str, config: DataConfig) -> Dataset:
    """The test part of the UCI handwritten digits: 1,797 grey images (1, 8, 8), uint8 values 0..16, 10 classes.

    The split is a random permutation. A split by position would be unfair: neighbours were written by one hand.

    Raises:
        UserError: an argument was given.
    """
    if argument:
        raise UserError(f"digits takes no argument, but {argument!r} was given; write --data digits")
    bunch = sklearn_digits()
    whole = Part(torch.from_numpy(bunch.images).to(torch.uint8)[:, None], torch.from_numpy(bunch.target).long())
    names = [str(digit) for digit in range(10)]
    return image_dataset("digits", config, whole, value_range=(0.0, 16.0), levels=17, class_names=names)
