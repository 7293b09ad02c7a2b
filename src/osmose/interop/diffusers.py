"""Runs as folders of Hugging Face's diffusers, and such folders as runs; diffusers itself is not needed.

What is exported opens as a `DDPMPipeline`, and as any other pipeline of a `UNet2DModel`; what is imported is a run of
ddpm (or iddpm, where the variance is learned) like any other. A UNet's weights carry the same names in both. Only
safetensors are read.

    FOLDER/model_index.json                              which classes it is for
    FOLDER/unet/config.json
    FOLDER/unet/diffusion_pytorch_model.safetensors
    FOLDER/scheduler/scheduler_config.json

Foreign embeddings of time may have cosines before sines, which is an order of the columns of the first layer's weights,
and frequencies that end a step before 1/10000 (`network.time_shift=0`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.parametrization import EpsParametrization, VParametrization, X0Parametrization
from osmose.gaussian.schedule import CosineSchedule, LinearSchedule, ScaledLinearSchedule
from osmose.methods.diffusion import Diffusion, DiffusionConfig
from osmose.networks.unet import UNetConfig
from osmose.training import files
from osmose.training.recipes import checked, recipe
from osmose.training.run import Run, load_weights, require_free

_PREDICTIONS = {EpsParametrization: "epsilon", X0Parametrization: "sample", VParametrization: "v_prediction"}
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PREFIX = "denoiser.network."
#: The first layer of the embedding of time, whose columns are sines and cosines.
_FIRST = "time_embedding.linear_1.weight"
#: T of diffusers' schedulers, which networks are told as it is; here labels go from 0 to 1000 whatever T.
_STEPS = 1000
#: Of a UNet2DModel, what has to be so.
_FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
}
#: Of a scheduler, likewise.
_PLAIN = {"thresholding": False, "rescale_betas_zero_snr": False, "use_karras_sigmas": False}
_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)


def export(run: Run, folder: Path | str) -> Path:
    """Write a run as a folder of diffusers.

    Args:
        run: a run of ddpm or iddpm on images, with a UNet of residual blocks.
        folder: the folder to make.

    Returns:
        The folder.

    Raises:
        UserError: a run that diffusers has no form for; the message says which part.
    """
    folder = Path(folder)
    require_free(folder)
    method = run.config.method
    if not isinstance(method, DiffusionConfig) or method.kind == "edm":
        raise UserError(f"RUN: {run.folder} is a run of {method.kind}; diffusers takes those of ddpm and iddpm")
    unet, scheduler = _unet(run), _scheduler(run, method)
    own = files.read_tensors(run.weights)
    weights = {name.removeprefix(_PREFIX): value for name, value in own.items() if name.startswith(_PREFIX)}
    index: dict[str, Any] = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.33.0"}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    with files.replacing(folder) as temporary:
        for part in ("unet", "scheduler"):
            (temporary / part).mkdir(parents=True)
        files.write_json(temporary / "unet" / "config.json", unet)
        files.write_tensors(temporary / "unet" / _WEIGHTS, weights)
        files.write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        files.write_json(temporary / "model_index.json", index)
    return folder


def _unet(run: Run) -> dict[str, Any]:
    """The configuration of a UNet2DModel."""
    method, spec = run.config.method, run.config.spec
    assert isinstance(method, DiffusionConfig)
    network = method.network
    if not isinstance(network, UNetConfig):
        raise UserError(f"network: {network.kind} has no form in diffusers; a unet has")
    for field, need in (("block", "residual"), ("time_frequency", 1.0)):
        if getattr(network, field) != need:
            raise UserError(f"network.{field}: {getattr(network, field)} has no form in diffusers; {need} has")
    if network.modulation == "double-norm":
        raise UserError("network.modulation: double-norm has no form in diffusers; add and scale-shift have")
    widths = [network.channels * m for m in network.mult]
    attends = [resolution in network.attention for resolution in network.resolutions(spec.shape)]
    groups = {network.groups(width) for width in widths}
    if len(groups) > 1:
        raise UserError(
            f"network.norm_groups: levels have {', '.join(map(str, sorted(groups)))} groups, and in diffusers all have "
            f"the same number; train with network.norm_groups={min(groups)}"
        )
    attending = [width for width, there in zip(widths, attends, strict=True) if there] + [widths[-1]]  # and the middle
    head_widths = {width // network.heads_of(width) for width in attending}
    single = all(network.heads_of(width) == 1 for width in attending)
    if len(head_widths) > 1 and not single:
        raise UserError("network.heads: diffusers fixes the width of a head, which differs between levels here")
    classes = spec.num_classes if method.conditional else None
    outputs = 2 if method.variance == "learned_range" else 1
    return {
        "_class_name": "UNet2DModel",
        "sample_size": list(spec.shape[1:]),
        "in_channels": spec.shape[0],
        "out_channels": outputs * spec.shape[0],
        "block_out_channels": widths,
        "layers_per_block": network.blocks,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": None if single else head_widths.pop(),
        "norm_num_groups": groups.pop(),
        "attn_norm_num_groups": network.groups(widths[-1]),
        "norm_eps": network.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if network.modulation == "scale-shift" else "default",
        "downsample_padding": 1 if network.padding == "symmetric" else 0,
        "dropout": network.dropout,
        "flip_sin_to_cos": False,
        "freq_shift": network.time_shift,
        "num_class_embeds": classes,
    }


def _scheduler(run: Run, method: DiffusionConfig) -> dict[str, Any]:
    """The configuration of a DDPMScheduler."""
    schedule, parametrization = method.schedule, method.parametrization
    if not isinstance(schedule, LinearSchedule | ScaledLinearSchedule | CosineSchedule):
        raise UserError(f"schedule: {schedule.kind} is continuous, and diffusers' DDPMScheduler has steps")
    if schedule.num_steps != _STEPS:
        raise UserError(
            f"schedule.num_steps: {schedule.num_steps} is not {_STEPS}, and diffusers tells networks the number of the "
            "step itself, where these were told it on a scale of 1000"
        )
    if type(parametrization) not in _PREDICTIONS:
        raise UserError(f"parametrization: {parametrization.kind} has no form in diffusers; eps, x0 and v have")
    limits = run.config.spec.model_range
    clip = method.sampling.clip and limits is not None
    if clip and limits is not None and limits[0] != -limits[1]:
        raise UserError(f"data: lie in {limits}, and diffusers clips between -c and c; export with sampling.clip=false")
    betas: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
    if not isinstance(schedule, CosineSchedule):
        named = "linear" if isinstance(schedule, LinearSchedule) else "scaled_linear"
        betas = {"beta_schedule": named, "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    elif schedule != CosineSchedule():  # diffusers has one
        betas = {"beta_schedule": "linear", "trained_betas": schedule.betas.tolist()}
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": _STEPS,
        **betas,
        "prediction_type": _PREDICTIONS[type(parametrization)],
        "variance_type": method.variance,
        "clip_sample": clip,
        "clip_sample_range": limits[1] if clip and limits is not None else 1.0,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }


def load(folder: Path | str, data: DataConfig, out: Path | str) -> Run:
    """Make a run of a folder of diffusers.

    Args:
        folder: of a pipeline with a UNet2DModel and a scheduler.
        data: what it was trained on, or what is like it: the form of its samples, and what they are scored against.
        out: the run folder to make.

    Raises:
        UserError: a folder that is none, weights in pickles, a part that has no form here; the message names it.
    """
    folder, out = Path(folder), Path(out)
    require_free(out)
    unet = _described(folder / "unet" / "config.json", "UNet2DModel")
    scheduler = _described(folder / "scheduler" / "scheduler_config.json", *_SCHEDULERS)
    weights = folder / "unet" / _WEIGHTS
    if not weights.is_file():
        pickled = [path.name for path in (folder / "unet").glob("*.bin")]
        held = f"{pickled[0]}, a pickle, which is never read" if pickled else "no weights"
        raise UserError(f"{folder / 'unet'}: holds {held}; {_WEIGHTS} is needed")
    dataset = data.load()
    spec = dataset.spec
    if spec.kind != "image" or unet.get("in_channels", 3) != spec.shape[0]:
        raise UserError(
            f"--data: {dataset.source} has {spec.kind} of shape {spec.shape}, and the network is for images of "
            f"{unet.get('in_channels', 3)} channels"
        )
    outputs = unet.get("out_channels", 3) // spec.shape[0]
    learned = scheduler.get("variance_type") == "learned_range"
    if outputs != (2 if learned else 1):
        raise UserError(
            f"out_channels: {unet.get('out_channels', 3)} with variance_type {scheduler.get('variance_type')!r} has no "
            "form here; twice in_channels goes with learned_range"
        )
    classes = unet.get("num_class_embeds")
    if classes is not None and classes != spec.num_classes:
        raise UserError(f"--data: {dataset.source} has {spec.num_classes or 'no'} classes, and the network {classes}")
    changes: dict[str, Any] = {
        "network": _network(unet, spec.shape),
        "schedule": _schedule(scheduler),
        "parametrization": _parametrization(scheduler),
        "conditional": classes is not None,
        "sampling.clip": scheduler.get("clip_sample", True),
    }
    if not learned and scheduler.get("variance_type") in ("fixed_small", "fixed_large"):
        changes["variance"] = scheduler["variance_type"]
    config = checked(recipe("iddpm" if learned else "ddpm", data, dataset, 0, changes))
    state = _weights(weights, unet.get("flip_sin_to_cos", True))
    with torch.random.fork_rng(devices=[]):
        model = config.method.build(config.spec)
    assert isinstance(model, Diffusion)
    load_weights(model.denoiser.network, state, weights)
    run = Run.create(out, config)
    run.write_weights(model.state_dict())
    return run


def _described(path: Path, *classes: str) -> dict[str, Any]:
    """A configuration of one of some classes."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a folder of diffusers has unet/config.json and scheduler/ beside it")
    values = files.read_json(path)
    kind = values.get("_class_name") if isinstance(values, dict) else None
    if kind not in classes:
        raise UserError(f"{path}: is of {kind!r}; {', '.join(classes)} can be read")
    assert isinstance(values, dict)
    return values


