"""Speed and memory side by side with diffusers, on this machine, in one run.

    python benchmarks/speed.py --out benchmarks/results

Each library works in a process of its own (so that peak memory is its own) and the two take turns, round by round, so
that a machine that speeds up or slows down does so for both. The network is the same function with the same weights'
shapes: DDPM's UNet with one attention head, equal parameters. Training is forward, backward, clipping, AdamW and EMA as
each library does it; sampling is 50-step DDIM from the EMA weights. Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "28x28x1 base 32 batch 64": {
        "shape": (1, 28, 28),
        "base": 32,
        "mult": (1, 2, 2),
        "attention": 14,
        "batch": 64,
        "drawn": 16,
    },
    "32x32x3 base 64 batch 32": {
        "shape": (3, 32, 32),
        "base": 64,
        "mult": (1, 2, 2, 2),
        "attention": 16,
        "batch": 32,
        "drawn": 8,
    },
    "32x32x3 base 128 batch 8": {
        "shape": (3, 32, 32),
        "base": 128,
        "mult": (1, 2, 2, 2),
        "attention": 16,
        "batch": 8,
        "drawn": 2,
    },
}
STEPS = 50


class Osmose:
    """Our trainer and sampler, as a user gets them."""

    def __init__(self, case: dict[str, Any], precision: str):
        import torch

        from osmose import Run, Trainer, recipe
        from osmose.data.dataset import DataConfig, Dataset, DataSpec
        from osmose.training.window import Window

        spec = DataSpec(kind="image", shape=case["shape"], range=(0, 255), levels=256, shift=(127.5,), scale=(127.5,))
        images = torch.randint(0, 256, (512, *case["shape"]), dtype=torch.uint8)
        dataset = Dataset("noise", spec, images[:448], images[448:], "the last 64")
        changes = {
            "network": {
                "kind": "unet", "channels": case["base"], "mult": list(case["mult"]), "attention": [case["attention"]],
                "blocks": 2, "group_channels": 1,
            },
            "training.batch_size": case["batch"],
            "training.precision": precision,
        }  # fmt: skip
        config = recipe("ddpm", DataConfig(source="noise"), dataset, 0, changes)
        self.trainer = Trainer(Run.create(Path(tempfile.mkdtemp()) / "run", config), dataset)
        self.window, self.drawn = Window(), case["drawn"]
        self.parameters = sum(p.numel() for p in self.trainer.model.parameters())

    def train(self) -> None:
        self.trainer.optimise(self.window)
        self.trainer.step += 1

    def sample(self) -> None:
        with self.trainer.ema.applied():
            self.trainer.model.sample(self.drawn, num_steps=STEPS, solver="ddim", batch_size=self.drawn)

    def forward_macs(self) -> float:
        from osmose.analysis.cost import cost_of

        return cost_of(self.trainer.model, batch_size=2, repeats=1).macs


class Diffusers:
    """diffusers' UNet2DModel, schedulers and EMA, put together as in its train_unconditional example."""

    def __init__(self, case: dict[str, Any], precision: str, heads: int | None = None):
        import torch
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        sides = [case["shape"][1] // 2**level for level in range(len(case["mult"]))]
        attends = [side == case["attention"] for side in sides]
        self.model = UNet2DModel(
            sample_size=case["shape"][1], in_channels=case["shape"][0], out_channels=case["shape"][0],
            block_out_channels=tuple(case["base"] * m for m in case["mult"]), layers_per_block=2,
            attention_head_dim=heads, norm_num_groups=32,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        )  # fmt: skip
        self.torch, self.batch, self.drawn, self.shape = torch, case["batch"], case["drawn"], case["shape"]
        self.noise_scheduler, self.sampler = DDPMScheduler(1000), DDIMScheduler(1000)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        self.ema = EMAModel(self.model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.images = torch.randn(512, *case["shape"]).clamp(-1, 1)
        self.bf16 = precision == "bf16"
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def train(self) -> None:
        torch = self.torch
        clean = self.images[torch.randint(0, 512, (self.batch,))]
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (self.batch,))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            out = self.model(self.noise_scheduler.add_noise(clean, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(out.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        loss.item()

    def sample(self) -> None:
        torch = self.torch
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.sampler.set_timesteps(STEPS)
        x = torch.randn(self.drawn, *self.shape)
        with torch.no_grad():
            for t in self.sampler.timesteps:
                x = self.sampler.step(self.model(x, t).sample, t, x).prev_sample
        self.ema.restore(self.model.parameters())


def serve(library: str, case: str, precision: str) -> None:
    """A worker: does what it is told, one line in, one line of JSON out."""
    import torch

    torch.manual_seed(0)
    made: Any
    if library == "osmose":
        made = Osmose(CASES[case], precision)
    else:
        made = Diffusers(CASES[case], precision, heads=8 if library == "diffusers-default-heads" else None)
    print(json.dumps({"parameters": made.parameters}), flush=True)
    for line in sys.stdin:
        verb, count = line.split()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(count)):
            getattr(made, verb)()
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({**spent, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


class Worker:
    """A library at work in a process of its own."""

    def __init__(self, library: str, case: str, precision: str):
        command = [sys.executable, __file__, "--serve", library, "--case", case, "--precision", precision]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def do(self, verb: str, count: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{verb} {count}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def convolution_ceiling() -> float:
    """Best rate of a 3x3 convolution on one thread over a few well-shaped sizes, in Gop/s (2 per multiply-add)."""
    import torch

    torch.set_num_threads(1)
    best = 0.0
    for channels, side, batch in ((64, 32, 16), (128, 16, 32), (128, 32, 8), (256, 16, 16)):
        for layout in (torch.contiguous_format, torch.channels_last):
            conv = torch.nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=layout)
            x = torch.randn(batch, channels, side, side).to(memory_format=layout)
            with torch.inference_mode():
                conv(x)
                for _ in range(5):
                    start = time.process_time()
                    conv(x)
                    spent = time.process_time() - start
                    best = max(best, 2 * batch * side * side * channels * channels * 9 / spent / 1e9)
    return best


def sampler_overhead() -> list[dict[str, Any]]:
    """Microseconds per step beyond the network: the network is a function that returns its input."""
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    from osmose.gaussian.denoiser import Clipped, NetworkDenoiser
    from osmose.gaussian.draws import SampleDraws
    from osmose.gaussian.grid import TimeGrid
    from osmose.gaussian.parametrization import EpsParametrization
    from osmose.gaussian.schedule import LinearSchedule
    from osmose.gaussian.solvers import DDIM, Ancestral, DPMSolverPP2M

    class Empty(torch.nn.Module):
        def forward(self, x: Any, label: Any, condition: Any = None) -> Any:  # noqa: ARG002
            return x

    torch.set_num_threads(1)
    schedule, shape, steps = LinearSchedule(), (1, 1, 28, 28), 250
    # Both sides clip the estimate to the data's range, which is their default.
    denoiser = Clipped(NetworkDenoiser(Empty(), schedule, EpsParametrization()).eval(), -1.0, 1.0)
    grid = TimeGrid.of(schedule, steps)
    rows = []
    pairs = (
        ("ddim", DDIM(), DDIMScheduler(1000)),
        ("ancestral", Ancestral(), DDPMScheduler(1000)),
        ("dpmpp-2m", DPMSolverPP2M(), DPMSolverMultistepScheduler(1000)),
    )
    for name, solver, scheduler in pairs:
        ours, theirs = [], []
        for _ in range(7):
            draws = SampleDraws(0, 0, 1)
            x = torch.randn(shape)
            with torch.inference_mode():
                start = time.perf_counter()
                for state in solver.run(denoiser, x, grid, lambda draws=draws: draws.normal(shape[1:])):
                    x = state.x
                ours.append((time.perf_counter() - start) / steps * 1e6)
                scheduler.set_timesteps(steps)
                x = torch.randn(shape)
                start = time.perf_counter()
                for t in scheduler.timesteps:
                    x = scheduler.step(x, t, x).prev_sample
                theirs.append((time.perf_counter() - start) / steps * 1e6)
        rows.append({"solver": name, "osmose_us": min(ours), "diffusers_us": min(theirs)})
    return rows


def import_times() -> dict[str, float]:
    """Seconds of whole Python processes, the best of five."""
    commands = {
        "python": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "import osmose": ["-c", "import osmose"],
        "import osmose; osmose.load": ["-c", "import osmose; osmose.load"],
        "from diffusers import UNet2DModel": ["-c", "from diffusers import UNet2DModel"],
        "osmose --help": ["-m", "osmose", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(5):
        for name, arguments in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - start)
    return {name: min(spent) for name, spent in times.items()}


def side_by_side(case: str, precision: str, rounds: int) -> dict[str, Any]:
    """Train and sample in turns; medians of what each spent, and of the ratios round by round."""
    libraries = ["osmose", "diffusers"]
    if case == next(iter(CASES)):
        libraries.append("diffusers-default-heads")
    result: dict[str, Any] = {"case": case, "precision": precision, "rounds": rounds}
    for verb, items in (("train", CASES[case]["batch"]), ("sample", CASES[case]["drawn"])):
        # New processes for each verb: the peak memory of sampling is not that of the training before it.
        workers = {library: Worker(library, case, precision) for library in libraries}
        result["parameters"] = {library: worker.facts["parameters"] for library, worker in workers.items()}
        spent: dict[str, list[dict[str, float]]] = {library: [] for library in libraries}
        for worker in workers.values():
            worker.do(verb, 1)
        for _ in range(rounds if verb == "train" else max(1, rounds // 2)):
            for library, worker in workers.items():
                spent[library].append(worker.do(verb, 1))
        for library in libraries:
            for clock in ("cpu", "wall"):
                rates = [items / one[clock] for one in spent[library]]
                result[f"{verb}_{clock}_{library}"] = statistics.median(rates)
                ratios = [b[clock] / a[clock] for a, b in zip(spent["osmose"], spent[library], strict=True)]
                result[f"{verb}_{clock}_ratio_{library}"] = statistics.median(ratios)
            result[f"{verb}_peak_{library}"] = spent[library][-1]["peak"] / 2**20
        print(f"{case} {precision} {verb}: " + ", ".join(
            f"{library} {result[f'{verb}_cpu_{library}']:.2f}" for library in libraries), file=sys.stderr)  # fmt: skip
        for worker in workers.values():
            worker.close()
    return result


def processor() -> str:
    """The processor's own name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def macs(case: str) -> float:
    return Osmose(CASES[case], "fp32").forward_macs()


def profile(case: str, out: Path) -> None:
    """Where the time of one of our training steps goes, by operation."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    torch.set_num_threads(1)
    made = Osmose(CASES[case], "fp32")
    made.train()
    with recording(activities=[ProfilerActivity.CPU]) as recorded:
        made.train()
    table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"profile {case}.txt".replace(" ", "-")).write_text(table + "\n")
    print(table)


def heads(r: dict[str, Any], verb: str) -> str:
    rate = r.get(f"{verb}_cpu_diffusers-default-heads")
    return "- | -" if rate is None else f"{rate:.2f} | {r[f'{verb}_cpu_ratio_diffusers-default-heads']:.2f}"


def report(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        "# Speed and memory against diffusers",
        "",
        f"Command: `python benchmarks/speed.py`; {machine['processor']}, one thread, {machine['versions']}. "
        f"Convolution ceiling measured in the same run: {results['ceiling']:.0f} Gop/s in float32 on one core. "
        "bf16 is measured only where the processor computes in it "
        f"(here: {'yes' if results['bf16'] else 'no, so the bf16 goals cannot be measured on this machine'}).",
        "",
        "Images per CPU-second, medians over interleaved rounds; the ratio is the median of the rounds' own ratios. "
        "`one head` is the same network as ours; `default heads` is what UNet2DModel gives when attention_head_dim is "
        "left alone (8 channels a head, the same parameters); it is measured for the first case. Sampling draws "
        f"{', '.join(str(case['drawn']) for case in CASES.values())} images at a time.",
        "",
        "| case | precision | parameters | what | osmose | diffusers, one head | ratio | default heads | ratio "
        "| peak MiB ours / one head | share of ceiling |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results["cases"]:
        for verb in ("train", "sample"):
            passes = 3 if verb == "train" else STEPS
            share = 2 * passes * results["macs"][r["case"]] * r[f"{verb}_cpu_osmose"] / 1e9 / results["ceiling"]
            lines.append(
                f"| {r['case']} | {r['precision']} | {r['parameters']['osmose'] / 1e6:.2f} M | {verb} | "
                f"{r[f'{verb}_cpu_osmose']:.2f} | {r[f'{verb}_cpu_diffusers']:.2f} | "
                f"**{r[f'{verb}_cpu_ratio_diffusers']:.2f}** | {heads(r, verb)} | "
                f"{r[f'{verb}_peak_osmose']:.0f} / {r[f'{verb}_peak_diffusers']:.0f} | {share:.0%} |"
            )
    lines += ["", "| solver | osmose us/step | diffusers us/step |", "|---|---|---|"]
    lines += [f"| {o['solver']} | {o['osmose_us']:.0f} | {o['diffusers_us']:.0f} |" for o in results["overhead"]]
    lines += ["", "| process | seconds |", "|---|---|"]
    lines += [f"| {name} | {spent:.2f} |" for name, spent in results["imports"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="only profile one training step of --case")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.case, options.precision)
        return
    import torch

    from osmose.training.run import versions
    from osmose.training.trainer import computes_in_bf16

    if options.profile:
        profile(options.case or next(iter(CASES)), options.out)
        return
    names = [options.case] if options.case else list(CASES)
    precisions = ["fp32", "bf16"] if computes_in_bf16() else ["fp32"]
    results: dict[str, Any] = {
        "machine": {
            "processor": f"{processor()} ({torch.backends.cpu.get_cpu_capability()})",
            "versions": ", ".join(f"{k} {v}" for k, v in versions().items() if k != "machine"),
        },
        "bf16": computes_in_bf16(),
        "imports": import_times(),
        "overhead": sampler_overhead(),
        "ceiling": convolution_ceiling(),
        "macs": {name: macs(name) for name in names},
        "cases": [side_by_side(name, precision, options.rounds) for name in names for precision in precisions],
    }
    results["ceiling"] = max(results["ceiling"], convolution_ceiling())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "speed.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "speed.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
