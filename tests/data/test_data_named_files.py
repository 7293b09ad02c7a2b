"""The idx files of MNIST and the files of CIFAR-10, written here in small and read back."""

import gzip
import re
import struct

import numpy as np
import pytest
from PIL import Image

from osmose.data import cifar
from osmose.data.dataset import DataConfig
from osmose.errors import UserError

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
TEST = RNG.integers(0, 256, (3, 5, 4), dtype=np.uint8)
TRAIN_LABELS = np.array([0, 1, 2, 2, 1, 9], np.uint8)
TEST_LABELS = np.array([2, 0, 1], np.uint8)


def idx_bytes(values):
    header = struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape)
    return header + values.tobytes()


def write_idx(folder, compress=False, dotted=False):
    folder.mkdir(parents=True, exist_ok=True)
    mark = "." if dotted else "-"
    for name, images, labels in (("train", TRAIN, TRAIN_LABELS), ("t10k", TEST, TEST_LABELS)):
        for stem, values in (("images", images), ("labels", labels)):
            path = folder / f"{name}-{stem}{mark}idx{values.ndim}-ubyte"
            if compress:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx_bytes(values)))
            else:
                path.write_bytes(idx_bytes(values))


def load(source, root=None):
    return DataConfig(source=source, root=root).load()


@pytest.fixture(autouse=True)
def _no_root_from_outside(monkeypatch):
    monkeypatch.delenv("OSMOSE_DATA_ROOT", raising=False)


@pytest.mark.parametrize(
    ("source", "folder"),
    [("mnist", "mnist"), ("fashion-mnist", "fashion-mnist"), ("fashion-mnist", "fashion_mnist")],
)
@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_come_back_as_written(tmp_path, source, folder, compress):
    write_idx(tmp_path / folder, compress)
    data = load(source, tmp_path)
    assert np.array_equal(data.train.numpy(), TRAIN[:, None])
    assert np.array_equal(data.held_out.numpy(), TEST[:, None])
    assert np.array_equal(data.train_labels.numpy(), TRAIN_LABELS)
    assert np.array_equal(data.held_out_labels.numpy(), TEST_LABELS)
    assert data.spec.shape == (1, 5, 4)
    assert (data.spec.range, data.spec.levels, data.spec.shift, data.spec.scale) == ((0, 255), 256, (127.5,), (127.5,))
    assert data.spec.num_classes == 10
    assert (data.class_names[0] == "T-shirt/top") == (source == "fashion-mnist")
    assert data.identity.split == "the official test part"


def test_idx_folder_keeps_its_own_classes_and_no_private_folders(tmp_path):
    write_idx(tmp_path / "private" / "glyphs", dotted=True)
    data = load(f"idx:{tmp_path}/private/glyphs")
    assert data.class_names is None
    assert data.spec.num_classes == 10
    assert data.identity.source == "idx:glyphs"


def test_root_from_the_environment(tmp_path, monkeypatch):
    write_idx(tmp_path / "mnist")
    monkeypatch.setenv("OSMOSE_DATA_ROOT", str(tmp_path))
    assert len(load("mnist").train) == 6


@pytest.mark.parametrize(("source", "file"), [("mnist", "idx3-ubyte"), ("cifar10", "data_batch_1.bin")])
def test_missing_root_names_flag_and_files(tmp_path, source, file):
    with pytest.raises(UserError, match=rf"^{source}: give --data-root FOLDER .*{file}") as error:
        load(source)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"^{source}: --data-root {re.escape(str(tmp_path))} has no .*{file}"):
        load(source, tmp_path)


