"""Networks as graphs of other runtimes: the same answers, and samples from a loop without osmose or torch."""

import json

import numpy as np
import pytest
import torch

from osmose.data.dataset import DataConfig
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws
from osmose.interop.graphs import export

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

DIGITS = DataConfig(source="digits")
NETWORKS = {
    "unet": {"network.channels": 8, "network.mult": [1, 2], "network.attention": [4], "conditional": True},
    "dit": {"network": "dit", "network.width": 16, "network.depth": 2},
    "mlp": {"network": "mlp", "network.width": 16, "network.depth": 1},
}


def runner(graph, target):
    """The graph as a function of arrays."""
    if target == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(graph)
        names = [value.name for value in session.get_inputs()]
        return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]
    openvino = pytest.importorskip("openvino")
    compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert [port.any_name for port in compiled.inputs][:2] == ["x", "label"]
    return lambda *arrays: compiled(list(arrays))[0]


@pytest.mark.parametrize(
    ("method", "name", "target"),
    [("ddpm", "unet", "onnx"), ("edm", "dit", "openvino"), ("edm", "mlp", "onnx")],
)
def test_a_loop_of_ten_lines_draws_the_samples_of_the_run(tmp_path, made, method, name, target):
    run = made(tmp_path / "run", method, NETWORKS[name])
    graph = export(run, tmp_path / "graph", target, num_steps=6)
    network, s = runner(graph, target), json.loads((tmp_path / "graph" / "sampler.json").read_text())
    model = run.model()
    for count in (1, 5):  # any number of items
        noise = model.noise(SampleDraws(7, 0, count, "cpu"))
        classes = np.arange(count) % s["num_classes"] if s["num_classes"] else None
        x = s["prior_std"] * noise.numpy()
        for step in s["steps"]:
            told = [(step["c_in"] * x).astype("f4"), np.full(count, step["label"], "f4")]
            f = network(*told, *([] if classes is None else [classes]))
            x0 = step["c_skip"] * x + step["c_out"] * f
            x0 = x0 if s["clip"] is None else x0.clip(*s["clip"])
            eps = (x - step["alpha"] * x0) / step["sigma"]
            x = step["next_alpha"] * x0 + step["next_sigma"] * eps
        with torch.inference_mode():
            sampling = model.sampling(num_steps=6, solver="ddim")
            told = None if classes is None else torch.from_numpy(classes)
            ours, _ = model.generate(SampleDraws(7, 0, count, "cpu"), sampling, told, lambda *_: None)
        np.testing.assert_allclose(x, ours.numpy(), rtol=0, atol=2e-4)


def test_what_has_no_graph(tmp_path, made):
    run = made(tmp_path / "run", "edm", {"network": "implicit", "network.width": 8})
    with pytest.raises(UserError, match="network: a Implicit has no graph here; UNet, DiT, UViT, MLP have"):
        export(run, tmp_path / "graph", "onnx")
    run = made(tmp_path / "linear", "edm", NETWORKS["mlp"] | {"network.linear": True})
    with pytest.raises(UserError, match=r"network.linear: true has no graph here; train with network.linear=false"):
        export(run, tmp_path / "graph", "onnx")
    run = made(tmp_path / "other", "gaussian", {})
    with pytest.raises(UserError, match="is a run of gaussian; those of ddpm, iddpm and edm are graphs"):
        export(run, tmp_path / "graph", "onnx")
    assert not (tmp_path / "graph").exists()


def test_what_is_not_installed_is_named(tmp_path, made, monkeypatch):
    run = made(tmp_path / "run", "edm", NETWORKS["mlp"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--to openvino: needs onnx; install it with: pip install 'osmose\[export\]'"):
        export(run, tmp_path / "graph", "openvino")
