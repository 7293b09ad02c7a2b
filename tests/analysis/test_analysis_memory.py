"""Bytes are counted to the last one, on functions and on training steps that can be counted by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from osmose.analysis.budget import evaluation_peak, formula_of
from osmose.analysis.cost import macs_of
from osmose.analysis.memory import bytes_of, peak_bytes
from osmose.analysis.training_memory import training_memory
from osmose.data.dataset import DataSpec
from osmose.gaussian.draws import StepDraws
from osmose.methods import METHODS
from osmose.methods.base import GenerativeModel, MethodConfig
from osmose.methods.messages import Batch, LossTerms
from osmose.training.config import TrainingConfig
from osmose.training.optimizers import OPTIMIZERS

N = 1000
MLP = {"kind": "mlp", "width": 16, "depth": 2, "dropout": 0.5}
UNET = {"kind": "unet", "channels": 8, "mult": [1, 2], "blocks": 1, "attention": [4]}


def model_of(network, shape, method="ddpm", **values):
    spec = DataSpec(kind="image" if len(shape) == 3 else "points", shape=shape, num_classes=3)
    given = {"network": network} if network else {}
    return METHODS.resolve(method).parse({**given, **values}).build(spec)


# --- functions ------------------------------------------------------------------------------------------------------


def test_a_chain_holds_two_links():
    x = torch.ones(N)
    with peak_bytes() as memory:
        for _ in range(5):
            x = x + 1
    assert memory.peak == 2 * 4 * N  # the new one and the one that it is made from; the first was there before
    assert memory.live == 4 * N
    del x
    assert memory.live == 0
    assert memory.peak == 2 * 4 * N


def test_what_is_kept_adds_up():
    with peak_bytes() as memory:
        kept = [torch.ones(N, dtype=dtype) for dtype in (torch.float64, torch.bool, torch.bfloat16)]
    assert memory.live == memory.peak == (8 + 1 + 2) * N
    with peak_bytes() as memory:
        kept.pop(0)  # nothing of this one's
        torch.ones(N)
    assert (memory.live, memory.peak) == (0, 4 * N)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x.view(10, -1).t(),
        lambda x: x[3:].split(100),
        lambda x: x.zero_().mul_(2).unsqueeze(0).expand(50, -1),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch._foreach_add_([x, x[:0]], 1),
        lambda x: x.detach(),
    ],
    ids=["in place", "view", "parts", "expand", "out", "foreach", "detach"],
)
def test_nothing_new(change):
    x = torch.ones(N)
    with peak_bytes() as memory:
        told = change(x)
    assert (memory.live, memory.peak) == (0, 0)
    with peak_bytes() as memory:  # and of what is new, nothing counts twice
        told = change(torch.ones(N))
        assert memory.live == (4 * N if told is not None else 0)
    assert memory.peak == 4 * N


def test_a_view_keeps_all_of_its_storage():
    with peak_bytes() as memory:
        part = torch.ones(N)[:1]
        assert memory.live == 4 * N
        part = part.clone()
        assert memory.live == 4
    assert memory.peak == 4 * N + 4


def test_python_values_and_growth():
    with peak_bytes() as memory:
        x = torch.tensor([1.0, 2.0])
        assert memory.live == 8
        x.resize_(N)
        assert memory.live == memory.peak == 4 * N
        x = None
        assert memory.live == 0


def test_backward_and_what_waits_for_it():
    x, w = torch.randn(N), torch.randn(N, requires_grad=True)
    with peak_bytes() as memory:
        y = (x * w).exp().sum()  # exp keeps its result, and the product keeps x and w, which were there
        assert memory.live == 4 * N + 4
        assert memory.peak == 2 * 4 * N
        y.backward()
        # At the peak of the way back: y, its gradient, exp's result, and the gradient of its argument.
        assert memory.peak == 2 * 4 * N + 2 * 4
        assert memory.live == 4 * N + 4  # y, and the gradient of w
        w.grad = None
        assert memory.live == 4
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("without_gradient", [torch.no_grad, torch.inference_mode])
def test_whole_functions_are_taken_apart(without_gradient):
    x = torch.ones(6, 10)
    with without_gradient(), peak_bytes() as memory:
        told = F.layer_norm(x, (10,))  # has a mean and a deviation for each row on the way
        assert memory.live == bytes_of(told) == 4 * 60
    assert memory.peak == 4 * 60 + 2 * 4 * 6


def test_inside_each_other():
    with peak_bytes() as outer:
        x = torch.ones(N)
        with peak_bytes() as inner:
            y = x + 1
        del y
        assert (inner.live, inner.peak) == (0, 4 * N)
    assert (outer.live, outer.peak) == (4 * N, 2 * 4 * N)


def test_over_when_it_is_over():
    with pytest.raises(ZeroDivisionError), peak_bytes() as memory:
        1 / 0  # noqa: B018
    kept = torch.ones(N)
    assert (memory.live, memory.peak) == (0, 0)
    assert len(kept) == N


def test_bytes_of_what_is_shared():
    x = torch.ones(N)
    assert bytes_of([x, {"part": x[:3]}, (x.t(), None, 3)]) == 4 * N
    assert bytes_of([x, x.double()]) == 12 * N
    assert bytes_of([]) == 0


# --- a model that is counted by hand --------------------------------------------------------------------------------


class Stack(GenerativeModel):
    """Linear layers of D x D without bias; the loss of an item is the mean square of what they make of it."""

    def __init__(self, D, layers, config=None):
        super().__init__(config or _Config(), DataSpec(kind="points", shape=(D,)))
        self.layers = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(layers)))

    def networks(self):
        return [self.layers]

    def probe(self, items):
        self.layers(torch.ones(items, *self.spec.shape))

    def loss(self, batch, draws):  # noqa: ARG002
        return LossTerms(self.layers(batch.x0).square().mean(1))

    def generate(self, draws, sampling, condition, on_step):
        raise NotImplementedError


class _Config(MethodConfig):
    kind: str = "stack"

    @classmethod
    def recipe(cls, spec, data_std):  # noqa: ARG003
        return {}

    def build(self, spec):
        return Stack(spec.shape[0], 1)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_operations_of_linear_layers(layers):
    D = 12
    model = Stack(D, layers)
    told = training_memory(model, TrainingConfig(batch_size=6, accumulate=2))
    assert macs_of(model) == layers * D**2
    # Forward once, backward twice: weights and inputs, but the input of the first layer needs no gradient.
    assert told.macs == (3 * layers - 1) * D**2


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("B", [1, 7])
def test_bytes_of_linear_layers(layers, B):
    D = 32
    told = training_memory(Stack(D, layers), TrainingConfig(batch_size=B))
    one, table = 4 * D * D, 4 * B * D
    assert (told.trained, told.tensors) == (layers * D * D, layers)
    assert told.parameters == told.gradients == told.average == layers * one
    assert told.optimizer == 2 * layers * one + 4 * layers
    assert (told.buffers, told.teacher) == (0, 0)
    assert told.activations == layers * table + 4 * B  # what each layer returns, and the loss of each item
    assert told.held == 4 * layers * one + 4 * layers
    assert told.peak == told.held + told.step
    assert evaluation_peak(Stack(D, layers), B) == min(3, layers + 1) * table  # a layer's input and its output


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_peak_of_a_step_of_linear_layers(layers, passes):
    D, B = 64, 2  # the weights are what counts
    told = training_memory(Stack(D, layers), TrainingConfig(batch_size=passes * B, accumulate=passes, clip_grad=None))
    one, table, losses = 4 * D * D, 4 * B * D, 4 * B
    if passes == 1:
        # In the first layer, the last to be reached: the batch, and the gradient of what the layer returned.
        most = layers * one + 2 * table + losses
    else:
        # In the last layer, where all gradients of the passes before meet a new one: all batches, the results of the
        # other layers, the gradients of what the layer returned and (but for the first) got, the losses of two passes.
        most = (layers + 1) * one + (passes + layers - 1 + min(layers, 2)) * table + 2 * losses
    assert told.step == most + 2 * 4  # and the mean of the losses, and its gradient


def test_evaluation_peak_leaves_the_model_as_it_is():
    model = Stack(8, 1).train()
    evaluation_peak(model, 3)
    formula_of(model, "macs")
    assert model.training
    assert not model.layers._forward_hooks


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [MLP, UNET], ids=["mlp", "unet"])
def test_state_is_as_the_formulas_say(network):
    model = model_of(network, (1, 8, 8) if network is UNET else (2,), conditional=True)
    sizes = [parameter.numel() for parameter in model.parameters()]
    told = training_memory(model, TrainingConfig(batch_size=4))
    assert told.trained == sum(sizes)
    assert told.parameters == told.gradients == told.average == 4 * sum(sizes)
    assert told.optimizer == sum(2 * 4 * size + 4 for size in sizes)  # two moments, and the step
    assert told.formula() == {name: getattr(told, name) for name in ("gradients", "optimizer", "average")}


@pytest.mark.parametrize("network", [MLP, UNET], ids=["mlp", "unet"])
def test_activations_are_in_proportion_to_the_batch(network):
    shape = (1, 8, 8) if network is UNET else (2,)
    model = model_of(network, shape)
    told = {B: training_memory(model, TrainingConfig(batch_size=B)) for B in (4, 8, 12)}
    first, second, third = (told[B].activations for B in (4, 8, 12))
    assert third - second == second - first
    assert 0 <= 2 * first - second < 0.05 * first  # what does not depend on the batch is little
    assert told[4].step < told[8].step < told[12].step
    assert told[4].macs == told[12].macs
    assert told[4].held == told[12].held


def test_accumulation_saves_activations():
    model = model_of(UNET, (1, 8, 8))
    whole, half, own = (
        training_memory(model, TrainingConfig(batch_size=B, accumulate=passes))
        for B, passes in ((16, 1), (16, 2), (8, 1))
    )
    assert (half.batch_size, half.items) == (16, 8)
    assert half.activations == own.activations
    assert half.activations == pytest.approx(whole.activations / 2, rel=0.02)
    assert half.step < whole.step
    assert half.step > own.step  # the gradients of the first pass are there in the second
    assert half.macs == whole.macs


def saved_by_the_graph(model, items):
    """Bytes that are alive after a forward pass, those that the graph has saved, and those that were returned."""
    model = copy.deepcopy(model).train()
    batch = Batch(torch.randn(items, *model.spec.shape))
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), batch.x0)}
    saved = []

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in own:
            saved.append(tensor.detach())
        return tensor

    with peak_bytes() as memory, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        before = memory.live
        terms = model.loss(batch, StepDraws(0, 0, 0, items, items))
        live = memory.live - before
    returned = [terms.per_item, terms.t, *terms.parts.values()]
    return live, bytes_of(saved), bytes_of(returned), bytes_of([saved, returned])


@pytest.mark.parametrize("network", [MLP, UNET], ids=["mlp", "unet"])
def test_activations_are_what_the_graph_has_saved(network):
    model = model_of(network, (1, 8, 8) if network is UNET else (2,))
    live, saved, returned, together = saved_by_the_graph(model, 8)
    assert saved > 10 * returned
    assert live == together
    assert training_memory(model, TrainingConfig(batch_size=8)).activations == live


@pytest.mark.parametrize("optimizer", ["adam", "riemannian", "als"])
def test_optimizers_of_tensor_trains(optimizer):
    model = model_of({"kind": "tensor-train", "rank": 3, "degree": 5}, (2,))
    values = OPTIMIZERS.resolve(optimizer).training_recipe()
    told = training_memory(model, TrainingConfig.parse({"batch_size": 64, "optimizer": optimizer, **values}))
    assert told.method == optimizer
    assert (told.gradients == 0) == (optimizer == "als")  # it solves equations instead
    assert bool(told.formula()) == (optimizer == "adam")
    assert told.macs > 0
    assert formula_of(model, "macs") == macs_of(model)


def test_half_precision_keeps_less():
    model = model_of({**MLP, "width": 64}, (2,))
    single, half = (training_memory(model, TrainingConfig(batch_size=512, precision=p)) for p in ("fp32", "bf16"))
    assert (single.precision, half.precision) == ("fp32", "bf16")
    assert half.activations < 0.9 * single.activations
    assert half.optimizer == single.optimizer


def test_a_model_that_teaches_in_turn_is_measured_through_a_round():
    def told(critic_steps):
        model = model_of(None, (1, 8, 8), "sngan", channels=8, latent=4, critic_steps=critic_steps)
        return training_memory(model, TrainingConfig(batch_size=4)), model

    both, model = told(1)
    critic, _ = told(1000)  # the generator's turn never comes
    third, _ = told(3)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert both.gradients == third.gradients == 4 * sum(sizes)
    assert both.optimizer == third.optimizer == sum(8 * size + 4 for size in sizes)
    own = [parameter.numel() for parameter in model.critic.parameters()]
    assert (critic.gradients, critic.optimizer) == (4 * sum(own), sum(8 * size + 4 for size in own))
    assert third.macs == pytest.approx((2 * critic.macs + both.macs) / 3)
    assert third.buffers == bytes_of(list(model.buffers())) > 0
    assert critic.step < both.step == third.step


@pytest.mark.parametrize("training", [False, True])
def test_nothing_measured_is_changed(training):
    model = model_of(MLP, (2,)).train(training)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    first, second = (training_memory(model, TrainingConfig(batch_size=4, accumulate=2)) for _ in range(2))
    assert first == second
    assert model.training is training
    assert all(value.grad is None for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_to_train():
    assert training_memory(model_of(None, (2,), "gaussian"), TrainingConfig(batch_size=4)) is None
    assert training_memory(Stack(4, 1).requires_grad_(False), TrainingConfig(batch_size=4)) is None


def test_formulas_are_those_of_the_networks_that_run():
    class Knows(nn.Linear):
        def macs(self):
            return self.weight.numel()

    class Two(Stack):
        def networks(self):
            return [self.layers, self.other]

        def probe(self, items):
            for network in self.used:
                network(torch.ones(items, *self.spec.shape))

    model = Two(4, 1)
    model.layers, model.other = Knows(4, 4, bias=False), nn.Linear(4, 4)
    model.used = [model.layers]
    assert formula_of(model, "macs") == macs_of(model) == 16  # what does not run need not know
    model.used = [model.layers, model.layers]
    assert formula_of(model, "macs") == macs_of(model) == 32
    model.used = [model.layers, model.other]
    assert formula_of(model, "macs") is None
    model.used = []
    assert formula_of(model, "macs") is None
    model.used = [model.layers]
    assert formula_of(model, "elementwise") is None
