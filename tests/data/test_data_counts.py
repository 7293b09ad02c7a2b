import hashlib

import numpy as np
import pytest
import torch

from osmose.configuration import ConfigError
from osmose.data.dataset import DataConfig, DataSpec
from osmose.errors import UserError

RNG = np.random.default_rng(0)
ROWS = RNG.poisson([1.0, 5.0, 40.0], (40, 3))
GREY = RNG.integers(0, 12, (20, 5, 4))
COLOUR = RNG.integers(0, 300, (20, 5, 4, 3))


def npz(tmp_path, settings=None, **arrays):
    np.savez(tmp_path / "mine.npz", **arrays)
    return DataConfig(source=f"counts:{tmp_path}/mine.npz", **(settings or {})).load()


def csv(tmp_path, rows, header="a,b,c", **settings):
    lines = [",".join(str(cell) for cell in row) for row in rows]
    (tmp_path / "mine.csv").write_text("\n".join([header, *lines]) + "\n")
    return DataConfig(source=f"counts:{tmp_path}/mine.csv", **settings).load()


def changed(array, place, value, dtype=float):
    array = np.array(array, dtype=dtype)
    array[place] = value
    return array


def whole(data):
    return sorted(map(tuple, torch.cat([data.train, data.held_out]).flatten(1).tolist()))


# --- tables and archives --------------------------------------------------------------------------------------------


def test_a_table_of_counts(tmp_path):
    data = csv(tmp_path, ROWS)
    assert (data.spec.kind, data.spec.shape) == ("counts", (3,))
    assert (data.spec.range, data.spec.levels) == ((0, ROWS.max()), ROWS.max() + 1)
    assert (data.spec.step, data.spec.whole) == (1, True)
    assert whole(data) == sorted(map(tuple, ROWS.astype(float)))
    assert (len(data.train), len(data.held_out)) == (36, 4)
    assert data.identity.source == "counts:mine.csv"
    # The model's units have mean 0 and deviation 1 in every column of the training part.
    model = data.spec.encode(data.train)
    torch.testing.assert_close(model.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.std(0, correction=0), torch.ones(3))
    assert torch.equal(data.spec.to_levels(model), data.train.long())
    same = csv(tmp_path, [[f"{cell:.1f}" for cell in row] for row in ROWS])
    assert same.identity.sha256 == data.identity.sha256
    assert (tmp_path / "mine.csv").rename(tmp_path / "MINE.CSV").exists()
    assert DataConfig(source=f"counts:{tmp_path}/MINE.CSV").load().spec == data.spec


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64, np.float32, np.float64])
def test_an_archive_of_rows(tmp_path, dtype):
    data = npz(tmp_path, x=ROWS.astype(dtype))
    assert (data.spec.kind, data.spec.levels) == ("counts", ROWS.max() + 1)
    assert whole(data) == sorted(map(tuple, ROWS.astype(float)))


@pytest.mark.parametrize(
    ("array", "planes"),
    [(GREY, GREY[:, None]), (COLOUR, COLOUR.transpose(0, 3, 1, 2)), (COLOUR.transpose(0, 3, 1, 2),) * 2],
)
def test_images_of_counts(tmp_path, array, planes):
    data = npz(tmp_path, x=array)
    most = int(array.max())
    assert (data.spec.kind, data.spec.shape) == ("image", planes.shape[1:])
    assert (data.spec.range, data.spec.levels, data.spec.whole) == ((0, most), most + 1, True)
    assert data.spec.model_range == (-1, 1)
    assert whole(data) == sorted(map(tuple, planes.reshape(20, -1).astype(float)))
    assert torch.equal(data.spec.from_levels(data.train.long()), data.spec.encode(data.train))


def test_bits_are_counts(tmp_path):
    data = npz(tmp_path, x=GREY % 2)
    assert (data.spec.range, data.spec.levels) == ((0, 1), 2)
    assert set(data.spec.encode(data.train).unique().tolist()) == {-1.0, 1.0}


def test_labels_and_a_held_out_part(tmp_path):
    labels = np.arange(20) % 4
    data = npz(tmp_path, x=GREY[:15], y=labels[:15], test=GREY[15:] + 9, test_labels=labels[15:])
    assert np.array_equal(data.train.numpy(), GREY[:15, None])
    assert np.array_equal(data.held_out.numpy(), GREY[15:, None] + 9)
    assert (data.spec.num_classes, data.held_out_labels.tolist()) == (4, labels[15:].tolist())
    assert data.spec.range == (0, GREY[15:].max() + 9)  # of both parts
    assert data.identity.split == "the array 'test'"
    split = npz(tmp_path, {"held_out": 0.25}, x=ROWS, y=np.arange(40))
    assert np.array_equal(split.train.numpy(), ROWS[split.train_labels.numpy()])


