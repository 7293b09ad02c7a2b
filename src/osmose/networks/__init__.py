"""Networks: modules that know (x, label, condition) and nothing of diffusion."""

from __future__ import annotations

from osmose.configuration import Registry
from osmose.networks.presets import PRESETS

NETWORKS = Registry(
    "network",
    {
        "unet": ("osmose.networks.unet:UNetConfig", "DDPM's UNet, for images of any size and channel count"),
        "mlp": ("osmose.networks.mlp:MLPConfig", "residual MLP, for points and other flat data"),
        "tensor-train": (
            "osmose.networks.tensor_train:TensorTrainConfig",
            "functional tensor train on top of the best linear prediction, for points and small images",
        ),
        "uvit": (
            "osmose.networks.uvit:UViTConfig",
            "transformer with long skips over points or patches, which knows their coordinates",
        ),
        "dit": (
            "osmose.networks.dit:DiTConfig",
            "transformer over patches, a residual stack that time and class modulate; may be cut into blocks",
        ),
        "text": ("osmose.networks.text:TextConfig", "transformer over characters, some of them masked"),
        "causal-text": (
            "osmose.networks.text:CausalTextConfig",
            "transformer over noisy embeddings of characters and the clean ones before",
        ),
        "experts": (
            "osmose.networks.experts:ExpertsConfig",
            "networks that share the noise levels among them, as osmose train blocks makes them",
        ),
        "conservative": (
            "osmose.networks.conservative:ConservativeConfig",
            "the gradient of an energy that another network computes: a symmetric Jacobian at more than twice the cost",
        ),
        "quantized": (
            "osmose.networks.quantized:QuantizedConfig",
            "a network with layers of integers, as osmose quantize makes them",
        ),
        "bf16": ("osmose.networks.quantized:BF16Config", "a network in bf16, as osmose quantize makes them"),
        "implicit": (
            "osmose.networks.implicit:ImplicitConfig",
            "coordinate MLP that is fitted to each noisy input by a few gradient steps; small and slow",
        ),
    },
    PRESETS,
)
#: Networks for sets of (time, value).
SERIES_NETWORKS = Registry(
    "series network",
    {
        "transformer": ("osmose.networks.series:SeriesTransformerConfig", "attention among all times"),
        "rnn": ("osmose.networks.series:SeriesRNNConfig", "recurrent in both directions, along the order of times"),
        "cnn": ("osmose.networks.series:SeriesCNNConfig", "dilated convolutions along the order of times"),
    },
)
