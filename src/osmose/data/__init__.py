"""Data sets: where they come from, what they are, how they are split. Nothing here knows of models."""

from __future__ import annotations

from osmose.configuration import Registry

#: `--data NAME` or `--data NAME:ARGUMENT`: the loader of each source, imported only when it is asked for.
SOURCES = Registry(
    "data set",
    {
        "digits": ("osmose.data.embedded:load_digits", "scikit-learn's 1,797 handwritten digits, 8x8, 17 grey levels"),
        "toy": (
            "osmose.data.toy:load_toy",
            "toy:NAME, points in the plane drawn from a known law; toy:gaussian:D, product:D, chain:D[:P] or mixture:D "
            "in D dimensions; toy:plane:K:D, sphere:K:D, torus:K:D, strata:D on manifolds of K",
        ),
        "mnist": ("osmose.data.idx:load_mnist", "MNIST from its idx files under --data-root"),
        "fashion-mnist": ("osmose.data.idx:load_fashion_mnist", "Fashion-MNIST from its idx files under --data-root"),
        "idx": ("osmose.data.idx:load_idx", "idx:FOLDER, any data set stored as MNIST's four idx files"),
        "cifar10": ("osmose.data.cifar:load_cifar10", "CIFAR-10 from its binary version or an npz under --data-root"),
        "folder": ("osmose.data.folder:load_folder", "folder:PATH, a folder of PNG and JPEG images"),
        "npz": ("osmose.data.arrays:load_npz", "npz:PATH, images or points in a NumPy archive"),
        "csv": ("osmose.data.arrays:load_csv", "csv:PATH, points, one row each, with a header line"),
        "counts": ("osmose.data.arrays:load_counts", "counts:PATH, whole numbers from 0 on, a .csv or an .npz"),
        "series": (
            "osmose.data.series_sources:load_series",
            "series:PATH, time series with gaps, a .csv with a time in each row or an .npz",
        ),
        "etth1": (
            "osmose.data.series_sources:load_etth1",
            "hourly loads of a transformer, from ETTh1.csv.gz under --data-root",
        ),
        "fx-8": (
            "osmose.data.series_sources:load_fx8",
            "eight exchange rates, the Fed's H.10 file under --data-root",
        ),
        "process": (
            "osmose.data.processes:load_process",
            "process:NAME, simulated series at irregular times: ou, sine, cir, lorenz, predator-prey, sink",
        ),
        "text": (
            "osmose.data.text:load_text",
            "text:FILE, characters of a text; text:python, the reference of the Python language",
        ),
        "hub": ("osmose.data.hub:load_hub", "hub:NAME, a Hugging Face image data set (needs osmose[hub])"),
    },
)
