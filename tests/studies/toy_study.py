"""A study of a second, with everything that a study can have; the tests turn its knobs."""

from typing import Any, ClassVar

from osmose.configuration import Entry
from osmose.studies import STUDIES
from osmose.studies.study import Cell, Claim, Row, Study
from osmose.studies.verdicts import lower, within

TINY = {"network": "mlp", "network.width": 16, "network.depth": 1, "training.batch_size": 8}
TOY = Entry("toy_study:Toy", "a toy")


class Toy(Study):
    """What the toy is about.

    A second paragraph, with a | in it.
    """

    title = "A toy"
    source = "nowhere, table 0"
    #: Knobs.
    steps: ClassVar[dict[str, int]] = {"short": 8, "long": 12}
    samples: ClassVar[int] = 6
    data: ClassVar[str] = "digits"
    extra: ClassVar[dict[str, Any]] = {}
    on_measure: ClassVar[Any] = None

    def seeds(self):
        return (0, 3)

    def cells(self):
        cells = [
            Cell(name, "ddpm", self.data, TINY | self.extra | {"training.steps": steps}, {"n": self.samples})
            for name, steps in self.steps.items()
        ]
        return [*cells, Cell("facts", None, "digits", note="only the data")]

    def measure(self, trained):
        if type(self).on_measure is not None:
            type(self).on_measure(trained)
        if trained.cell.method is None:
            return [Row({}, {"items": len(trained.dataset.train)})]
        n = trained.cell.settings["n"]
        samples = {steps: trained.model.sample(n, num_steps=steps, seed=trained.seed).data for steps in (1, 2)}
        return [Row({"steps": steps}, {"mean": float(x.mean()), "items": n}) for steps, x in samples.items()]

    def claims(self):
        return [
            Claim("short | is lower", ["short", "long"],
                  lambda r: lower(r.values("short", "mean", steps=2), r.values("long", "mean", steps=2))),
            Claim("there are 1617 digits", ["facts"], lambda r: within(r.values("facts", "items")[0], 1617, 1617)),
        ]  # fmt: skip

    def figures(self, results):
        from osmose.studies.plots import draw, panels

        figure, (axes,) = panels()
        draw(axes, [1, 2], [results.values("short", "mean", steps=steps) for steps in (1, 2)], "short")
        return {"a-figure": figure}


def register(monkeypatch, **knobs):
    """Make `toy` a study, with its knobs turned for one test."""
    monkeypatch.setitem(STUDIES.entries, "toy", TOY)
    for name, value in knobs.items():
        monkeypatch.setattr(Toy, name, value)
    return Toy
