"""Scores of samples: what they react to, what they are called, and what is refused."""

import dataclasses

import pytest
import torch
from rich.console import Console

from osmose.data.dataset import DataConfig, Dataset, DataSpec
from osmose.errors import UserError
from osmose.metrics import real as real_module
from osmose.metrics.evaluate import Score, metric_names, score_samples, table
from osmose.metrics.features import FeatureNetwork, load_features


@pytest.fixture(scope="module")
def digits():
    return DataConfig(source="digits").load()


@pytest.fixture(scope="module")
def halves(digits):
    """A data set of 900 training digits, and 700 others that no part of it holds."""
    small = dataclasses.replace(digits, train=digits.train[:900], train_labels=digits.train_labels[:900])
    return small, digits.train[900:1600], digits.train_labels[900:1600]


@pytest.fixture(scope="module")
def cloud():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2000, 2, generator=generator) * torch.tensor([1.0, 3.0])
    spec = DataSpec(kind="points", shape=(2,), scale=(1.0, 3.0))
    return Dataset("cloud", spec, points[:1500], points[1500:], "by position")


def noisy(x, share, seed=0):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (x + 16 * share * noise).clamp(0, 16)


def values(scores):
    return {score.name: score.value for score in scores}


def shuffled(x, seed=0):
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]


# --- sensitivity ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ladder(halves):
    dataset, real, _ = halves
    uniform = 16 * torch.rand(real.shape, generator=torch.Generator().manual_seed(1))
    return [values(score_samples(x, dataset)) for x in (real, noisy(real, 0.15), noisy(real, 0.5), uniform)]


@pytest.mark.parametrize("name", ["fd_clf", "kid_clf", "sw2", "energy", "nn_ratio"])
def test_distances_rank_real_mild_strong_and_uniform_noise(ladder, name):
    seen = [scores[name] for scores in ladder]
    assert seen == sorted(seen)
    assert seen[3] > 1.5 * seen[0]


@pytest.mark.parametrize("name", ["prec_clf", "clf_score"])
def test_scores_fall_with_noise(ladder, name):
    real, mild, strong, uniform = (scores[name] for scores in ladder)
    assert real > mild > max(strong, uniform)


def test_coverage_and_class_shares_are_no_detectors_of_mild_noise(ladder):
    """Noise widens the balls around the samples, which then cover the real data as before: a limit of recall."""
    real, mild, strong, uniform = ladder
    assert mild["rec_clf"] == pytest.approx(real["rec_clf"], abs=0.05)
    assert mild["class_tv"] == pytest.approx(real["class_tv"], abs=0.05)
    assert real["class_tv"] + 0.1 < strong["class_tv"] < uniform["class_tv"]
    assert real["conf"] > mild["conf"] > strong["conf"]
    assert uniform["rec_clf"] < 0.3


def test_dropped_classes_cost_recall_not_precision(halves):
    dataset, real, labels = halves
    few = score_samples(real[labels < 5], dataset, num_real=700)
    every = score_samples(real, dataset)
    assert values(few)["rec_clf"] < values(every)["rec_clf"] - 0.2
    assert values(few)["prec_clf"] > values(every)["prec_clf"] - 0.05
    assert values(few)["class_tv"] > 0.4


def test_noise_mixed_in_costs_precision_not_recall(halves):
    dataset, real, _ = halves
    mixed = torch.cat([real[:350].float(), 16 * torch.rand(350, 1, 8, 8, generator=torch.Generator().manual_seed(0))])
    half, every = values(score_samples(mixed, dataset)), values(score_samples(real, dataset))
    assert half["prec_clf"] < every["prec_clf"] - 0.2
    assert half["rec_clf"] > every["rec_clf"] - 0.15


def test_copies_are_seen_by_the_neighbour_ratio_and_not_by_the_distance(halves):
    dataset, real, _ = halves
    copies = noisy(shuffled(dataset.train)[:700].float(), 0.005)
    copied, fresh = values(score_samples(copies, dataset)), values(score_samples(real, dataset))
    assert copied["fd_clf"] < fresh["fd_clf"] * 1.1
    assert copied["nn_ratio"] < 0.2
    assert fresh["nn_ratio"] == pytest.approx(1, abs=0.15)


def test_labels_add_the_agreement_of_the_classifier(halves):
    dataset, real, labels = halves
    told = {score.name: score for score in score_samples(real, dataset, labels=labels)}["label_clf"]
    assert told.value > 0.97
    assert told.floor > 0.97
    wrong = score_samples(real, dataset, labels=(labels + 1) % 10, metrics=["label_clf"])
    assert wrong[0].value < 0.05