def test_the_largest_count_may_be_given(tmp_path):
    for data in (csv(tmp_path, ROWS, max_count=99), npz(tmp_path, {"max_count": 99}, x=ROWS)):
        assert (data.spec.range, data.spec.levels) == ((0, 99), 100)
    assert npz(tmp_path, {"max_count": 300}, x=GREY).spec.shift == (150.0,)
    assert csv(tmp_path, ROWS, max_count=int(ROWS.max())).spec.levels == ROWS.max() + 1


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            (3, 1),
            -2,
            r"^counts:mine\.csv: .*\b4\b.*, column 'b': -2 is not valid: counts are whole numbers, at least 0",
        ),
        ((0, 2), 1.5, "column 'c': 1.5 is not valid: counts are whole numbers"),
        ((7, 0), "nan", "line 9, column 'a': 'nan' is not a finite number"),
        ((7, 0), "many", "line 9, column 'a': 'many' is not a finite number"),
        ((2, 2), 100, "column 'c': 100 is not valid: more than max_count=99"),
    ],
)
def test_cells_that_are_no_counts_are_refused(tmp_path, place, value, message):
    with pytest.raises(UserError, match=message) as error:
        csv(tmp_path, changed(ROWS, place, value, object), max_count=99)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": changed(GREY, (2, 1, 3), -1, int)}, r"\[2, 0, 1, 3\]: -1 is not valid: counts are whole"),
        ({"x": changed(ROWS, (3, 1), 0.25)}, r"\[3, 1\]: 0.25 is not valid: counts are whole"),
        ({"x": changed(ROWS, (3, 1), 1000)}, r"\[3, 1\]: 1000 is not valid: more than max_count=500"),
        ({"x": ROWS, "test": changed(ROWS, (4, 2), -3)}, r"\[4, 2\]: -3 is not valid"),
        ({"x": ROWS, "test": changed(ROWS, (4, 2), 501)}, r"\[4, 2\]: 501 is not valid: more than"),
        ({"x": changed(ROWS, (3, 1), np.nan)}, r"x\[3, 1\] is nan; every value must be finite"),
        ({"x": changed(ROWS, (3, 1), np.inf)}, r"x\[3, 1\] is inf"),
        (
            {"x": changed(ROWS, (3, 1), 2**24 + 1, np.int64)},
            r"array 'x' holds 16777217; counts end at 1048576",
        ),
        ({"x": ROWS > 3}, "array 'x' has dtype bool"),
        ({"x": ROWS[:, 0]}, r"array 'x' has shape \(40,\)"),
        ({"x": changed(ROWS, (slice(None), 2), 4)}, r"column 2 is constant \(4\)"),
        ({"x": ROWS, "y": np.arange(39)}, "40 train items but 39 labels"),
    ],
)
def test_values_that_are_no_counts_are_refused(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message) as error:
        npz(tmp_path, {"max_count": 500}, **arrays)
    assert "\n" not in str(error.value)


def test_a_held_out_value_is_not_blamed_on_the_training_part(tmp_path):
    with pytest.raises(UserError, match=r"test|held-out"):
        npz(tmp_path, x=ROWS, test=changed(ROWS, (4, 2), -3))


def test_the_value_is_said_with_all_its_digits(tmp_path):
    with pytest.raises(UserError, match="1000001 is not valid: more than max_count=1000000"):
        npz(tmp_path, {"max_count": 10**6}, x=changed(ROWS, (3, 1), 1_000_001))
    with pytest.raises(UserError, match=r"3\.0000\d* is not valid: counts are whole"):
        npz(tmp_path, x=changed(ROWS, (3, 1), 3.00001))


def test_counts_beyond_what_float32_holds_are_refused_in_every_form(tmp_path):
    big = changed(ROWS, (3, 1), 2**24 + 1)
    for load in (lambda: npz(tmp_path, x=big), lambda: csv(tmp_path, big.astype(int))):
        with pytest.raises(UserError, match=r"16777217|2\^24"):
            load()


