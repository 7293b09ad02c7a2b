"""Text: its data and scores, masked diffusion, diffusion of embeddings from left to right, and both in blocks."""

import math

import pytest
import torch
from torch.nn import functional as F

from osmose.acceleration.blocks import Blocks
from osmose.acceleration.blocks_plan import BlocksPlan
from osmose.analysis.likelihood import likelihood
from osmose.configuration import ConfigError
from osmose.data.dataset import DataConfig, DataSpec
from osmose.data.text import python_reference, texts
from osmose.errors import UserError
from osmose.gaussian.draws import SampleDraws, StepDraws
from osmose.methods.masked import CosineMasking, LinearMasking, MaskedConfig, _drawn
from osmose.methods.messages import Batch
from osmose.methods.token_diffusion import TokenDiffusionConfig
from osmose.metrics.evaluate import score_samples
from osmose.metrics.text import ngram_distance
from osmose.networks import NETWORKS
from osmose.training.recipes import recipe
from osmose.training.trainer import Trainer, built

SPEC = DataSpec(kind="text", shape=(6,), range=(0, 3), levels=4, alphabet="abcd")
SMALL = {"width": 16, "depth": 2, "heads": 2}
MASKED = MaskedConfig.parse({"network": {"kind": "text", **SMALL}, "sampling": {"num_steps": 5}})
TOKENS = TokenDiffusionConfig.parse({"network": {"kind": "causal-text", **SMALL}, "dimension": 8})


def random_(model, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def built_of(config):
    torch.manual_seed(0)
    return random_(config.build(SPEC))


# ------------------------------------------------------------------------------------------------------------ the data


def test_windows_of_a_file_and_back(tmp_path):
    text = "to be, or not to be: that is the question. " * 9
    path = tmp_path / "hamlet.txt"
    path.write_text(text)
    data = DataConfig(source=f"text:{path}", window=16).load()
    assert data.source == "text:hamlet.txt"
    assert data.spec.alphabet == "".join(sorted(set(text)))
    assert data.spec.shape == (16,)
    assert "".join(texts(data.train, data.spec)) == text[: 16 * len(data.train)]
    cut = len(text) - round(0.1 * len(text))
    assert texts(data.held_out, data.spec)[0] == text[cut : cut + 16]  # the end is held out
    assert torch.equal(data.spec.to_levels(data.spec.encode(data.train)), data.train.long())
    letters = DataConfig(source=f"text:{path}", window=16, letters=True).load()
    assert set(letters.spec.alphabet) <= set("abcdefghijklmnopqrstuvwxyz ")
    assert letters.identity.sha256 != data.identity.sha256
    path.write_bytes(b"\xef\xbb\xbf" + b"a\x00b" * 99)  # a mark at the beginning, and zeros
    zeros = DataConfig(source=f"text:{path}", window=6).load()
    assert (zeros.spec.alphabet, texts(zeros.train, zeros.spec)[0]) == ("\x00ab", "a\x00ba\x00b")
    path.write_text(text)
    halves = DataConfig(source=f"text:{path}", window=16, stride=8).load()
    assert torch.equal(halves.train[1, :8], halves.train[0, 8:])


def test_the_reference_of_python_is_a_corpus():
    text = python_reference()
    assert len(text) > 300_000
    data = DataConfig(source="text:python").load()
    assert texts(data.train[:2], data.spec) == [text[:128], text[128:256]]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"\xff\xfe", {}, "byte 0 is not UTF-8"),
        ("".join(map(chr, range(100, 400))) * 9, {}, "300 different characters; at most 256"),
        ("abc", {}, "3 characters, 3 of them different, make 0 training and 0 held-out windows of 128"),
        ("a" * 999, {"window": 8}, "1 of them different"),
    ],
)
def test_texts_that_are_refused(tmp_path, content, options, said):
    path = tmp_path / "x.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        DataConfig(source=f"text:{path}", **options).load()
    with pytest.raises(UserError, match="letters: True is for text: data"):
        DataConfig(source="digits", letters=True).load()


