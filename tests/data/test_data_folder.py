import re
import warnings

import numpy as np
import psutil
import pytest
from PIL import Image

from osmose.data.dataset import DataConfig
from osmose.errors import UserError

RNG = np.random.default_rng(0)


def load(folder, **settings):
    return DataConfig(source=f"folder:{folder}", **settings).load()


def picture(width=8, height=8, mode="RGB"):
    bands = len(mode) if mode != "1" else 1
    pixels = RNG.integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if bands == 1 else pixels)


def fill(folder, count=5, **form):
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [picture(**form) for _ in range(count)]
    for number, image in enumerate(pictures):
        image.save(folder / f"{number:03}.png")
    return pictures


def everything(data):
    """All images of a data set, in a canonical order."""
    both = np.concatenate([data.train.numpy(), data.held_out.numpy()])
    return sorted(image.tobytes() for image in both)


def test_pngs_come_back_as_written(tmp_path):
    pictures = fill(tmp_path / "private" / "cats", 12, width=6, height=4)
    data = load(tmp_path / "private" / "cats")
    assert data.spec.shape == (3, 4, 6)
    assert (data.spec.range, data.spec.levels, data.spec.num_classes) == ((0, 255), 256, None)
    assert (len(data.train), len(data.held_out)) == (11, 1)
    assert everything(data) == sorted(np.asarray(image).transpose(2, 0, 1).tobytes() for image in pictures)
    assert data.identity.source == "folder:cats"
    assert "private" not in data.identity.to_json().__str__()
    assert data.identity == load(tmp_path / "private" / "cats").identity
    assert data.identity.sha256 != load(tmp_path / "private" / "cats", split_seed=1).identity.sha256


def test_all_endings_are_found_at_any_depth(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("1.png", "2.JPG", "a/3.jpeg", "a/b/4.webp", "a/b/5.bmp"):
        picture().save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / ".hidden.png").write_text("nor this")
    data = load(tmp_path)
    assert len(data.train) + len(data.held_out) == 5
    assert data.train_labels is None


def test_sub_folders_are_classes(tmp_path):
    for value, name in ((10, "dog"), (20, "ant"), (30, "cat")):
        (tmp_path / name / "deep").mkdir(parents=True)
        for number in range(4):
            Image.new("L", (3, 3), value).save(tmp_path / name / "deep" / f"{number}.png")
    data = load(tmp_path)
    assert data.class_names == ("ant", "cat", "dog")
    assert data.spec.num_classes == 3
    value = {0: 20, 1: 30, 2: 10}
    for images, labels in (data.part("train"), data.part("held-out")):
        assert images[:, 0, 0, 0].tolist() == [value[label] for label in labels.tolist()]
    Image.new("L", (3, 3)).save(tmp_path / "loose.png")
    assert load(tmp_path).train_labels is None


def test_one_sub_folder_is_no_class(tmp_path):
    fill(tmp_path / "images")
    assert load(tmp_path).train_labels is None


def test_parts_are_not_taken_for_classes(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "Test")
    with pytest.raises(UserError, match=rf"sub-folders Test, train look like parts.*folder:{tmp_path.name}/train"):
        load(tmp_path)


def test_size_crops_the_centre_square_and_filters(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    wide[::2, 20:40] += 40
    for number in range(3):
        Image.fromarray(wide).save(tmp_path / f"wide{number}.png")
        Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / f"tall{number}.png")
    data = load(tmp_path, size=10)
    assert data.spec.shape == (3, 10, 10)
    # Stripes finer than the new pixels average out; without the antialiasing they would be 200 or 240.
    assert np.abs(data.train.numpy()[:, :, 2:-2, 2:-2].astype(int) - 220).max() <= 3


def test_small_images_are_enlarged(tmp_path):
    fill(tmp_path, 4, width=5, height=7)
    assert load(tmp_path, size=16).spec.shape == (3, 16, 16)


def test_different_sizes_need_a_size(tmp_path):
    fill(tmp_path, 3)
    picture(9, 8).save(tmp_path / "zebra.png")
    with pytest.raises(UserError, match=r"different sizes, 8x8 \(000\.png\) and 9x8 \(zebra\.png\); .* --size"):
        load(tmp_path)
    assert load(tmp_path, size=8).spec.shape == (3, 8, 8)


