"""How good samples are: distances on matrices, the networks whose features they use, and scores with their floors."""

from __future__ import annotations

from osmose.configuration import Registry

#: Networks whose features and class probabilities are compared; each entry is a function that loads one.
FEATURES = Registry(
    "feature network",
    {
        "digits-mlp-v1": ("osmose.metrics.features:digits_mlp", "MLP 64-128-64-10 trained on the 8x8 digits"),
        "fashion-cnn-v1": ("osmose.metrics.features:fashion_cnn", "small CNN trained on Fashion-MNIST, 64 features"),
        "lenet5-mnist": ("osmose.metrics.features:lenet5", "LeNet-5 trained on MNIST, 84 features"),
        "resnet20-cifar10": ("osmose.metrics.features:resnet20", "ResNet-20 trained on CIFAR-10, 64 features"),
        "inception-2015": ("osmose.metrics.inception:load_inception", "the network of the FID; you bring its weights"),
    },
)