def test_alphabets_are_of_text_alone():
    with pytest.raises(ValueError, match="text, and it alone, has an alphabet"):
        DataSpec(kind="text", shape=(6,), range=(0, 3), levels=4, alphabet="abc")
    with pytest.raises(ValueError, match="text, and it alone, has an alphabet"):
        DataSpec(kind="points", shape=(6,), alphabet="abc")


def test_scores_of_text():
    assert ngram_distance(torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 1, 0, 1]]), 2).value == 0
    assert ngram_distance(torch.tensor([[0, 0, 0]]), torch.tensor([[1, 1, 1]]), 2).value == 1
    # 01, 10, 01 against 01, 11, 11: 2/3 of one, 1/3 of the other is 01.
    assert ngram_distance(torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 1, 1, 1]]), 2).value == pytest.approx(2 / 3)
    data = DataConfig(source="text:python", window=32, letters=True).load()
    noise = torch.randint(0, 27, (200, 32), generator=torch.Generator().manual_seed(0))
    bad = {s.name: s for s in score_samples(noise, data)}
    good = {s.name: s for s in score_samples(data.held_out[:200], data)}
    assert set(bad) == {"bigram_tv", "trigram_tv", "known_words"}
    for name in ("bigram_tv", "trigram_tv"):
        assert bad[name].value > 1.5 * good[name].value
        assert good[name].floor < good[name].value  # the end of a text is not like all of it
    assert bad["known_words"].value < 0.2 < good["known_words"].value


# ------------------------------------------------------------------------------------------------------------ networks


def test_a_causal_network_sees_what_came_before_and_its_own_noise():
    torch.manual_seed(0)
    network = random_(NETWORKS.parse({"kind": "causal-text", **SMALL}).build((6, 1 + 8), num_outputs=4))
    x, label = torch.randn(1, 6, 9), torch.tensor([100.0])
    x[..., 0] = torch.randint(0, 4, (1, 6)).float()
    base = network(x, label)
    assert base.shape == (1, 4, 6)
    for place in range(6):
        other = x.clone()
        other[0, place, 0] = (x[0, place, 0] + 1) % 4
        changed = (network(other, label) - base).abs().amax(1)[0] > 1e-7
        assert changed.tolist() == [later > place for later in range(6)]  # a character is told to later ones
        other = x.clone()
        other[0, place, 1:] += 1
        changed = (network(other, label) - base).abs().amax(1)[0] > 1e-7
        assert changed.tolist() == [here == place for here in range(6)]  # noise to its own place alone


def test_an_untrained_network_knows_nothing():
    torch.manual_seed(0)
    x0 = torch.randint(0, 4, (8, 6)).float()
    for config in (MASKED, TOKENS):
        model = config.build(SPEC).eval()
        terms = model.loss(Batch(x0), StepDraws(0, 0, 0, 8, 8))
        if config is TOKENS:
            assert torch.allclose(terms.per_item, torch.full((8,), math.log(4)))
        else:  # of masks, over the share that is expected
            assert (terms.per_item / math.log(4) * 6 * (1 - LinearMasking().alpha(terms.t))).round(
                decimals=4
            ).frac().abs().max() < 1e-3


# -------------------------------------------------------------------------------------------------------------- masked


@pytest.mark.parametrize("schedule", [LinearMasking(), CosineMasking()])
def test_schedules_fall_and_have_inverses(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert alpha[0] == 1
    assert alpha[-1] == pytest.approx(0, abs=1e-12)
    assert bool((alpha.diff() < 0).all())
    torch.testing.assert_close(schedule.time(alpha), t, rtol=0, atol=1e-6)


def test_symbols_are_drawn_as_often_as_they_are_likely():
    log_p = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()[None, :, None].expand(1, 4, 100_000)
    u = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0))
    counts = _drawn(log_p, u)[0].bincount(minlength=4) / 100_000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.005)


