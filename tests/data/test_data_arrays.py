import numpy as np
import pytest
import torch

from osmose.data.dataset import DataConfig
from osmose.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
POINTS = RNG.standard_normal((40, 3)) * [1.0, 10.0, 100.0] + 5.0


def npz(tmp_path, **arrays):
    settings = arrays.pop("settings", {})
    np.savez(tmp_path / "mine.npz", **arrays)
    return DataConfig(source=f"npz:{tmp_path}/mine.npz", **settings).load()


def csv(tmp_path, text):
    (tmp_path / "mine.csv").write_text(text)
    return DataConfig(source=f"csv:{tmp_path}/mine.csv").load()


def values(data):
    return sorted(map(bytes, torch.cat([data.train, data.held_out]).numpy()))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GREY, GREY[:, None]),
        (GREY.astype(np.int64), GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR[:, :5, :, :1], COLOUR[:, :5, :, :1].transpose(0, 3, 1, 2)),
        (np.zeros((4, 9, 9, 13), np.uint8) + 7, np.zeros((4, 13, 9, 9), np.uint8) + 7),
        (np.zeros((4, 13, 9, 9), np.uint8) + 7, np.zeros((4, 13, 9, 9), np.uint8) + 7),
    ],
)
def test_integer_images_of_every_layout(tmp_path, array, expected):
    data = npz(tmp_path, x=array)
    assert data.spec.shape == expected.shape[1:]
    assert data.train.dtype == torch.uint8
    assert (data.spec.range, data.spec.levels) == ((0, 255), 256)
    assert values(data) == sorted(map(bytes, np.ascontiguousarray(expected)))
    assert data.identity.source == "npz:mine.npz"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, (0, 1)), (0.2, 0.6, (0, 1)), (-1, 1, (-1, 1)), (-0.1, 0.5, (-1, 1)), (0, 255, (0, 255)), (1, 2, (0, 255))],
)
def test_float_images_take_the_smallest_range_that_holds_them(tmp_path, low, high, expected):
    images = np.linspace(low, high, 4 * 9).reshape(4, 3, 3)
    data = npz(tmp_path, x=images)
    assert (data.spec.range, data.spec.levels) == (expected, None)
    assert data.train.dtype == torch.float32
    assert data.spec.model_range == (-1, 1)


def test_points_are_standardised(tmp_path):
    data = npz(tmp_path, anything=POINTS)
    assert (data.spec.kind, data.spec.shape, data.spec.range) == ("points", (3,), None)
    model = data.spec.encode(data.train)
    torch.testing.assert_close(model.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.std(0, correction=0), torch.ones(3))


@pytest.mark.parametrize("names", [("x", "y", "test", "y_test"), ("train", "labels", "held_out", "held_out_labels")])
def test_parts_and_labels(tmp_path, names):
    labels = np.arange(12) % 3
    data = npz(tmp_path, **dict(zip(names, (GREY[:9], labels[:9], GREY[9:], labels[9:]), strict=True)))
    assert np.array_equal(data.train.numpy(), GREY[:9, None])
    assert np.array_equal(data.held_out.numpy(), GREY[9:, None])
    assert data.train_labels.tolist() == labels[:9].tolist()
    assert data.held_out_labels.tolist() == labels[9:].tolist()
    assert data.spec.num_classes == 3
    assert data.identity.split == f"the array {names[2]!r}"


def test_labels_follow_a_random_split(tmp_path):
    labels = np.arange(12)
    data = npz(tmp_path, x=GREY, y=labels, settings={"held_out": 0.25})
    assert len(data.held_out) == 3
    assert np.array_equal(data.train.numpy(), GREY[data.train_labels.numpy(), None])