def test_missing_idx_file_is_named(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"has no file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        load(f"idx:{tmp_path}")


def test_idx_needs_a_folder_that_exists(tmp_path):
    with pytest.raises(UserError, match="idx needs a path: write it as idx:PATH"):
        load("idx")
    with pytest.raises(UserError, match="no such file or folder"):
        load(f"idx:{tmp_path}/nothing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(TRAIN)[:-1], "119 bytes of values where its header says 120"),
        (idx_bytes(TRAIN) + b"\0", "121 bytes of values where its header says 120"),
        (idx_bytes(TRAIN)[:9], r"truncated inside its header \(9 of 16 bytes\)"),
        (idx_bytes(TRAIN_LABELS), "starts with 00000801 where an idx file of this kind has 00000803"),
        (b"", "starts with nothing where"),
        (gzip.compress(idx_bytes(TRAIN))[:-20], "damaged gzip file"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=rf"train-images-idx3-ubyte: {message}"):
        load(f"idx:{tmp_path}")


def test_idx_label_trouble(tmp_path):
    write_idx(tmp_path / "mnist")
    labels = tmp_path / "mnist" / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(TRAIN_LABELS[:5]))
    with pytest.raises(UserError, match=r"^mnist: 6 train items but 5 labels"):
        load("mnist", tmp_path)
    labels.write_bytes(idx_bytes(TRAIN_LABELS + 1))
    with pytest.raises(UserError, match=r"^mnist: label 10 where there are 10 classes"):
        load("mnist", tmp_path)


def test_parts_of_different_sides(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(TEST[:, :4]))
    with pytest.raises(UserError, match=r"shape \(1, 5, 4\) in training, \(1, 4, 4\) held out"):
        load(f"idx:{tmp_path}")


CIFAR_IMAGES = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
CIFAR_LABELS = np.arange(12, dtype=np.uint8) % 10


def write_binary(folder):
    folder.mkdir()
    records = np.concatenate([CIFAR_LABELS[:, None], CIFAR_IMAGES.transpose(0, 3, 1, 2).reshape(12, -1)], axis=1)
    for number, name in enumerate((*cifar.TRAIN_FILES, cifar.TEST_FILE)):
        records[2 * number : 2 * number + 2].tofile(folder / name)


def write_cifar_npz(folder, **changes):
    folder.mkdir(exist_ok=True)
    arrays = {
        "train": CIFAR_IMAGES[:10],
        "train_labels": CIFAR_LABELS[:10],
        "test": CIFAR_IMAGES[10:],
        "test_labels": CIFAR_LABELS[10:],
    }
    np.savez(folder / "cifar10.npz", **(arrays | changes))


def test_cifar_binary_and_npz_are_one_data_set(tmp_path):
    write_binary(tmp_path / "cifar-10-batches-bin")
    binary = load("cifar10", tmp_path)
    assert np.array_equal(binary.train.numpy(), CIFAR_IMAGES[:10].transpose(0, 3, 1, 2))
    assert np.array_equal(binary.held_out.numpy(), CIFAR_IMAGES[10:].transpose(0, 3, 1, 2))
    assert binary.train_labels.tolist() == list(range(10))
    assert binary.class_names[3] == "cat"
    write_cifar_npz(tmp_path / "cifar10")
    assert load("cifar10", tmp_path).identity == binary.identity


def test_damaged_cifar_binary_is_named(tmp_path):
    folder = tmp_path / "cifar10"
    write_binary(folder)
    path = folder / "data_batch_4.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"data_batch_4\.bin: 6145 bytes are not a whole number of records of 3073"):
        load("cifar10", tmp_path)
    path.write_bytes(whole[:3073] + b"\x0a" + whole[3074:])
    with pytest.raises(UserError, match=r"data_batch_4\.bin: record 1 has label 10; 0..9"):
        load("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"has no data_batch_4\.bin; .*not the pickles"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": CIFAR_IMAGES[:10].transpose(0, 3, 1, 2)}, r"array 'train' is uint8 \(10, 3, 32, 32\)"),
        ({"test": CIFAR_IMAGES[10:].astype(np.float32)}, "array 'test' is float32"),
        ({"train_labels": CIFAR_LABELS[:9]}, "10 train items but 9 labels"),
        ({"test_labels": np.array([0.0, 1.0])}, "array 'test_labels' is float64"),
    ],
)
def test_wrong_cifar_npz_is_refused(tmp_path, changes, message):
    write_cifar_npz(tmp_path / "cifar10", **changes)
    with pytest.raises(UserError, match=message):
        load("cifar10", tmp_path)


def test_sheets_become_the_npz(tmp_path):
    sheets = tmp_path / "sheets"
    sheets.mkdir()
    for name, tiles in (("train_1", CIFAR_IMAGES[:6]), ("train_2", CIFAR_IMAGES[:6]), ("test", CIFAR_IMAGES[6:])):
        sheet = tiles.reshape(2, 3, 32, 32, 3).swapaxes(1, 2).reshape(64, 96, 3)
        Image.fromarray(sheet).save(sheets / f"{name}.webp", lossless=True)
    np.savez(sheets / "labels.npz", train=np.tile(CIFAR_LABELS[:6], 2), test=CIFAR_LABELS[6:])
    cifar.pack_sheets(sheets, tmp_path / "root" / "cifar10" / "cifar10.npz")
    data = load("cifar10", tmp_path / "root")
    assert np.array_equal(data.train.numpy().transpose(0, 2, 3, 1), np.tile(CIFAR_IMAGES[:6], (2, 1, 1, 1)))
    assert np.array_equal(data.held_out.numpy().transpose(0, 2, 3, 1), CIFAR_IMAGES[6:])
    np.savez(sheets / "labels.npz", train=CIFAR_LABELS[:6], test=CIFAR_LABELS[6:])
    with pytest.raises(UserError, match="12 train tiles but 6 labels"):
        cifar.pack_sheets(sheets, tmp_path / "again.npz")
    Image.new("RGB", (65, 64)).save(sheets / "train_2.webp", lossless=True)
    with pytest.raises(UserError, match=r"train_2\.webp: 65x64 is not a grid of 32x32 tiles"):
        cifar.pack_sheets(sheets, tmp_path / "again.npz")
    with pytest.raises(UserError, match=r"no train_1\.webp"):
        cifar.pack_sheets(tmp_path, tmp_path / "again.npz")