def _require(values: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, need in wanted.items():
        if values.get(name, need) != need:
            raise UserError(f"{name}: {values[name]!r} has no form here; {need!r} has")


def _network(unet: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """The configuration of a UNet here."""
    _require(unet, _FIXED)
    kinds, widths = unet["down_block_types"], unet["block_out_channels"]
    for name in (*kinds, *unet["up_block_types"]):
        if name not in ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"):
            raise UserError(f"down_block_types: {name!r} has no form here; DownBlock2D and AttnDownBlock2D have")
    attends = [name.startswith("Attn") for name in kinds]
    if [name.startswith("Attn") for name in reversed(unet["up_block_types"])] != attends:
        raise UserError("up_block_types: attend at other resolutions than down_block_types, which has no form here")
    if any(width % widths[0] for width in widths):
        raise UserError(f"block_out_channels: {widths} are no multiples of the first, which has no form here")
    groups = unet.get("norm_num_groups", 32)
    scaled = unet.get("resnet_time_scale_shift", "default") == "scale_shift"
    if unet.get("attn_norm_num_groups") != groups and (scaled or unet.get("attn_norm_num_groups") is not None):
        raise UserError(f"attn_norm_num_groups: {unet.get('attn_norm_num_groups')} has no form here; {groups} has")
    network = UNetConfig(channels=widths[0], mult=tuple(width // widths[0] for width in widths), attention=())
    resolutions = network.resolutions(shape)
    head = unet.get("attention_head_dim", 8)
    size = unet.get("sample_size")
    sides = tuple(shape[1:]) if size is None else (size, size) if isinstance(size, int) else tuple(size)
    if sides != tuple(shape[1:]):
        raise UserError(f"--data: images of {shape[1:]}, and sample_size is {size}")
    return {
        "kind": "unet",
        "channels": widths[0],
        "mult": list(network.mult),
        "blocks": unet.get("layers_per_block", 2),
        "attention": [r for r, there in zip(resolutions, attends, strict=True) if there],
        "head_width": head,
        "modulation": "scale-shift" if scaled else "add",
        "dropout": unet.get("dropout", 0.0),
        "norm_groups": groups,
        "group_channels": 1,
        "norm_eps": unet.get("norm_eps", 1e-5),
        "padding": "symmetric" if unet.get("downsample_padding", 1) == 1 else "asymmetric",
        "time_shift": unet.get("freq_shift", 0),
    }


def _schedule(scheduler: dict[str, Any]) -> dict[str, Any]:
    _require(scheduler, _PLAIN | {"num_train_timesteps": _STEPS, "trained_betas": None})
    kind = scheduler.get("beta_schedule", "linear")
    if kind == "squaredcos_cap_v2":
        return {"kind": "cosine", "num_steps": _STEPS}
    if kind not in ("linear", "scaled_linear"):
        raise UserError(f"beta_schedule: {kind!r} has no form here; linear, scaled_linear, squaredcos_cap_v2 have")
    ends = {"beta_start": scheduler.get("beta_start", 1e-4), "beta_end": scheduler.get("beta_end", 0.02)}
    return {"kind": kind.replace("_", "-"), "num_steps": _STEPS} | ends


def _parametrization(scheduler: dict[str, Any]) -> str:
    wanted = scheduler.get("prediction_type", "epsilon")
    names = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
    if wanted not in names:
        raise UserError(f"prediction_type: {wanted!r} has no form here; {', '.join(names)} have")
    return names[wanted]


def _weights(path: Path, flipped: bool) -> dict[str, Tensor]:
    """Weights by the names of a UNet here, whose embedding of time has sines first."""
    state = files.read_tensors(path)
    if flipped and _FIRST in state:
        cosines, sines = state[_FIRST].chunk(2, 1)
        state[_FIRST] = torch.cat([sines, cosines], 1)
    return {name: value.float() for name, value in state.items()}