@pytest.mark.parametrize("settings", [{}, {"max_count": 5}])
def test_nothing_but_zeros_is_refused(tmp_path, settings):
    for array in (np.zeros((20, 3), int), np.zeros((20, 5, 4), int)):
        with pytest.raises(UserError, match=r"every count is 0; there is nothing to learn|column 0 is constant"):
            npz(tmp_path, settings, x=array)
    with pytest.raises(UserError, match=r"every count is 0|column 'a' is constant"):
        csv(tmp_path, np.zeros((20, 3), int), **settings)


def test_a_constant_column_is_named(tmp_path):
    with pytest.raises(UserError, match=r"column 'b' is constant \(7\)"):
        csv(tmp_path, changed(ROWS, (slice(None), 1), 7, int))


def test_other_files_and_options_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("a\n1\n")
    for source, message in (
        (f"counts:{tmp_path}/mine.txt", r"counts:mine\.txt: should end in \.csv or \.npz"),
        (f"counts:{tmp_path}/none.csv", "no such file or folder"),
        ("counts:", "counts needs a path"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(source=source).load()
    with pytest.raises(UserError, match="max_count: 5 is for counts: data; 'digits' has none to change"):
        DataConfig(source="digits", max_count=5).load()
    for field, value in (("levels", 1), ("max_count", 0), ("max_count", -3)):
        with pytest.raises(ConfigError, match=f"{field}: {value} is not valid"):
            DataConfig.parse({"source": "digits", field: value})
    with pytest.raises(UserError, match=r"levels: 2 needs data with a range, and toy:two-moons has none \(points\)"):
        DataConfig(source="toy:two-moons", num_points=50, levels=2).load()


# --- levels ---------------------------------------------------------------------------------------------------------


def test_digits_in_black_and_white():
    plain, data = DataConfig(source="digits").load(), DataConfig(source="digits", levels=2).load()
    assert (data.spec.range, data.spec.levels, data.spec.step, data.spec.whole) == ((0, 16), 2, 16, True)
    assert data.train.dtype == plain.train.dtype
    assert set(data.train.unique().tolist()) == {0, 16}
    assert torch.equal(data.train > 8, plain.train > 8)
    assert set(data.spec.to_levels(data.spec.encode(data.held_out)).unique().tolist()) == {0, 1}
    assert data.identity.sha256 != plain.identity.sha256
    assert torch.equal(data.train_labels, plain.train_labels)
    # All 17 levels are there already.
    same = DataConfig(source="digits", levels=17).load()
    assert torch.equal(same.train, plain.train)
    assert same.identity == plain.identity


@pytest.mark.parametrize(("levels", "kept"), [(2, True), (52, True), (17, False), (256, True)])
def test_bytes_stay_bytes_where_levels_are_whole(tmp_path, levels, kept):
    images = RNG.integers(0, 256, (30, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=images)
    plain = DataConfig(source=f"npz:{tmp_path}/mine.npz").load()
    data = DataConfig(source=f"npz:{tmp_path}/mine.npz", levels=levels).load()
    step = 255 / (levels - 1)
    assert data.train.dtype == (torch.uint8 if kept else torch.float32)
    assert (data.spec.levels, data.spec.whole) == (levels, kept)
    want = np.round(plain.train.numpy() / step) * step
    np.testing.assert_allclose(data.train.numpy(), want, atol=1e-4)
    assert np.abs(data.train.numpy() - plain.train.numpy().astype(float)).max() <= step / 2 + 1e-4
    numbers = data.spec.to_levels(data.spec.encode(data.train))
    np.testing.assert_array_equal(numbers.numpy(), np.round(plain.train.numpy() / step))


def test_averages_and_counts_may_be_brought_to_levels(tmp_path):
    data = DataConfig(source="digits", downsample=2, levels=5).load()
    assert (data.spec.shape, data.spec.levels) == ((1, 4, 4), 5)
    assert set(data.train.unique().tolist()) == {0, 4, 8, 12, 16}
    rows = csv(tmp_path, changed(ROWS, (0, 2), 60, int), levels=7)
    assert (rows.spec.kind, rows.spec.levels, rows.spec.step) == ("counts", 7, 10)
    assert bool((rows.train % 10 == 0).all())


SPECS = {
    "image": DataSpec(kind="image", shape=(2, 2, 2), range=(0, 255), levels=256, shift=(127.5,), scale=(127.5,)),
    "coarse": DataSpec(kind="image", shape=(1, 2, 2), range=(0, 1), levels=7, shift=(0.5,), scale=(0.5,)),
    "below 0": DataSpec(kind="image", shape=(1, 2, 2), range=(-1, 1), levels=4),
    "bits": DataSpec(kind="counts", shape=(3,), range=(0, 1), levels=2, shift=(0.1, 0.5, 0.9), scale=(0.3, 0.5, 0.3)),
    "rows": DataSpec(kind="counts", shape=(2,), range=(0, 9000), levels=9001, shift=(3.2, 4000.0), scale=(1.7, 2000.0)),
    "many": DataSpec(kind="counts", shape=(1,), range=(0, 2**20), levels=2**20 + 1, shift=(5e5,), scale=(1e5,)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_levels_there_and_back(spec):
    count = min(spec.levels, 20_000)
    numbers = torch.linspace(0, spec.levels - 1, count, dtype=torch.float64).round().long()
    n = numbers.view(-1, *(1,) * len(spec.shape)).expand(-1, *spec.shape)
    x = spec.from_levels(n)
    assert x.dtype == torch.float32
    assert torch.equal(spec.to_levels(x), n)
    low, step = spec.range[0], spec.step
    values = spec.decode(x)
    torch.testing.assert_close(values, (n.double() * step + low).float(), rtol=2e-7, atol=1e-6)
    if spec.whole:
        assert torch.equal(values, values.round())
    # From anywhere: the nearest level, never beyond the ends.
    torch.testing.assert_close(spec.to_levels(spec.encode(values + 0.4 * step)), n)
    far = spec.encode(torch.full((1, *spec.shape), 10.0 * spec.range[1] + 10))
    assert bool((spec.to_levels(far) == spec.levels - 1).all())
    assert bool((spec.to_levels(-far) <= spec.levels - 1).all())
    assert bool((spec.decode(far) == spec.range[1]).all())


@pytest.mark.parametrize("most", [2**20, 2**22, 2**24])
def test_large_counts_are_refused_or_reach_the_model_as_they_are(tmp_path, most):
    try:
        data = npz(tmp_path, x=np.sort(np.random.default_rng(1).integers(0, most + 1, (5000, 1)), 0))
    except UserError as error:
        assert most > 2**20, error  # noqa: PT017 - both answers are right
        return
    assert torch.equal(data.spec.to_levels(data.spec.encode(data.train)), data.train.long())


def test_what_has_no_levels_says_so():
    spec = DataSpec(kind="points", shape=(2,))
    assert (spec.step, spec.whole) == (None, False)
    for use in (spec.to_levels, spec.from_levels):
        with pytest.raises(UserError, match=r"data: points of shape \(2,\) have no levels"):
            use(torch.zeros(3, 2))
    with pytest.raises(UserError, match=r"data of shape \(4,\) given"):
        SPECS["rows"].to_levels(torch.zeros(3, 4))


def test_the_data_that_were_there_are_what_they_were(tmp_path):
    data = DataConfig(source="digits").load()
    assert data.identity.sha256.startswith("c6bb904e9be6")
    # And points: the form that is hashed has got no new fields.
    np.savez(tmp_path / "mine.npz", x=ROWS + 0.5)
    data = DataConfig(source=f"npz:{tmp_path}/mine.npz").load()
    fields = ("kind", "shape", "range", "levels", "shift", "scale", "num_classes")
    digest = hashlib.sha256(data.spec.model_dump_json(include=set(fields)).encode())
    for part in (data.train, data.held_out):
        digest.update(str((tuple(part.shape), part.dtype)).encode())
        digest.update(part.numpy().tobytes())
    assert data.identity.sha256 == digest.hexdigest()


def test_one_end_of_two_may_be_counts(tmp_path):
    (tmp_path / "c.csv").write_text("a,b\n" + "\n".join(f"{k},{2 * k}" for k in range(12)))
    (tmp_path / "p.csv").write_text("a,b\n" + "\n".join(f"{k / 7},{k}" for k in range(12)))
    data = DataConfig(source=f"counts:{tmp_path}/c.csv", start=f"csv:{tmp_path}/p.csv", max_count=40).load()
    assert data.spec.range == (0, 40)
    data = DataConfig(source=f"csv:{tmp_path}/p.csv", start=f"counts:{tmp_path}/c.csv", max_count=40).load()
    assert data.spec.start.range == (0, 40)
    with pytest.raises(UserError, match="max_count: 5 is for counts: data; 'csv' has none to change"):
        DataConfig(source=f"csv:{tmp_path}/p.csv", start=f"csv:{tmp_path}/p.csv", max_count=5).load()
