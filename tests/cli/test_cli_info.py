"""`osmose info` of networks by name, and what it says of time; presets on the command line."""

import json
from pathlib import Path

import pytest

from osmose.networks.presets import PRESETS

THIN = ["network.channels=8", "network.blocks=1", "--batch-size", "2"]


def test_info_of_a_preset(osmose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = json.loads(osmose("info", "unet-8", "--json").out)
    assert told["network"] == "unet-8"
    assert told["shape"] == [1, 8, 8]
    assert told["config"]["kind"] == "unet"
    assert told["parameters"] == 1_001_729
    assert told["macs"] == 21_647_360
    assert told["batch_size"] == 16
    assert [row["part"] for row in told["table"]] == ["down", "down", "middle", "up", "up"]
    assert [row["attention"] for row in told["table"]] == [False, True, True, True, False]
    assert 0 < told["seconds_per_evaluation"] < told["seconds_per_step"]
    page = osmose("info", "unet-8").out
    assert "1.002 million (1,001,729)" in page
    assert "21.6 million multiply-adds per network evaluation of one item" in page
    assert "s per training step of 16 items" in page
    assert "network.mult = [1, 2]" in page
    assert "next: osmose train ddpm --data DATA --out RUN --network unet-8" in page
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mbconv96", "iddpm-cifar10", "unet"])
def test_info_of_a_network_of_another_size(osmose, name):
    words = ["info", name, *THIN, "network.attention=8,", "network.mult=1,2", "--shape", "2,16,8"]
    told = json.loads(osmose(*words, "--json").out)
    assert told["shape"] == [2, 16, 8]
    assert told["batch_size"] == 2
    assert (told["config"]["channels"], told["config"]["attention"]) == (8, [8])
    assert told["config"]["dropout"] == {"mbconv96": 0.1, "iddpm-cifar10": 0.3, "unet": 0.0}[name]
    assert told["config"]["block"] == ("mbconv" if name == "mbconv96" else "residual")
    assert [(row["height"], row["width"]) for row in told["table"]] == [(16, 8), (8, 4), (8, 4), (8, 4), (16, 8)]
    page = osmose(*words).out
    told = "network.channels=8 network.blocks=1 network.attention=8 network.mult=1,2"
    assert f"next: osmose train ddpm --data DATA --out RUN --network {name} {told}" in page


def test_info_of_a_network_for_points(osmose):
    told = json.loads(osmose("info", "mlp", "--shape", "5", "network.width=16", "--json").out)
    assert told["shape"] == [5]
    assert told["table"] == []
    assert "12 items" in osmose("info", "mlp", "--batch-size", "12", "network.width=16").out


@pytest.mark.usefixtures("runs")
def test_info_of_a_run_measures_a_step_of_its_batch(osmose):
    told = json.loads(osmose("info", "digits", "--json").out)
    assert told["batch_size"] == told["items_measured"] == 8
    assert 0 < told["seconds_per_evaluation"] < told["seconds_per_step"]
    assert "s per training step of 8 items" in osmose("info", "digits").out


def test_what_is_in_the_folder_comes_first(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("unet").mkdir()
    assert "not a run folder" in refused("info", "unet")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mbconv69"], "mbconv69: neither a run folder nor a data set nor a network; data sets are digits, "),
        (
            ["mbconv69"],
            "text, causal-text, experts, conservative, quantized, bf16, implicit, ddpm-cifar10",
        ),
        (["unet", "--shape", "1,28,28"], "network.mult: 4 levels need sides divisible by 8"),
        (["unet", "--shape", "2"], "a unet needs images"),
        (["unet", "--shape", "3x32x32"], "--shape: '3x32x32' is not valid: write channels,height,width (3,32,32)"),
        (["unet", "--shape", "32,32"], "--shape: '32,32' is not valid"),
        (["unet", "--shape", "3,0,32"], "--shape: '3,0,32' is not valid"),
        (["unet", "--shape", "3,-8,8"], "--shape: '3,-8,8' is not valid"),
        (["unet", "--batch-size", "0"], "--batch-size: 0 is not valid: should be greater than or equal to 1"),
        (["unet", "--batch-size", "x"], "--batch-size: 'x' is not valid: should be a whole number"),
        (["mbconv64", "network.modulation=scale-shift"], "network.modulation: scale-shift is for residual blocks"),
        (["unet", "network.chanels=8"], "network.chanels: unknown field; did you mean 'channels'?"),
        (["digits", "--shape", "1,8,8"], "--shape: '1,8,8' is for networks, and digits is a data set"),
        (["digits", "network.channels=8"], "data.network.channels: unknown field"),
        (["toy", "--batch-size", "8"], "--batch-size: 8 is for networks, and toy is a run"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_refused(refused, words, message):
    if words[0] == "digits":
        Path("digits").rename("images")  # the name of a run here
    assert message in refused("info", *words)


def test_presets_are_networks_to_train(osmose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thin = ["network.channels=8", "network.dropout=0.2", "training.preview_samples=1", "sampling.num_steps=2"]
    for name, words in (("flag", ["--network", "unet-8"]), ("word", ["network=unet-8"])):
        words = ["--data", "digits", *thin, *words, "--out", name, "--steps", "1", "--batch-size", "4", "--quiet"]
        assert osmose("train", "ddpm", *words).status == 0
        network = json.loads(Path(name, "config.json").read_text())["method"]["network"]
        assert network == {
            **{"kind": "unet", "channels": 8, "mult": [1, 2], "blocks": 2, "block": "residual", "modulation": "add"},
            "time_frequency": 1.0,
            **{
                "attention": [4],
                "heads": 1,
                "head_width": None,
                "time_shift": 1,
                "dropout": 0.2,
                "norm_groups": 32,
                "group_channels": 4,
            },
            **{"norm_eps": 1e-6, "padding": "symmetric"},
        }


@pytest.mark.parametrize("command", ["train", "info"])
def test_help_lists_the_presets(osmose, command):
    page = osmose(command, "--help").out
    assert [name for name in PRESETS if name not in page] == []