def test_exif_orientation_is_honoured(tmp_path):
    upright = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    for number in range(3):
        Image.fromarray(np.rot90(upright)).save(tmp_path / f"{number}.png", exif=exif)
    data = load(tmp_path)
    assert np.array_equal(data.train[0].numpy(), upright.transpose(2, 0, 1))
    Image.fromarray(np.rot90(upright)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match=r"different sizes, 6x4 \(0\.png\) and 4x6 \(plain\.png\)"):
        load(tmp_path)


def test_channels_follow_the_files_or_the_configuration(tmp_path):
    for number in range(3):
        Image.new("L", (4, 4), 50).save(tmp_path / f"{number}.png")
    assert load(tmp_path).spec.shape == (1, 4, 4)
    assert load(tmp_path, channels=3).spec.shape == (3, 4, 4)
    Image.new("RGB", (4, 4), (50, 50, 50)).save(tmp_path / "colour.png")
    assert load(tmp_path).spec.shape == (3, 4, 4)
    grey = load(tmp_path, channels=1)
    assert grey.spec.shape == (1, 4, 4)
    assert grey.train.unique().tolist() == [50]


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("1", (2, 2), 1), [255]),
        (Image.fromarray(np.full((2, 2), 30000, np.uint16)), [round(30000 / 257)]),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), [255, 255, 255]),
        (Image.new("LA", (2, 2), (0, 0)), [255]),
        (Image.new("RGB", (2, 2), (1, 2, 3)).quantize(4), [1, 2, 3]),
    ],
)
def test_modes_become_eight_bits(tmp_path, image, pixel):
    for number in range(3):
        image.save(tmp_path / f"{number}.png")
    assert load(tmp_path).train[0, :, 0, 0].tolist() == pixel


def test_one_bad_file_among_many_is_named(tmp_path):
    fill(tmp_path, 1000, width=4, height=4)
    whole = picture(64, 64)
    whole.save(tmp_path / "500b.png")
    content = (tmp_path / "500b.png").read_bytes()
    (tmp_path / "500b.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cannot read 500b\.png \(.*; --skip-bad leaves such files out") as error:
        load(tmp_path, size=4)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"left out 1 of 1001 files that cannot be read: 500b\.png \(") as caught:
        data = load(tmp_path, size=4, skip_bad=True)
    assert len(caught) == 1
    assert len(data.train) + len(data.held_out) == 1000


def test_skipped_files_keep_labels_in_step(tmp_path):
    for value, name in ((10, "a"), (20, "b")):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("L", (3, 3), value).save(tmp_path / name / f"{number}.png")
    (tmp_path / "a" / "1b.png").write_text("no image")
    (tmp_path / "b" / "0.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=re.escape("left out 2 of 9")):
        data = load(tmp_path, skip_bad=True)
    for images, labels in (data.part("train"), data.part("held-out")):
        assert images[:, 0, 0, 0].tolist() == [(10, 20)[label] for label in labels.tolist()]


def test_good_folders_do_not_warn(tmp_path):
    fill(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, skip_bad=True)


def test_nothing_readable_is_refused_even_when_skipping(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"none of its 3 image files can be read, for example 0\.jpg"):
        load(tmp_path, skip_bad=True)


def test_empty_folders_and_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no images \(\.png, .*\) in this folder$"):
        load(tmp_path)
    (tmp_path / "a.tiff").write_bytes(b"")
    with pytest.raises(UserError, match=r"it holds 1 other file\(s\), for example a\.tiff"):
        load(tmp_path)
    with pytest.raises(UserError, match="is a file; a folder of images is needed"):
        load(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="no such file or folder"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match="folder needs a path: write it as folder:PATH"):
        DataConfig(source="folder").load()


def test_too_few_images_are_refused(tmp_path):
    fill(tmp_path, 2)
    with pytest.raises(UserError, match=r"2 item\(s\); at least 3 are needed"):
        load(tmp_path)


def test_more_than_memory_is_refused_with_numbers(tmp_path, monkeypatch):
    fill(tmp_path, 4)
    memory = psutil.virtual_memory()._replace(available=2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(UserError, match=r"4 images of 3x16384x16384 need 6\.0 GiB .* 1\.0 GiB are free"):
        load(tmp_path, size=2**14)
