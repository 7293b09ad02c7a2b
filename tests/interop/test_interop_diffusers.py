"""Runs as folders of diffusers and back: the same weights, the same samples, and what has no form."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws
from osmose.interop.diffusers import export, load

DIGITS = DataConfig(source="digits")
SMALL = {"network.channels": 8, "network.norm_groups": 4, "network.group_channels": 1}
CASES = {
    "eps": ("ddpm", {}),
    "classes": ("ddpm", {"conditional": True, "parametrization": "v", "schedule": "cosine"}),
    "x0": ("ddpm", {"parametrization": "x0", "schedule": "scaled-linear", "sampling.clip": False}),
    "heads": ("ddpm", {"network.heads": 2, "network.modulation": "scale-shift", "network.attention": [4]}),
    "learned": ("iddpm", {"schedule.num_steps": 1000}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_comes_back_as_it_went(tmp_path, made, case):
    method, changes = CASES[case]
    run = made(tmp_path / "run", method, SMALL | changes)
    export(run, tmp_path / "folder")
    back = load(tmp_path / "folder", DIGITS, tmp_path / "back")
    one, other = run.model(), back.model()
    assert back.config.method.kind == method
    for name, value in one.denoiser.network.state_dict().items():
        assert torch.equal(value, other.denoiser.network.state_dict()[name])
    a, b = (model.sample(3, num_steps=4, seed=5).data for model in (one, other))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ["eps", "classes", "x0"])
def test_pipelines_of_diffusers_draw_the_same_samples_from_the_same_noise(tmp_path, made, case):
    diffusers = pytest.importorskip("diffusers")
    method, changes = CASES[case]
    run = made(tmp_path / "run", method, SMALL | changes)
    export(run, tmp_path / "folder")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder")
    model = run.model()
    ddim = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    ddim.set_timesteps(10)
    noise = model.noise(SampleDraws(7, 0, 4, "cpu"))
    x, classes = noise.clone(), torch.arange(4) if model.config.conditional else None
    with torch.no_grad():
        for t in ddim.timesteps:
            out = pipeline.unet(x, t, class_labels=classes).sample
            # As here, the noise is what is left once the estimate is clipped.
            x = ddim.step(out, t, x, use_clipped_model_output=True).prev_sample
    with torch.inference_mode():
        sampling = model.sampling(num_steps=10, solver="ddim", spacing="leading")
        ours, _ = model.generate(SampleDraws(7, 0, 4, "cpu"), sampling, classes, lambda *_: None)
    assert float(x.std()) > 0.1
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


def test_the_ancestral_chain_is_that_of_ddpm(tmp_path, made, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    run = made(tmp_path / "run", "ddpm", SMALL)
    export(run, tmp_path / "folder")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder")
    model, scheduler = run.model(), pipeline.scheduler
    scheduler.set_timesteps(10)
    draws = SampleDraws(3, 0, 2, "cpu")
    x = model.noise(draws)
    import importlib

    module = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: model.noise(draws))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    with torch.inference_mode():
        sampling = model.sampling(num_steps=10, solver="ancestral", spacing="leading")
        ours, _ = model.generate(SampleDraws(3, 0, 2, "cpu"), sampling, None, lambda *_: None)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


def test_networks_of_diffusers_with_its_own_embedding_of_time(tmp_path):
    """Its defaults: cosines first, frequencies that end before 1/10000, heads of 8 channels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=10,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    diffusers.DDPMPipeline(theirs, diffusers.DDIMScheduler(beta_schedule="scaled_linear")).save_pretrained(
        tmp_path / "theirs"
    )
    run = load(tmp_path / "theirs", DIGITS, tmp_path / "run")
    network = run.model().denoiser.network
    x, t, classes = torch.randn(3, 1, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([1, 5, 9])
    with torch.no_grad():
        want, got = theirs(x, t, class_labels=classes).sample, network(x, t.float(), classes)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    export(run, tmp_path / "again")
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "again" / "unet").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x, t, class_labels=classes).sample, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("edm", {}, "is a run of edm; diffusers takes those of ddpm and iddpm"),
        ("ddpm", {"schedule.num_steps": 100}, r"schedule.num_steps: 100 is not 1000"),
        ("ddpm", {"schedule": "vp"}, "schedule: vp is continuous"),
        ("ddpm", {"parametrization": "edm"}, "parametrization: edm has no form in diffusers; eps, x0 and v have"),
        ("ddpm", {"network.block": "mbconv"}, r"network.block: mbconv has no form in diffusers; residual has"),
        ("ddpm", {"network.norm_groups": 32, "network.group_channels": 4}, r"levels have 2, 4 groups.*norm_groups=2"),
        ("ddpm", {"network.modulation": "double-norm"}, r"network.modulation: double-norm has no form"),
    ],
)
def test_runs_that_have_no_form_there(tmp_path, made, method, changes, message):
    with pytest.raises(UserError, match=message):
        export(made(tmp_path / "run", method, SMALL | changes), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made):
    place = tmp_path_factory.mktemp("exported")
    return export(made(place / "run", "ddpm", SMALL), place / "folder")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"_class_name": "UNet2DConditionModel"}, "is of 'UNet2DConditionModel'; UNet2DModel can be read"),
        (
            "unet",
            {"down_block_types": ["SkipDownBlock2D", "DownBlock2D", "DownBlock2D"]},
            "'SkipDownBlock2D' has no form",
        ),
        ("unet", {"act_fn": "gelu"}, "act_fn: 'gelu' has no form here; 'silu' has"),
        ("unet", {"block_out_channels": [8, 12, 16]}, r"block_out_channels: \[8, 12, 16\] are no multiples"),
        ("unet", {"sample_size": 16}, "--data: images of .*, and sample_size is 16"),
        ("unet", {"in_channels": 3}, "the network is for images of 3 channels"),
        ("unet", {"num_class_embeds": 7}, "--data: digits has 10 classes, and the network 7"),
        ("unet", {"out_channels": 2}, "out_channels: 2 with variance_type 'fixed_small' has no form"),
        ("scheduler", {"_class_name": "FlowMatchScheduler"}, "is of 'FlowMatchScheduler'; DDPMScheduler, DDIM"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule: 'sigmoid' has no form here; linear, scaled_linear"),
        ("scheduler", {"num_train_timesteps": 500}, "num_train_timesteps: 500 has no form here; 1000 has"),
        ("scheduler", {"prediction_type": "flow"}, "prediction_type: 'flow' has no form here; epsilon, sample"),
        ("scheduler", {"thresholding": True}, "thresholding: True has no form here"),
    ],
)
def test_folders_that_have_no_form_here(tmp_path, folder, part, changes, message):
    shutil.copytree(folder, tmp_path / "folder")
    path = tmp_path / "folder" / part / ("config.json" if part == "unet" else "scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "folder", DIGITS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pickles_are_never_read(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "folder")
    weights = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"holds diffusion_pytorch_model.bin, a pickle, which is never read"):
        load(tmp_path / "folder", DIGITS, tmp_path / "run")
    weights.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load(tmp_path / "folder", DIGITS, tmp_path / "run")
    save_file({"conv_in.weight": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="has no tensor"):
        load(tmp_path / "folder", DIGITS, tmp_path / "run")
    shutil.rmtree(tmp_path / "folder" / "scheduler")
    with pytest.raises(UserError, match=r"scheduler_config.json: no such file"):
        load(tmp_path / "folder", DIGITS, tmp_path / "run")
    assert not (tmp_path / "run").exists()
