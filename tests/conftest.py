"""What tests share: one thread, figures as they stand, and runs of the digits with weights of chance."""

import pytest
import torch
from matplotlib.figure import Figure

from osmose.data.dataset import DataConfig
from osmose.training.recipes import recipe
from osmose.training.run import Run
from osmose.training.trainer import built

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _figures_as_they_stand(monkeypatch):
    """Arranging a figure takes longer than drawing it, and is for eyes to judge."""
    save = Figure.savefig

    def plain(self, *args, **kwargs):
        self.set_layout_engine("none")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", plain)


@pytest.fixture(scope="session")
def made():
    """Makes a run: its folder, its method, and changes of the recipe."""

    def make(folder, method, changes):
        digits = DataConfig(source="digits")
        run = Run.create(folder, recipe(method, digits, digits.load(), 0, changes))
        model, generator = built(run.config), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        run.write_weights(model.state_dict())
        return run

    return make