# --- conditions -----------------------------------------------------------------------------------------------------


def test_every_score_carries_its_conditions(halves):
    dataset, real, _ = halves
    scores = score_samples(real[:400], dataset)
    assert [score.name for score in scores] == [
        *("fd_clf", "kid_clf", "prec_clf", "rec_clf", "clf_score", "conf", "class_tv"),
        *("sw2", "energy", "nn_ratio"),
    ]
    network = load_features("digits-mlp-v1")
    for score in scores[:7]:
        assert (score.features, score.features_sha256) == (network.name, network.sha256)
        assert (score.n, score.m, score.reference) == (400, 400, "train")
        assert score.floor is not None
        assert score.standard_error is not None or score.name == "class_tv"
        assert Score.parse(score.to_json()) == score
    assert scores[-1].features is None
    # Real samples score like the floor, which is between other real sets of the same size.
    fd = scores[0]
    assert abs(fd.value - fd.floor) < 5 * fd.standard_error
    assert "below 10 d = 640" in fd.note


def test_scores_repeat_with_the_seed_and_use_the_reference_cache(halves, monkeypatch):
    dataset, real, _ = halves
    first = score_samples(real[:300], dataset, seed=3)
    calls = []
    embed = FeatureNetwork.embed
    monkeypatch.setattr(
        FeatureNetwork, "embed", lambda self, x, value_range=None: calls.append(len(x)) or embed(self, x, value_range)
    )
    assert score_samples(real[:300], dataset, seed=3) == first
    assert calls == [300]
    assert score_samples(real[:300], dataset, seed=4) != first
    assert calls == [300, 300, 600]
    assert len(real_module._CACHE) <= 4


def test_too_little_real_data_for_the_floor_is_said(digits, halves):
    dataset, real, _ = halves
    fills = score_samples(real[:500], dataset, metrics=["sw2"])[0]
    assert "100 held-out items fill up" in fills.note
    scores = score_samples(real, dataset, metrics=["sw2"])[0]
    assert "only 1080 items: the floor is between disjoint halves of 540, not 700" in scores.note
    held_out = score_samples(real[:90], digits, reference="held-out", metrics=["sw2"])[0]
    assert held_out.note is None
    assert held_out.reference == "held-out"


def test_different_numbers_are_marked(halves):
    dataset, real, _ = halves
    score = score_samples(real[:200], dataset, num_real=300, metrics=["energy"])[0]
    assert (score.n, score.m) == (200, 300)
    assert "n = 200 samples against m = 300 real items" in score.note


def test_real_sets_are_disjoint(digits):
    for n in (100, 700, 850, 1700):
        numbered = torch.arange(len(digits.train) + len(digits.held_out))
        marked = dataclasses.replace(
            digits, train=numbered[: len(digits.train)], held_out=numbered[len(digits.train) :]
        )
        sets = real_module.draw_real(marked, "train", n, n, seed=0)
        x, y = sets.items[sets.floor_x], sets.items[sets.floor_y]
        assert len(x) == len(y) == (n if 2 * n <= len(numbered) else len(numbered) // 2)
        assert not set(x.tolist()) & set(y.tolist())
        assert len(sets.items[sets.reference]) == min(n, len(digits.train))


# --- points ---------------------------------------------------------------------------------------------------------


def test_points_get_metrics_without_features(cloud):
    generator = torch.Generator().manual_seed(5)
    good = torch.randn(700, 2, generator=generator) * torch.tensor([1.0, 3.0])
    scores = score_samples(good, cloud)
    assert {score.name for score in scores} == {"sw2", "energy", "mmd", "prec_raw", "rec_raw", "nn_ratio"}
    assert all(score.features is None for score in scores)
    shifted = values(score_samples(good + torch.tensor([1.0, 0.0]), cloud))
    assert shifted["sw2"] == pytest.approx(0.5**0.5, rel=0.15)  # |a| / sqrt(2), a in model units
    for name in ("sw2", "energy", "mmd"):
        assert shifted[name] > values(scores)[name] + 0.05


def test_an_offset_beyond_the_data_costs_precision_of_points(cloud):
    far = values(score_samples(cloud.train[:500] + 50, cloud, metrics=["prec_raw", "rec_raw"]))
    assert far == {"prec_raw": 0, "rec_raw": 0}


# --- names ----------------------------------------------------------------------------------------------------------


class _Eight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images, (2, 2)).flatten(1)
        return pooled, pooled / 50


def stand_in(suffix):
    return FeatureNetwork("stand-in", 12, 12, "0" * 64, None, (0.0, 255.0), _Eight(), suffix=suffix)


