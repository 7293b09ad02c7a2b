"""Time to a given quality on Fashion-MNIST: the default recipe against diffusers' training defaults.

    python benchmarks/time_to_quality.py --data-root ROOT --out benchmarks/results

Both sides train at the same time, one thread each, so that the machine treats them alike. The clock is the CPU time
of that thread, training only: on a free machine it is the wall time. At fixed marks the averaged weights are kept, and
after training each is scored: 700 samples, 12 network evaluations with DPM-Solver++(2M), `fd_clf` against 700 training
images. Solver, number of evaluations, seeds and judge are the same for both.

The budget is short on purpose, and that hurts diffusers' defaults: in 240 seconds it takes about 420 steps, so that its
500 warm-up steps are not over. The table says who gives samples sooner, not who gives better ones in the end.

Sides:
  osmose            `osmose train edm --data fashion-mnist`, all defaults, as many steps as fit in the time
  diffusers         train_unconditional's defaults (AdamW lr 1e-4, betas 0.95 and 0.999, weight decay 1e-6, 500 warm-up
                    steps, cosine decay, batch 16, EMA 0.9999 with its warm-up, DDPM 1000 steps, eps) on DDPM's UNet
                    for 28x28 (base 32, 1.6 M parameters). The script's own default network (114 M parameters, at 32x32)
                    is timed for a few steps only: see `default_network` in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SAMPLES, EVALUATIONS = 700, 12


#: One choice of the recipe undone at a time, to see what it buys (`--choices`).
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "the default recipe": ("edm", {}),
    "DDPM's UNet, base 32": (
        "edm",
        {"network": {"kind": "unet", "channels": 32, "mult": [1, 2, 2], "blocks": 2, "attention": [14]}},
    ),
    "ddpm: eps, linear schedule, uniform times": ("ddpm", {}),
    "learning rate 1e-4": ("edm", {"training.lr": 1e-4}),
    "batch 16": ("edm", {"training.batch_size": 16}),
    "no averaging of weights": ("edm", {"training.ema": 0.0}),
}


def train_osmose(
    root: str, seed: int, marks: list[float], folder: Path, side: str = "osmose", choice: str = "the default recipe"
) -> None:
    """Train a recipe; keep the averaged weights at each mark."""
    from osmose import DataConfig, Run, Trainer, recipe
    from osmose.training import files
    from osmose.training.window import Window

    data = DataConfig(source="fashion-mnist", root=root)
    dataset = data.load()
    method, changes = CHOICES[choice]
    never = dict.fromkeys(("training.validate_every", "training.preview_every", "training.checkpoint_every"), 10**9)
    changes = {**never, **changes}
    # The learning rate falls to zero at the last step, so the number of steps has to be known: time a few first.
    for leftover in (f"{side}{seed}-probe", f"{side}{seed}"):  # of a benchmark that was interrupted
        shutil.rmtree(folder / leftover, ignore_errors=True)
    probe = Trainer(Run.create(folder / f"{side}{seed}-probe", recipe(method, data, dataset, seed, changes)), dataset)
    for _ in range(3):
        probe.optimise(Window())
    start = time.process_time()
    for _ in range(20):
        probe.optimise(Window())
    steps = int(marks[-1] / ((time.process_time() - start) / 20))
    config = recipe(method, data, dataset, seed, {**changes, "training.steps": steps})
    run = Run.create(folder / f"{side}{seed}", config)
    trainer, window, spent = Trainer(run, dataset), Window(), 0.0
    for mark in marks:
        while trainer.step < steps and (spent < mark or mark == marks[-1]):
            start = time.process_time()
            trainer.optimise(window)
            trainer.step += 1
            spent += time.process_time() - start
        files.write_tensors(folder / f"{side}{seed}-{mark:g}.safetensors", trainer.ema.state_dict())
        note = {"seconds": spent, "steps": trainer.step, "images": trainer.step * config.training.batch_size}
        files.write_json(folder / f"{side}{seed}-{mark:g}.json", note)


def train_diffusers(root: str, seed: int, marks: list[float], folder: Path) -> None:
    """What diffusers' train_unconditional does with its defaults, without its command line."""
    import torch
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    from osmose import DataConfig
    from osmose.training import files

    torch.manual_seed(seed)
    dataset = DataConfig(source="fashion-mnist", root=root).load()
    images = dataset.spec.encode(dataset.train)
    model = UNet2DModel(**diffusers_network())
    scheduler = DDPMScheduler(1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def step(rate: Any = None) -> None:
        clean = images[torch.randint(0, len(images), (16,))]
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (16,))
        out = model(scheduler.add_noise(clean, noise, t), t).sample
        torch.nn.functional.mse_loss(out, noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if rate is not None:
            optimizer.step()
            rate.step()
            ema.step(model.parameters())
        optimizer.zero_grad()

    step()
    start = time.process_time()
    for _ in range(5):
        step()
    steps = int(marks[-1] / ((time.process_time() - start) / 5))
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=steps)
    done, spent = 0, 0.0
    for mark in marks:
        while done < steps and (spent < mark or mark == marks[-1]):
            start = time.process_time()
            step(rate)
            done += 1
            spent += time.process_time() - start
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        files.write_tensors(folder / f"diffusers{seed}-{mark:g}.safetensors", model.state_dict())
        ema.restore(model.parameters())
        note = {"seconds": spent, "steps": done, "images": done * 16}
        files.write_json(folder / f"diffusers{seed}-{mark:g}.json", note)


