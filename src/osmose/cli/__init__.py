"""The command line: one file per command; `osmose --help` imports none of them."""

from __future__ import annotations

#: Verb: where its command is, and what it does in one line.
COMMANDS = {
    "train": ("osmose.cli.train:Train", "train a model on data, or continue a run"),
    "train blocks": ("osmose.cli.blocks:TrainBlocks", "train a denoiser in blocks, each by itself on its own noise"),
    "blocks merge": ("osmose.cli.blocks:Merge", "put blocks together that were trained in several folders"),
    "sample": ("osmose.cli.sample:Sample", "draw samples from a run: a picture or an .npz"),
    "forecast": ("osmose.cli.forecast:Forecast", "draw what comes after a history: quantiles and a fan chart"),
    "impute": ("osmose.cli.impute:Impute", "fill the gaps of a table of series, with quantiles"),
    "complete": ("osmose.cli.complete:Complete", "draw whole items from scattered values of them"),
    "backtest": ("osmose.cli.backtest:Backtest", "score forecasts on the end of the data, beside simple ones"),
    "evaluate": ("osmose.cli.evaluate:Evaluate", "score a run's samples against real data"),
    "compare": ("osmose.cli.compare:Compare", "put runs side by side: a table and a Pareto plot"),
    "analyze likelihood": (
        "osmose.cli.likelihood:Likelihood",
        "bits per dimension of real data under a run's model",
    ),
    "analyze surrogate": (
        "osmose.cli.hand_over:HandOver",
        "score against speed for every time at which a surrogate enters a diffusion",
    ),
    "analyze conservativity": (
        "osmose.cli.conservativity:Conservativity",
        "how far a run's field is from the gradient of a density",
    ),
    "analyze dimension": (
        "osmose.cli.dimension:Dimension",
        "of how many dimensions the data are around a point, by a run's field",
    ),
    "analyze tangents": (
        "osmose.cli.tangents:Tangents",
        "how far a run is from a consistency model, angle by angle",
    ),
    "analyze cost": (
        "osmose.cli.cost:Cost",
        "what runs cost to hold, to run and to train: operations, bytes, seconds",
    ),
    "analyze landscape": (
        "osmose.cli.landscape:Landscape",
        "the loss around the weights of runs, on a plane through them",
    ),
    "distill tract": (
        "osmose.cli.distill:Tract",
        "teach a run to sample in a few steps, in few phases of any length",
    ),
    "distill btd": ("osmose.cli.distill:BTD", "teach a run to sample in a few steps, halving them phase by phase"),
    "trajectories": (
        "osmose.cli.trajectories:Trajectories",
        "store the paths of a run from noise to data, to learn from",
    ),
    "distill scd": ("osmose.cli.distill:SCD", "teach a run to sample in 1 or 2 steps: a consistency model of its flow"),
    "distill dsno": ("osmose.cli.distill:DSNO", "teach a run to give whole trajectories in one call"),
    "quantize": (
        "osmose.cli.quantize:Quantize",
        "make a run compute in 8-bit integers or bf16, all of it or most steps",
    ),
    "surrogate": ("osmose.cli.surrogate:Surrogate", "let a diffusion finish the rough samples of something cheap"),
    "export": ("osmose.cli.export:Export", "write a run for diffusers, ONNX or OpenVINO"),
    "import diffusers": ("osmose.cli.export:ImportDiffusers", "make a run of a folder of diffusers"),
    "study": ("osmose.cli.study:Study", "run a table or figure of a paper again, and check its claims"),
    "verdicts": ("osmose.cli.verdicts:Verdicts", "all claims of finished studies on one page"),
    "info": ("osmose.cli.info:Info", "describe a run, a network or a data set"),
}
