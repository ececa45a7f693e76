"""What goes in comes out once, in order, named; what is broken is skipped, counted and named, or is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from clip_lens_ext.data import ImageBatches, Skipped, image_batches, read_image
from clip_lens_ext.errors import InputError

PIXELS = torch.rand(7, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def to_tensor(image: Image.Image) -> Tensor:
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def picture(value: int, size: tuple[int, int] = (5, 4)) -> Image.Image:
    return Image.new("RGB", size, (value, 2 * value, 3 * value))


def values(batches: ImageBatches) -> list[int]:
    """The red value of each sample, in the order in which they come out."""
    return [round(float(row[0, 0, 0]) * 255) for batch in batches for row in batch.pixels]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good pictures, four that are broken in four ways, and files that are no business of ours."""
    root = tmp_path / "pictures"
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".cache").mkdir()
    picture(20).save(root / "b" / "deep" / "two.png")
    picture(10).save(root / "a.png")
    picture(30).save(root / "b" / "three.PNG")
    picture(9).save(root / ".cache" / "thumbnail.png")
    picture(9).save(root / "._a.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "whole.jpg")
    (root / "cut.jpg").write_bytes((root / "whole.jpg").read_bytes()[:2000])
    (root / "whole.jpg").unlink()
    Image.fromarray(noise).save(root / "b" / "whole.png")
    (root / "b" / "cut.png").write_bytes((root / "b" / "whole.png").read_bytes()[:3000])
    (root / "b" / "whole.png").unlink()
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpeg").write_text("not an image")
    (root / "labels.csv").write_text("a,b")
    return root


def test_a_folder_is_read_in_sorted_order_and_the_broken_are_skipped_and_named(folder: Path) -> None:
    batches = image_batches(folder, preprocess=to_tensor, batch_size=2)
    assert len(batches) == 7
    assert values(batches) == [10, 20, 30]
    assert [name for batch in batches for name in batch.names] == ["a.png", "b/deep/two.png", "b/three.PNG"]
    assert {skip.name for skip in batches.skipped} == {"b/cut.png", "cut.jpg", "empty.png", "text.jpeg"}
    reasons = {skip.name: skip.reason for skip in batches.skipped}
    assert "truncated" in reasons["cut.jpg"]
    assert reasons["empty.png"] == "the file is empty"
    assert "not an image" in reasons["text.jpeg"]
    assert batches.n_read == 3


def test_skipped_is_of_one_pass_and_positions_count_the_skipped(folder: Path) -> None:
    batches = image_batches(folder, preprocess=to_tensor)
    first = [index for batch in batches for index in batch.indexes]
    n_skipped = len(batches.skipped)
    assert [index for batch in batches for index in batch.indexes] == first
    assert len(batches.skipped) == n_skipped == 4
    assert len(set(first)) == 3
    assert max(first) <= 6


def test_not_recursive_reads_the_top_alone(folder: Path) -> None:
    batches = image_batches(folder, preprocess=to_tensor, recursive=False)
    assert values(batches) == [10]


def test_a_link_to_a_parent_folder_ends(folder: Path) -> None:
    (folder / "b" / "up").symlink_to(folder)  # two links: a walk that follows them blindly doubles at each step
    (folder / "b" / "deep" / "up").symlink_to(folder)
    assert sorted(values(image_batches(folder, preprocess=to_tensor))) == [10, 20, 30]


def test_strict_raises_at_the_first_broken_one(folder: Path) -> None:
    with pytest.raises(InputError, match=r"cut\.png"):
        list(image_batches(folder, preprocess=to_tensor, strict=True))


def test_an_explicit_list_skips_a_broken_file_too(folder: Path) -> None:
    paths = [folder / "a.png", str(folder / "empty.png")]
    batches = image_batches(paths, preprocess=to_tensor)
    assert values(batches) == [10]
    assert batches.skipped == [Skipped(str(folder / "empty.png"), "the file is empty")]


def test_folders_with_nothing_to_read_are_errors(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="no image in the folder"):
        image_batches(tmp_path, preprocess=to_tensor)
    (tmp_path / "only.png").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"no sample could be read, 1 skipped \(only.png: not an image"):
        list(image_batches(tmp_path, preprocess=to_tensor))
    with pytest.raises(InputError, match="no such file or folder"):
        image_batches(tmp_path / "gone", preprocess=to_tensor)


def test_a_decompression_bomb_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(40, (100, 100)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4100)  # the noise pictures have 4096
    batches = image_batches(folder, preprocess=to_tensor)
    assert values(batches) == [10, 20, 30]
    assert "decompression bomb" in next(skip.reason for skip in batches.skipped if skip.name == "bomb.png")