def diffusers_network() -> dict[str, Any]:
    return {
        "sample_size": 28, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64, 64),
        "layers_per_block": 2, "attention_head_dim": None, "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip


def score(
    side: str, root: str, seed: int, marks: list[float], folder: Path, choice: str = "the default recipe"
) -> None:
    """Judge the kept weights: the same sampler, seeds and metric for both sides."""
    from osmose import DataConfig, recipe, score_samples
    from osmose.training import files

    data = DataConfig(source="fashion-mnist", root=root)
    dataset = data.load()
    if side != "diffusers":
        config = recipe(CHOICES[choice][0], data, dataset, seed, CHOICES[choice][1])
    else:
        ours = {"kind": "unet", "channels": 32, "mult": [1, 2, 2], "blocks": 2, "attention": [14], "group_channels": 1}
        config = recipe("ddpm", data, dataset, seed, {"network": ours})
    model = config.method.build(dataset.spec)
    for mark in marks:
        name = folder / f"{side}{seed}-{mark:g}"
        state = files.read_tensors(Path(f"{name}.safetensors"))
        (model if side != "diffusers" else model.networks()[0]).load_state_dict(state)
        drawn = model.sample(SAMPLES, seed=seed, solver="dpmpp-2m", num_steps=EVALUATIONS, clip=True, batch_size=100)
        note = json.loads(Path(f"{name}.json").read_text())
        note["scores"] = [
            s.to_json() for s in score_samples(drawn.data, dataset, metrics=["fd_clf", "kid_clf", "sw2"], seed=0)
        ]
        files.write_json(Path(f"{name}.json"), note)
        print(side, seed, mark, note["steps"], note["scores"][0]["value"], file=sys.stderr, flush=True)


def default_network() -> dict[str, float]:
    """Seconds of one training step of train_unconditional's own network, which is too large for this budget."""
    import torch
    from diffusers import UNet2DModel

    torch.set_num_threads(1)
    model = UNet2DModel(
        sample_size=32, in_channels=1, out_channels=1, layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    )  # fmt: skip
    x, t = torch.randn(16, 1, 32, 32), torch.randint(0, 1000, (16,))
    spent = []
    for _ in range(2):
        start = time.process_time()
        model(x, t).sample.square().mean().backward()
        spent.append(time.process_time() - start)
    return {"parameters": sum(p.numel() for p in model.parameters()), "seconds_per_step_of_16": min(spent)}