def test_fid_is_only_what_the_verified_network_gives(digits):
    colour = {"spec": digits.spec.replace(shape=(3, 8, 8)), "source": "folder:x"}
    parts = {"train": digits.train.expand(-1, 3, -1, -1), "held_out": digits.held_out.expand(-1, 3, -1, -1)}
    dataset = dataclasses.replace(digits, **colour, **parts)
    x = noisy(dataset.train[:200].float(), 0.2)
    verified = [score.name for score in score_samples(x, dataset, features=stand_in(""))]
    assert verified == ["fid", "kid", "precision", "recall", "is", "sw2", "energy", "nn_ratio"]
    other = [score.name for score in score_samples(x, dataset, features=stand_in("inception-unverified"))]
    assert other[:2] == ["fd_inception-unverified", "kid_inception-unverified"]
    assert not {"fid", "kid", "is"} & set(other)
    without = score_samples(x, dataset)
    assert [score.name for score in without] == ["sw2", "energy", "nn_ratio"]
    assert "--inception-weights PATH" in without[0].note


def test_classifier_metrics_never_take_published_names(digits):
    names = set(metric_names(digits.spec, load_features("digits-mlp-v1")).values())
    assert not names & {"fid", "kid", "is", "precision", "recall"}


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x / 8 - 1, r"span -1 to 1 where the data have 0 to 16; these look like the model's units \[-1, 1\]"),
        (lambda x: x / 16, r"span 0 to 1 .*look scaled to \[0, 1\]: multiply by 16"),
        (lambda x: x * 16, r"span 0 to 256 where the data have 0 to 16; pass data units"),
        (lambda x: torch.where(x > 15, torch.nan, x), r"of 500 hold NaN or infinity"),
        (lambda x: x.expand(-1, 3, -1, -1), r"shape \(500, 3, 8, 8\) given, \(n, 1, 8, 8\)"),
        (lambda x: x.flatten(1), r"shape \(500, 64\) given"),
        (lambda x: x[:3], r"n of at least 4 needed"),
    ],
    ids=["model units", "unit interval", "too large", "nan", "channels", "flat", "few"],
)
def test_bad_samples_are_refused_with_the_numbers(digits, change, message):
    with pytest.raises(UserError, match=message):
        score_samples(change(digits.train[:500].float()), digits)


def test_real_data_compared_with_themselves_are_refused(digits):
    with pytest.raises(UserError, match="they are the 1617 real items of train"):
        score_samples(digits.train, digits)
    sets = real_module.draw_real(digits, "train", 300, 300, seed=0)
    with pytest.raises(UserError, match="they are the 300 real items"):
        score_samples(sets.items[sets.reference].float(), digits)


def test_too_few_samples_for_the_features_are_refused_or_left_out(halves):
    dataset, real, _ = halves
    with pytest.raises(UserError, match="n = 60 generated samples for d = 64 features"):
        score_samples(real[:60], dataset, metrics=["fd_clf", "sw2"])
    scores = score_samples(real[:60], dataset)
    assert "fd_clf" not in values(scores)
    assert {"kid_clf", "sw2", "energy"} <= set(values(scores))
    assert "fd_clf is left out: Frechet distance: n = 60" in scores[0].note


def test_metrics_that_do_not_exist_are_refused_with_help(halves):
    dataset, real, _ = halves
    with pytest.raises(UserError, match=r"fid is not available.*--inception-weights PATH; available: .*fd_clf"):
        score_samples(real, dataset, metrics=["fid"])
    with pytest.raises(UserError, match="did you mean 'energy'"):
        score_samples(real, dataset, metrics=["enrgy"])
    with pytest.raises(UserError, match="label_clf needs a classifier and the labels"):
        score_samples(real, dataset, metrics=["label_clf"])
    with pytest.raises(UserError, match=r"labels: shape \(5,\) given for 700 samples"):
        score_samples(real, dataset, labels=torch.zeros(5))
    with pytest.raises(UserError, match=r"lenet5-mnist takes images of shape \(1, 28, 28\); digits has image data"):
        score_samples(real, dataset, features=load_features("lenet5-mnist"))
    with pytest.raises(UserError, match="num_real: 0"):
        score_samples(real, dataset, num_real=0)


# --- the table ------------------------------------------------------------------------------------------------------


def test_table_shows_values_floors_networks_and_each_note_once(halves):
    dataset, real, _ = halves
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(score_samples(real[:500], dataset), title="digits"))
    text = console.export_text()
    for part in ("fd_clf ↓ [1] [2]", "real data", "digits-mlp-v1 b66ff56e", "nn_ratio"):
        assert part in text
    assert text.count("fill up") == 1
