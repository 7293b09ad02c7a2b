"""Studies: the tables and figures of papers as reruns, one short file each."""

from __future__ import annotations

from osmose.configuration import Registry

#: `osmose study NAME`; each entry is a `Study`.
STUDIES = Registry(
    "study",
    {
        "train-steps": (
            "osmose.studies.train_steps:TrainSteps",
            "how the score falls with longer training",
        ),
        "short-chain": ("osmose.studies.short_chain:ShortChain", "is a chain of 100 steps bad, or only its variance?"),
        "architectures": (
            "osmose.studies.architectures:Architectures",
            "six UNets: parameters, operations, speed, loss at equal steps and time",
        ),
        "objectives": (
            "osmose.studies.objectives:Objectives",
            "importance sampling of t and importance-weighted noises, with controls",
        ),
        "surrogate": (
            "osmose.studies.surrogate:SurrogateStudy",
            "a chain entered in the middle with rough samples: speed against score",
        ),
        "tract": (
            "osmose.studies.tract:Tract",
            "a thousand steps distilled into one: TRACT in two phases against halving, at equal updates",
        ),
        "tract-phases": ("osmose.studies.tract_phases:TractPhases", "in how many phases a distillation is best cut"),
        "tract-ema": ("osmose.studies.tract_ema:TractEMA", "how long the two averages of a TRACT student should be"),
        "few-step": (
            "osmose.studies.few_step:FewStep",
            "one, two or four steps by every way there is: consistency models, distillation, a neural operator",
        ),
        "scm-ablation": (
            "osmose.studies.scm_ablation:SCMAblation",
            "which of the things that stabilise a consistency model matter",
        ),
        "dsno-ablation": (
            "osmose.studies.dsno_ablation:DSNOAblation",
            "a whole trajectory in one call: with layers along time and without, at 1 to 8 times",
        ),
        "tensor-train": (
            "osmose.studies.tensor_train:TensorTrainStudy",
            "tensor-train noise models against networks: error, memory, time, convergence, landscapes, by distribution",
        ),
        "blackout": (
            "osmose.studies.blackout:BlackoutStudy",
            "counts that stay counts: how units are given back, and Gaussian diffusion that is rounded",
        ),
        "interpolants": (
            "osmose.studies.interpolants:Interpolants",
            "from any law to any other: ODE and SDEs, few steps, the Schroedinger bridge",
        ),
        "series-synthetic": (
            "osmose.studies.series_synthetic:SeriesSynthetic",
            "noise correlated in time against white noise, on simulated series at irregular times",
        ),
        "series-forecast": (
            "osmose.studies.series_forecast:SeriesForecast",
            "forecasts of real series against simple ones and those of other libraries",
        ),
        "series-imputation": (
            "osmose.studies.series_imputation:SeriesImputation",
            "gaps of real series filled by diffusion, straight lines and Gaussian processes",
        ),
        "functional": (
            "osmose.studies.functional:FunctionalStudy",
            "diffusion of functions: parameters against score, other resolutions, noise that has a limit",
        ),
        "gauge": (
            "osmose.studies.gauge:Gauge",
            "free and conservative scores: samples, densities, dimension; a planted rotation",
        ),
        "dimension": (
            "osmose.studies.dimension:DimensionStudy",
            "local dimension by eight estimators, where it is known, and of images",
        ),
        "likelihood": (
            "osmose.studies.likelihood:LikelihoodStudy",
            "densities by the ODE against known ones, the bound, and other data",
        ),
        "quantize": (
            "osmose.studies.quantize:QuantizeStudy",
            "8 and 6 bits on a CPU: score, deviation, size, speed in every runtime",
        ),
        "compose": (
            "osmose.studies.compose:Compose",
            "two accelerations at once: TRACT and int8, a surrogate and int8, blocks and DPM-Solver++",
        ),
        "blocks": (
            "osmose.studies.blocks:BlocksStudy",
            "a denoiser in blocks that are trained apart, against training from end to end",
        ),
        "vlb": ("osmose.studies.vlb:VLB", "the likelihood bound as the loss: gradient noise, bits, samples"),
    },
)