def summarise(marks: list[float], seeds: int, folder: Path, out: Path) -> None:
    """Curves, the times to each quality, a table."""
    from matplotlib.figure import Figure

    from osmose.training.run import versions

    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for side in ("osmose", "diffusers"):
        curves[side] = [
            [json.loads((folder / f"{side}{seed}-{mark:g}.json").read_text()) for mark in marks]
            for seed in range(seeds)
        ]

    def fd(point: dict[str, Any]) -> float:
        return point["scores"][0]["value"]

    floor = curves["osmose"][0][0]["scores"][0]["floor"]
    targets = [fd(run[-1]) for run in curves["diffusers"]]
    reached = []
    for run, target in zip(curves["osmose"], targets, strict=True):
        reached.append(next((point["seconds"] for point in run if fd(point) <= target), None))
    results = {
        "marks": marks, "samples": SAMPLES, "evaluations": EVALUATIONS, "versions": versions(), "curves": curves,
        "floor": floor, "diffusers_final_fd": targets, "osmose_seconds_to_it": reached,
        "default_network": default_network(),
    }  # fmt: skip
    (out / "time_to_quality.json").write_text(json.dumps(results, indent=1) + "\n")

    figure = Figure(figsize=(6.5, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for side, colour in (("diffusers", "tab:orange"), ("osmose", "tab:blue")):
        for run in curves[side]:
            axes.plot([p["seconds"] for p in run], [fd(p) for p in run], "o-", color=colour, alpha=0.45, linewidth=1)
        mean = [statistics.mean(fd(run[i]) for run in curves[side]) for i in range(len(marks))]
        axes.plot(marks, mean, color=colour, linewidth=2.5, label=f"{side} (mean of {seeds} seeds)")
    axes.axhline(floor, color="0.3", linestyle=":", label="real data")
    axes.set(
        xscale="log", yscale="log", xlabel="CPU seconds of training, one thread", ylabel="fd_clf (lower is better)"
    )
    axes.set_title("Fashion-MNIST, 12 network evaluations a sample", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(out / "time_to_quality.png")

    lines = ["# Time to quality on Fashion-MNIST", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    lines += ["| seconds | " + " | ".join(f"{mark:g}" for mark in marks) + " |", "|---" * (len(marks) + 1) + "|"]
    for side in ("osmose", "diffusers"):
        cells = []
        for i in range(len(marks)):
            values = [fd(run[i]) for run in curves[side]]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}")
        lines.append(f"| {side} fd_clf | " + " | ".join(cells) + " |")
        images = [statistics.mean(run[i]["images"] for run in curves[side]) / 1000 for i in range(len(marks))]
        lines.append(f"| {side} images seen (thousands) | " + " | ".join(f"{n:.0f}" for n in images) + " |")
    lines += ["", f"Real data score {floor:.2f} (mean ± deviation over {seeds} seeds above). "
              f"diffusers ends at {', '.join(f'{t:.1f}' for t in targets)}; osmose had reached that by the mark at "
              f"{', '.join('not reached' if r is None else f'{r:.0f} s' for r in reached)} of {marks[-1]:g} s.", "",
              "![curves](time_to_quality.png)"]  # fmt: skip
    (out / "time_to_quality.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def choices(options: argparse.Namespace) -> None:
    """What each choice of the recipe buys: undo one at a time, the same time for all, the same judge."""
    import torch

    torch.set_num_threads(1)
    mark = float(options.marks.split(",")[0])
    lines = [
        "# What each choice of the default recipe buys", "",
        f"Fashion-MNIST, {mark:g} CPU seconds of training on one thread, {options.seeds} seed(s); {SAMPLES} samples, "
        f"{EVALUATIONS} network evaluations. Command: `python benchmarks/time_to_quality.py --choices --seeds "
        f"{options.seeds} --marks {mark:g}`.", "",
        "| instead of the default | fd_clf | images seen (thousands) |", "|---|---|---|",
    ]  # fmt: skip
    for index, choice in enumerate(CHOICES):
        notes = []
        for seed in range(options.seeds):
            side = f"choice{index}-"
            if not (options.work / f"{side}{seed}-{mark:g}.json").is_file():
                train_osmose(options.data_root, seed, [mark], options.work, side, choice)
                score(side, options.data_root, seed, [mark], options.work, choice)
            notes.append(json.loads((options.work / f"{side}{seed}-{mark:g}.json").read_text()))
        values = [note["scores"][0]["value"] for note in notes]
        images = statistics.mean(note["images"] for note in notes) / 1000
        spread = f" ± {statistics.pstdev(values):.1f}" if len(values) > 1 else ""
        lines.append(f"| {choice} | {statistics.mean(values):.1f}{spread} | {images:.0f} |")
        print(lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "recipe_choices.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/time-to-quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--marks", default="60,120,240", help="seconds of training at which to score")
    parser.add_argument("--choices", action="store_true", help="undo the recipe's choices one at a time instead")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    marks = [float(mark) for mark in options.marks.split(",")]
    options.work.mkdir(parents=True, exist_ok=True)
    if options.side:
        import torch

        torch.set_num_threads(1)
        train = train_osmose if options.side == "osmose" else train_diffusers
        train(options.data_root, options.seed, marks, options.work)
        score(options.side, options.data_root, options.seed, marks, options.work)
        return
    if options.choices:
        choices(options)
        return
    for seed in range(options.seeds):
        command = [sys.executable, __file__, "--data-root", options.data_root, "--work", str(options.work)]
        command += ["--marks", options.marks, "--seed", str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        pair = [subprocess.Popen([*command, "--side", side], env=environment) for side in ("osmose", "diffusers")]
        if any(process.wait() for process in pair):
            sys.exit("a side failed")
    options.out.mkdir(parents=True, exist_ok=True)
    summarise(marks, options.seeds, options.work, options.out)


if __name__ == "__main__":
    main()
