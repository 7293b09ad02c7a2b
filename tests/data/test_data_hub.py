"""Hub data sets, without network: saved to disk by `datasets`, or with its loader replaced."""

import builtins
import sys

import numpy as np
import pytest
from PIL import Image

from osmose.data.dataset import DataConfig
from osmose.errors import UserError

RNG = np.random.default_rng(0)


def load(argument, **settings):
    return DataConfig(source=f"hub:{argument}", **settings).load()


@pytest.fixture(scope="module")
def datasets():
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


@pytest.fixture
def make(datasets):
    def build(count, labels=None, **columns):
        pixels = RNG.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
        labels = [i % 2 for i in range(count)] if labels is None else labels
        for index, label in enumerate(labels):
            pixels[index, 0, 0, 0] = max(label, 0)
        features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        features |= {name: feature for name, (feature, _) in columns.items()}
        content = {"img": [Image.fromarray(image) for image in pixels], "label": labels}
        content |= {name: rows for name, (_, rows) in columns.items()}
        return datasets.Dataset.from_dict(content, features=datasets.Features(features))

    return build


def check_labels(data):
    for images, labels in (data.part("train"), data.part("held-out")):
        assert images[:, 0, 0, 0].tolist() == labels.tolist()


def test_saved_splits_are_the_parts(datasets, make, tmp_path):
    splits = datasets.DatasetDict({"train": make(7), "test": make(3)})
    splits.save_to_disk(str(tmp_path / "private" / "pets"))
    data = load(tmp_path / "private" / "pets")
    assert (len(data.train), len(data.held_out)) == (7, 3)
    assert data.spec.shape == (3, 6, 6)
    assert data.class_names == ("cat", "dog")
    assert data.identity.source == "hub:pets"
    assert data.identity.split == "the official test part"
    check_labels(data)
    first = np.asarray(splits["train"][0]["img"]).transpose(2, 0, 1)
    assert np.array_equal(data.train[0].numpy(), first)
    assert load(tmp_path / "private" / "pets", size=4, channels=1).spec.shape == (1, 4, 4)


def test_one_part_is_split_at_random(make, tmp_path):
    make(20).save_to_disk(str(tmp_path / "pets"))
    data = load(tmp_path / "pets")
    assert (len(data.train), len(data.held_out)) == (18, 2)
    check_labels(data)


def test_withheld_test_labels_give_way_to_validation(datasets, make, tmp_path):
    splits = datasets.DatasetDict({"train": make(6), "test": make(3, labels=[-1] * 3), "validation": make(4)})
    splits.save_to_disk(str(tmp_path / "pets"))
    data = load(tmp_path / "pets")
    assert len(data.held_out) == 4
    assert data.identity.split == "the split 'validation'"


def test_bad_rows_are_named_or_skipped(datasets, make, tmp_path):
    rows = make(8).cast_column("img", datasets.Image(decode=False)).to_list()
    rows[5]["img"]["bytes"] = rows[5]["img"]["bytes"][:60]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "pets"))
    with pytest.raises(UserError, match=r"cannot read train row 5 \(.*--skip-bad"):
        load(tmp_path / "pets")
    with pytest.warns(UserWarning, match="left out 1 of 8"):
        data = load(tmp_path / "pets", skip_bad=True)
    assert len(data.train) + len(data.held_out) == 7
    check_labels(data)


def test_no_image_column_is_refused(datasets, tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(UserError, match=r"^hub:words: no image column among text"):
        load(tmp_path / "words")


def test_splits_without_train_are_listed(datasets, make, tmp_path):
    datasets.DatasetDict({"a": make(3), "b": make(3)}).save_to_disk(str(tmp_path / "odd"))
    with pytest.raises(UserError, match="no split called train; it has a, b"):
        load(tmp_path / "odd")


def test_name_and_configuration_reach_the_library(datasets, make, monkeypatch):
    asked = []

    def answer(*arguments):
        asked.append(arguments)
        return {"train": make(5), "test": make(2)}

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert load("someone/pets@small").identity.source == "hub:someone/pets@small"
    load("someone/pets")
    assert asked == [("someone/pets", "small"), ("someone/pets", None)]


def test_offline_is_one_line(datasets, monkeypatch):
    def fail(*_):
        raise ConnectionError("Couldn't reach the hub\nwith a long story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"hub:pets: cannot be loaded.*network \(Couldn't reach the hub\)$"):
        load("pets")


@pytest.mark.usefixtures("datasets")
def test_wrong_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="hub needs a name"):
        DataConfig(source="hub").load()
    with pytest.raises(UserError, match="no data set saved by save_to_disk there; for plain images write folder:PATH"):
        load(tmp_path)


def test_missing_extra_is_explained(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'osmose\[hub\]'"):
        load("pets")