def with_value(array, index, value):
    array = np.array(array, dtype=float)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": with_value(POINTS, (3, 1), np.nan)}, r"^npz:mine\.npz: x\[3, 1\] is nan; every value must be finite"),
        ({"x": with_value(GREY / 255, (2, 1, 4), np.inf)}, r"x\[2, 1, 4\] is inf"),
        ({"x": with_value(POINTS, (0, 0), 1e300)}, r"x\[0, 0\] is inf"),
        ({"x": GREY, "test": with_value(GREY / 255, (0, 0, 0), np.nan)}, r"test\[0, 0, 0\] is nan"),
        ({"x": np.array([1, "a", None], dtype=object)}, "array 'x' has dtype object .* never read"),
        ({"x": POINTS.astype(complex)}, "array 'x' has dtype complex128; integers or floats are needed"),
        ({"x": GREY > 5}, "array 'x' has dtype bool"),
        ({"x": np.array([["a", "b"]])}, "array 'x' has dtype <U1"),
        ({"x": POINTS[:, 0]}, r"array 'x' has shape \(40,\); needed are images \(N, H, W\)"),
        ({"x": COLOUR[None]}, r"has shape \(1, 12, 6, 5, 3\)"),
        ({"x": GREY[:0]}, r"has shape \(0, 6, 5\)"),
        ({"x": GREY.astype(int) + 1}, r"integer images 'x' have values 1..256; 0..255 are needed"),
        ({"x": GREY // 128}, r"have values 0..1; .* floats in \[0, 1\]"),
        ({"x": GREY / 255 - 2}, r"float images with values -2..-1; .* \[0, 1\], \[-1, 1\], \[0, 255\]"),
        ({"x": with_value(POINTS, (slice(None), 1), 2.5)}, r"column 1 is constant \(2\.5\)"),
        ({"a": GREY, "b": GREY}, "no array x or train; it holds a, b"),
        ({"y": np.arange(3)}, "no array x or train; it holds y"),
        ({"x": GREY[:2]}, r"2 item\(s\); at least 3 are needed"),
        ({"x": GREY[:1], "test": GREY}, "1 training and 12 held-out items; at least 2 and 1"),
        ({"x": GREY, "y": np.arange(11)}, "12 train items but 11 labels"),
        ({"x": GREY, "y": np.arange(12) - 1}, "train label 0 is -1; labels count from 0"),
        ({"x": GREY, "y": np.arange(12) + 1000}, "label 1011 among"),
        ({"x": GREY, "y": np.arange(12.0)}, r"labels 'y' have dtype float64 and shape \(12,\)"),
        ({"x": GREY, "y": np.zeros((12, 2), int)}, r"labels 'y' have dtype int64 and shape \(12, 2\)"),
        ({"x": GREY, "y": np.arange(12), "test": GREY}, "the training part has labels but the held-out part has none"),
        ({"x": GREY, "test": GREY[:, :5]}, r"shape \(1, 6, 5\) in training, \(1, 5, 5\) held out"),
        ({"x": GREY, "test": GREY / 255}, r"x uint8 \(12, 6, 5\) and test float64 .* one dtype and shape"),
    ],
)
def test_bad_archives_are_refused(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message) as error:
        npz(tmp_path, **arrays)
    assert "\n" not in str(error.value)


def test_files_that_are_no_archive(tmp_path):
    np.savez(tmp_path / "good.npz", x=GREY)
    np.savez_compressed(tmp_path / "flipped.npz", x=GREY)
    np.save(tmp_path / "bare.npy", GREY)
    content = bytearray((tmp_path / "good.npz").read_bytes())
    (tmp_path / "short.npz").write_bytes(content[:200])
    (tmp_path / "text.npz").write_text("hello")
    content = bytearray((tmp_path / "flipped.npz").read_bytes())
    content[100:120] = bytes(20)
    (tmp_path / "flipped.npz").write_bytes(content)
    for name, message in (
        ("short.npz", "not a readable npz file"),
        ("text.npz", "not a readable npz file"),
        ("flipped.npz", "array 'x' is damaged"),
        ("bare.npy", r"a single array \(npy\); write it with numpy\.savez"),
        ("none.npz", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(source=f"npz:{tmp_path}/{name}").load()


ROWS = "\n".join(f"{i},{i * i},{-i / 7}" for i in range(12))


def test_csv_rows_are_points(tmp_path):
    data = csv(tmp_path, f"\ufeffa, b,c\n{ROWS}\n\n")
    assert data.spec.shape == (3,)
    table = np.array([[i, i * i, -i / 7] for i in range(12)], np.float32)
    assert values(data) == sorted(map(bytes, table))
    assert data.identity.source == "csv:mine.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; a header line and 10 or more rows"),
        (ROWS, r"first line holds numbers \(0, 0, 0\.0\); a header line is needed"),
        ("a,b,c\n1,2,x\n" + ROWS, r"^csv:mine\.csv: line 2, column 'c': 'x' is not a finite number"),
        ("a,b,c\n" + ROWS + "\n1,,3\n", "line 14, column 'b': '' is not a finite number"),
        ("a,b,c\n1,nan,3\n" + ROWS, "line 2, column 'b': 'nan' is not a finite number"),
        ("a,b,c\n1,2\n" + ROWS, "line 2 has 2 cells where the header has 3"),
        ("a,b\n" + "\n".join(f"{i},5" for i in range(20)), r"column 'b' is constant \(5\)"),
        ("a,b,c\n" + "\n".join(ROWS.split("\n")[:9]), "9 rows of numbers; at least 10 are needed"),
        ("a,b,c\n", "0 rows of numbers"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        csv(tmp_path, text)


def test_binary_tables_are_refused(tmp_path):
    (tmp_path / "mine.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not a readable table of text"):
        DataConfig(source=f"csv:{tmp_path}/mine.csv").load()