def test_read_image_respects_the_exif_orientation(tmp_path: Path) -> None:
    image = picture(50, (6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (3, 6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_read_image_gives_rgb_from_every_mode(tmp_path: Path, mode: str) -> None:
    picture(60).convert(mode).save(tmp_path / "image.tif")
    assert read_image(tmp_path / "image.tif").mode == "RGB"


def test_sixteen_bit_grey_keeps_its_greys(tmp_path: Path) -> None:
    grey = np.array([[0, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array(read_image(tmp_path / "grey.png"))[0, :, 0].tolist() == pytest.approx([0, 127, 255], abs=1)


def test_read_image_errors_name_the_file_and_the_reason(folder: Path) -> None:
    for name, reason in [("gone.png", "no such file"), ("b", "a folder"), ("cut.jpg", "truncated")]:
        with pytest.raises(InputError, match=f"{name}.*{reason}"):
            read_image(folder / name)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_a_tensor_comes_back_whole_in_batches(batch_size: int) -> None:
    batches = image_batches(PIXELS, batch_size=batch_size)
    for _ in range(2):
        chunks = list(batches)
        assert torch.equal(torch.cat([chunk.pixels for chunk in chunks]), PIXELS)
        assert [len(chunk.pixels) for chunk in chunks[:-1]] == [batch_size] * (len(chunks) - 1)
        assert [index for chunk in chunks for index in chunk.indexes] == list(range(7))


def test_token_ids_are_samples_too() -> None:
    ids = torch.arange(12).reshape(3, 4)
    assert torch.equal(next(iter(image_batches(ids))).pixels, ids)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 1, 4, 4), "3 height width"),
        (torch.zeros(2, 4, 4, 3), "3 height width"),
        (torch.zeros(3, 4, 4), "3 height width"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.zeros(0, 3, 4, 4), "no samples"),
        (torch.zeros(2, 5), "token ids"),
        ([], "no samples"),
        ({"train": PIXELS}, "pass one split"),
        (3, "cannot read images from a int"),
        (iter([PIXELS[0]]), "only once"),
    ],
)
def test_wrong_data_is_refused_at_once(bad: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        image_batches(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_in_a_tensor_names_the_first_sample(value: float) -> None:
    bad = torch.zeros(200, 3, 2, 2)
    bad[150, 1, 0, 1] = value
    bad[151] = value
    with pytest.raises(InputError, match="sample 150 "):
        image_batches(bad)


def test_pictures_without_preprocess_are_refused(folder: Path) -> None:
    for data in (folder, picture(1), [picture(1)]):
        with pytest.raises(InputError, match="preprocess="):
            image_batches(data)
    with pytest.raises(InputError, match="preprocess="):
        list(image_batches(Pictures([1])))


def test_sizes_that_differ_name_both_samples() -> None:
    with pytest.raises(InputError, match=r"'1' is .*\[3, 2, 3\].*'0' is .*\[3, 2, 2\]"):
        list(image_batches([torch.zeros(3, 2, 2), torch.zeros(3, 2, 3)]))


class Pictures(Dataset):
    """PIL pictures in the shape of an item that is asked for; a negative value is a file that does not open."""

    def __init__(self, reds: list[int], shape: str = "bare") -> None:
        self.reds, self.shape = reds, shape

    def __len__(self) -> int:
        return len(self.reds)

    def __getitem__(self, index: int) -> object:
        if self.reds[index] < 0:
            raise OSError("image file is truncated")
        image = picture(self.reds[index])
        shapes = {"bare": image, "tuple": (image, 5), "dict": {"image": image, "label": 5}, "tensor": to_tensor(image)}
        return {**shapes, "pixel_values": {"label": 5, "pixel_values": shapes["tensor"]}}[self.shape]


@pytest.mark.parametrize("shape", ["bare", "tuple", "dict", "tensor", "pixel_values"])
def test_every_shape_of_a_dataset_item(shape: str) -> None:
    batches = image_batches(Pictures([4, -1, 6], shape), preprocess=to_tensor)
    assert values(batches) == [4, 6]
    assert batches.skipped == [Skipped("1", "image file is truncated")]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_bad_value_in_a_dataset_is_skipped_or_with_strict_an_error(value: float) -> None:
    pixels = PIXELS.clone()
    pixels[2, 1, 3, 4] = value
    batches = image_batches(TensorDataset(pixels))
    assert [index for batch in batches for index in batch.indexes] == [0, 1, 3, 4, 5, 6]
    assert batches.skipped == [Skipped("2", "it holds NaN or infinite values")]
    with pytest.raises(InputError, match=r"'2'.*NaN"):
        list(image_batches(TensorDataset(pixels), strict=True))


def test_a_bug_in_a_dataset_is_not_swallowed() -> None:
    class Buggy(Pictures):
        def __getitem__(self, index: int) -> object:
            raise AttributeError("a bug")

    with pytest.raises(AttributeError, match="a bug"):
        list(image_batches(Buggy([1]), preprocess=to_tensor))


@pytest.mark.parametrize("n_tensors", [1, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loader_gives_its_samples_whatever_its_batches(n_tensors: int, drop_last: bool) -> None:
    loader = DataLoader(TensorDataset(*[PIXELS] * n_tensors), batch_size=3, drop_last=drop_last)
    chunks = list(image_batches(loader, batch_size=4))
    expected = PIXELS[:6] if drop_last else PIXELS
    assert torch.equal(torch.cat([chunk.pixels for chunk in chunks]), expected)
    assert len(chunks[0].pixels) == 4


def test_a_loader_of_bare_tensors_and_of_dicts() -> None:
    for loader in (DataLoader(Pictures([1, 2, 3], "tensor"), 2), DataLoader(Pictures([1, 2, 3], "pixel_values"), 2)):
        assert values(image_batches(loader)) == [1, 2, 3]


def test_streams_have_no_length_but_can_be_read_again() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(PIXELS)

    batches = image_batches(Stream(), batch_size=4)
    assert batches.n_samples is None
    with pytest.raises(TypeError):
        len(batches)
    for _ in range(2):
        assert torch.equal(torch.cat([batch.pixels for batch in batches]), PIXELS)
    with pytest.raises(InputError, match="one order only"):
        batches.select([0])


def test_a_hugging_face_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [picture(7), picture(8)], "label": [0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict(columns, features=features)
    assert values(image_batches(data, preprocess=to_tensor)) == [7, 8]
    raw = data.cast_column("image", datasets.Image(decode=False))
    assert values(image_batches(raw, preprocess=to_tensor)) == [7, 8]
    with pytest.raises(InputError, match="columns"):
        image_batches(data.remove_columns("image"), preprocess=to_tensor)


def test_select_reads_the_chosen_in_the_chosen_order() -> None:
    chosen = image_batches(PIXELS, batch_size=2).select([5, 0, 3])
    assert len(chosen) == 3
    assert torch.equal(torch.cat([batch.pixels for batch in chosen]), PIXELS[[5, 0, 3]])
    assert [index for batch in chosen for index in batch.indexes] == [5, 0, 3]
    in_order = image_batches(DataLoader(TensorDataset(PIXELS), batch_size=2)).select([6, 1])
    assert torch.equal(next(iter(in_order)).pixels, PIXELS[[6, 1]])
    with pytest.raises(InputError, match=r"0\.\.6"):
        image_batches(PIXELS).select([7])
    with pytest.raises(InputError, match="one order only"):
        image_batches(DataLoader(TensorDataset(PIXELS), shuffle=True)).select([0])


def test_the_fingerprint_is_of_the_samples_not_of_the_batches() -> None:
    def fingerprint(data: object, batch_size: int = 2) -> str | None:
        batches = image_batches(data, batch_size=batch_size)
        assert batches.fingerprint is None
        list(batches)
        return batches.fingerprint

    original = fingerprint(PIXELS)
    assert original == fingerprint(PIXELS, 5) == fingerprint(TensorDataset(PIXELS))
    changed = PIXELS.clone()
    changed[3, 0, 0, 0] += 1e-6
    others = [fingerprint(other) for other in (changed, PIXELS.flip(0), PIXELS[:6], PIXELS.view(torch.int32).float())]
    others.append(fingerprint(PIXELS.reshape(7, 3, 5, 4)))
    assert len({original, *others}) == 6


def test_a_pass_that_is_broken_off_leaves_no_fingerprint() -> None:
    batches = image_batches(PIXELS, batch_size=2)
    list(batches)
    next(iter(batches))
    assert batches.fingerprint is None


def test_batches_come_back_as_they_are() -> None:
    batches = image_batches(PIXELS)
    assert image_batches(batches) is batches


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_the_batch_size_is_checked(batch_size: object) -> None:
    with pytest.raises(InputError, match="batch_size"):
        image_batches(PIXELS, batch_size=batch_size)