def test_the_bound_is_the_entropy_where_the_network_is_right():
    """Independent characters of known frequencies: no step says more than another, and the bound is exact."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    model = MASKED.build(SPEC).eval()

    class Right(torch.nn.Module):
        def forward(self, x, *_):
            return p.log()[None, :, None].expand(len(x), 4, x.shape[1])

    model.network = Right()
    model.register_parameter("some", torch.nn.Parameter(torch.zeros(1)))  # a model has a device by its parameters
    x0 = torch.multinomial(p.expand(4000, 4), 6, replacement=True, generator=torch.Generator().manual_seed(0)).float()
    found = -p.log()[x0.long()].mean(1)
    bound = model.bound(Batch(x0), SampleDraws(0, 0, 4000), lambda *_: None, num_steps=12)
    per_item = bound.steps.sum(1)
    assert float(per_item.mean()) == pytest.approx(float(found.mean()), rel=0.01)
    losses = torch.cat([model.loss(Batch(x0), StepDraws(0, k, 0, 4000, 4000)).per_item for k in range(8)])
    assert float(losses.mean()) == pytest.approx(float(found.mean()), rel=0.02)  # and so is the loss


def test_samples_are_text_and_gaps_are_filled():
    model = built_of(MASKED)
    samples = model.sample(5, seed=1)
    assert samples.nfe == 5
    assert set(samples.data.flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert torch.equal(model.sample(2, seed=1).data, samples.data[:2])  # whatever the batch
    assert torch.equal(model.sample(5, seed=1, batch_size=2).data, samples.data)
    known = torch.tensor([[0.0, torch.nan, 2.0, torch.nan, 1.0, 3.0]]).repeat(3, 1)
    filled = model.sample(3, seed=2, known=known).data
    there = ~known.isnan()
    assert torch.equal(filled[there], known[there])


def test_a_run_of_text_is_trained_and_bounded(tmp_path):
    from osmose.training.run import Run

    data = DataConfig(source="text:python", window=16, letters=True)
    dataset = data.load()
    changes = {f"network.{name}": value for name, value in SMALL.items()}
    changes |= {"training.steps": 25, "training.batch_size": 16, "training.validation_items": 32}
    run = Run.create(tmp_path / "run", recipe("masked", data, dataset, 0, changes))
    assert Trainer(run, dataset).fit()
    found = likelihood(run.model(), dataset, n=40, num_steps=16)
    assert 3.0 < found.bits < math.log2(27) + 0.3
    with pytest.raises(UserError, match="variance: masked has none to choose"):
        likelihood(run.model(), dataset, n=4, variance="fixed_small")


# --------------------------------------------------------------------------------------------------- from left to right


def test_characters_are_points_of_one_table_and_the_chain_ends_at_one():
    model = built_of(TOKENS)
    torch.testing.assert_close(model.table.norm(dim=1), torch.ones(4))
    assert torch.equal(model.table, built_of(TOKENS).table)  # the same for all who speak of it
    samples = model.sample(3, seed=0)
    assert samples.nfe == 6 * 4
    assert torch.equal(model.sample(1, seed=0).data, samples.data[:1])
    known = torch.tensor([[0.0, 1.0, torch.nan, torch.nan, 1.0, 3.0]])
    filled = model.sample(1, seed=2, known=known)
    assert filled.nfe == 2 * 4
    many = torch.cat([known, torch.full((1, 6), torch.nan)])  # what is missing in others changes nothing
    assert torch.equal(model.sample(2, seed=2, known=many).data[:1], filled.data)
    assert torch.equal(filled.data[0, [0, 1, 4, 5]], known[0, [0, 1, 4, 5]])

    class Sure(torch.nn.Module):
        """Answers that the character is the one after that before."""

        def forward(self, x, *_):
            before = F.pad(x[:, :-1, 0].long(), (1, 0), value=-1)
            return 50 * F.one_hot((before + 1) % 4, 4).float().mT

    model.network = Sure()
    model.register_parameter("some", torch.nn.Parameter(torch.zeros(1)))
    assert model.sample(2, seed=5).data.tolist() == [[0, 1, 2, 3, 0, 1]] * 2


def test_without_noise_the_character_is_seen():
    """A network that reads z alone names the nearest point of the table: at small noise the right one."""
    model = built_of(TOKENS)

    class Nearest(torch.nn.Module):
        def forward(self, x, *_):
            return 100 * (F.normalize(x[..., 1:], dim=-1) @ model.table.T).mT

    model.network = Nearest()
    codes = torch.randint(0, 4, (50, 6), generator=torch.Generator().manual_seed(0))
    for sigma, least, most in ((0.05, 0.99, 1.0), (50.0, 0.0, 0.5)):
        level = model.config.schedule.level(
            model.config.schedule.time_of(torch.tensor([-2 * math.log(sigma)]).double())
        )
        z = model.table[codes] + sigma * torch.randn(50, 6, 8, generator=torch.Generator().manual_seed(1))
        right = (model.logits(codes, z, level).argmax(1) == codes).float().mean()
        assert least <= float(right) <= most


# -------------------------------------------------------------------------------------------------------------- blocks


def whole(method, network, **changes):
    data = DataConfig(source="text:python", window=16, letters=True)
    small = {f"network.{name}": value for name, value in {**SMALL, "depth": 4}.items()}
    training = {"training.steps": 3, "training.batch_size": 4, "training.validation_items": 8}
    return data, recipe(method, data, data.load(), 0, {"network.kind": network, **small, **training, **changes})


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_masks_are_shared_out_evenly_in_alpha(schedule):
    _, config = whole("masked", "text", schedule=schedule)
    plan = BlocksPlan.parse({"whole": config.to_json(), "count": 4, "overlap": 0.1})
    edges = torch.tensor(plan.edges(), dtype=torch.float64)
    alpha = config.method.schedule.alpha(edges)
    torch.testing.assert_close(alpha, 1 - torch.arange(5, dtype=torch.float64) / 4, rtol=0, atol=1e-9)
    if schedule == "linear":
        torch.testing.assert_close(edges, torch.arange(5, dtype=torch.float64) / 4)
        assert plan.widened(1) == pytest.approx((0.475, 0.775))
    first, last = plan.member(0).method, plan.member(3).method
    assert (first.highest, last.lowest) == (None, None)
    assert plan.merged().method.network.edges == pytest.approx(
        [1000 * float(edge) for edge in plan.edges()[3:0:-1]], abs=0.02
    )
    with pytest.raises(ConfigError, match="'equal-log' is of sigma; text is shared out by equal-mass"):
        BlocksPlan.parse({"whole": config.to_json(), "count": 4, "partition": "equal-log"})
    limited = config.to_json()
    limited["method"]["lowest"] = 0.2
    with pytest.raises(ConfigError, match="lowest and highest are what blocks are given"):
        BlocksPlan.parse({"whole": limited, "count": 2})


@pytest.mark.parametrize(("method", "network"), [("masked", "text"), ("token-diffusion", "causal-text")])
def test_text_in_blocks(tmp_path, method, network):
    data, config = whole(method, network)
    plan = BlocksPlan.parse({"whole": config.to_json(), "count": 2})
    blocks = Blocks.begin(tmp_path / "run", plan)
    assert blocks.carry_out(data.load(), progress=False)
    from osmose.training.run import Run

    run = Run.open(tmp_path / "run")
    model, calls = run.model(), []
    for index, part in enumerate(model.network.parts):
        part.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    steps = 8 if method == "masked" else 4
    model.sample(2, seed=0, num_steps=steps)
    if method == "masked":
        assert calls == [0] * 4 + [1] * 4  # each step is one block's, evenly
    else:
        assert calls == [0, 0, 0, 1] * 16  # sigma 80, 17, 2.5 and 0.17: the middle is 0.3
    single = BlocksPlan.parse({"whole": config.to_json(), "count": 1})
    assert single.member(0) == config


def test_both_are_for_text_alone():
    digits = DataConfig(source="digits")
    for method in ("masked", "token-diffusion"):
        with pytest.raises(UserError, match=f"{method}: is for text"):
            recipe(method, digits, digits.load(), 0, {})
    config = recipe("ddpm", digits, digits.load(), 0, {})
    with pytest.raises(ConfigError, match="blocks share noise levels of edm: schedule ve and times log-normal"):
        BlocksPlan.parse({"whole": config.to_json(), "count": 2})
    config = recipe("gaussian", digits, digits.load(), 0, {})
    with pytest.raises(ConfigError, match="gaussian has no blocks; edm, masked and token-diffusion have"):
        BlocksPlan.parse({"whole": config.to_json(), "count": 2})
    assert built(recipe("edm", digits, digits.load(), 0, {"network": "mlp"})).config.kind == "edm"
