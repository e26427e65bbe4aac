"""Finding, labelling, splitting and batching image files; tests/test_data_decode.py has the odd files themselves."""

import os
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tokenlearner.data.images import (
    IMAGE_SUFFIXES,
    Damaged,
    DamagedImage,
    ImageFiles,
    LabelledImages,
    collate,
    find_images,
    find_splits,
    scan_class_folders,
)
from tokenlearner.errors import InputError


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(path: Path) -> list[str]:
    return [image.relative_to(path).as_posix() for image in find_images(path)]


# ---- finding


def test_find_images_at_any_depth_sorted_without_the_hidden(tmp_path):
    put(tmp_path, "b/2.PNG", "b/10.jpeg", "a.JpG", "c/d/e.tiff", "jpg", "notes.txt", "x.jpg.part")
    put(tmp_path, ".DS_Store", "._a.jpg", ".jpg", ".cache/thumb.jpg", "b/.hidden.png")
    put(tmp_path, "folder.jpg/inside.webp")
    assert found(tmp_path) == ["a.JpG", "b/10.jpeg", "b/2.PNG", "c/d/e.tiff", "folder.jpg/inside.webp"]
    assert find_images(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]  # named by the user: taken as it is


def test_links_are_followed_once_whatever_the_order_of_listing(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    put(root, "a/1.jpg")
    put(elsewhere, "2.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    (root / "b").symlink_to(elsewhere)
    (root / "c").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    assert found(root) == ["a/1.jpg", "b/2.jpg"]
    walk = os.walk

    def listed_backwards(*args, **options):
        for directory, subfolders, names in walk(*args, **options):
            subfolders.sort(reverse=True)
            yield directory, subfolders, names

    monkeypatch.setattr(os, "walk", listed_backwards)
    assert found(root) == ["a/1.jpg", "b/2.jpg"]
    assert [path.name for path in find_images(root / "a" / "up")] == ["1.jpg", "2.jpg"]


def test_names_that_cannot_be_decoded_are_found_all_the_same(tmp_path):
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert found(tmp_path) == ["dangling.jpg", "pipe.jpg"]


def test_nothing_found(tmp_path):
    put(tmp_path, "notes.txt", ".hidden.jpg")
    for path, word in ((tmp_path, "holds no image"), (tmp_path / "gone", "does not exist")):
        with pytest.raises(InputError, match=word) as caught:
            find_images(path)
        assert str(path) in str(caught.value)
        assert all(suffix in str(caught.value).split("(")[-1] for suffix in IMAGE_SUFFIXES)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    put(tmp_path, "open/1.jpg", "closed/2.jpg")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"closed can't be listed: Permission denied"):
        find_images(tmp_path)


# ---- class folders


def test_scan_labels_by_folder(tmp_path):
    put(
        tmp_path,
        "dog.jpg/1.jpg",
        "cat/deep/er/2.png",
        "cat/1.jpg",
        "stray.jpg",
        "README.md",
        ".git/x.jpg",
        "._stray.jpg",
    )
    images = scan_class_folders(tmp_path)
    assert images.classes == ("cat", "dog.jpg")
    assert [path.relative_to(tmp_path).as_posix() for path in images.files] == [
        "cat/1.jpg",
        "cat/deep/er/2.png",
        "dog.jpg/1.jpg",
    ]
    assert images.labels == (0, 0, 1)
    assert images.strays == (tmp_path / "stray.jpg",)
    assert len(images) == 3


def test_scan_with_given_classes_keeps_their_order(tmp_path):
    put(tmp_path, "dog/1.jpg", "cat/1.jpg")
    images = scan_class_folders(tmp_path, ["dog", "cow", "cat"])
    assert images.classes == ("dog", "cow", "cat")
    assert {path.parent.name: label for path, label in zip(images.files, images.labels)} == {"dog": 0, "cat": 2}
    (tmp_path / "dog" / "1.jpg").unlink()
    (tmp_path / "dog").rmdir()
    assert scan_class_folders(tmp_path, ["cat"]).labels == (0,)  # one class is enough where the classes are known


def test_scan_errors(tmp_path):
    def refused(root: Path, *args) -> str:
        with pytest.raises(InputError) as caught:
            scan_class_folders(root, *args)
        return str(caught.value)

    assert refused(tmp_path / "gone").startswith(f"{tmp_path / 'gone'} can't be listed (No such file or directory)")
    put(tmp_path, "file/cat/1.jpg", "flat/1.jpg", "single/cat/1.jpg", "empty/cat/1.jpg", "empty/dog/notes.txt")
    assert "Not a directory" in refused(tmp_path / "flat" / "1.jpg")
    assert refused(tmp_path / "flat").startswith(f"{tmp_path / 'flat'} holds no class folder")
    assert "single class folder, cat: expected at least 2" in refused(tmp_path / "single")
    assert refused(tmp_path / "empty").startswith(f"{tmp_path / 'empty' / 'dog'} holds no image")
    assert refused(tmp_path / "single", ["dog", "cow"]) == (
        f"{tmp_path / 'single' / 'cat'} is not one of the 2 known classes: dog, cow"
    )
    many = refused(tmp_path / "single", [f"k{i}" for i in range(25)])
    assert many.endswith("not one of the 25 known classes: k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, … and 15 more")
    assert "twice" in refused(tmp_path / "single", ["cat", "cat"])


def test_find_splits(tmp_path):
    assert find_splits(tmp_path) == (tmp_path, None)
    for name in ("train", "test", "validation", "valid", "val"):
        put(tmp_path, f"{name}/cat/1.jpg")
        expected = (tmp_path, None) if name == "train" else (tmp_path / "train", tmp_path / name)
        assert find_splits(str(tmp_path)) == expected
    put(tmp_path / "vehicles", "test/1.jpg", "bus/1.jpg")
    assert find_splits(tmp_path / "vehicles") == (tmp_path / "vehicles", None)


# ---- splitting


def labelled(*sizes: int, root: str = "root") -> LabelledImages:
    names = [(Path(root, f"c{label}", f"{i:03}.jpg"), label) for label, size in enumerate(sizes) for i in range(size)]
    files, labels = zip(*names)
    return LabelledImages(files, labels, tuple(f"c{label}" for label in range(len(sizes))), strays=(Path("stray.jpg"),))


def test_subset():
    images = labelled(2, 2)
    part = images.subset(torch.tensor([3, 0]))
    assert part == LabelledImages((images.files[3], images.files[0]), (1, 0), images.classes)


@pytest.mark.parametrize("held_out", [0.001, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_split_is_stratified_and_complete(held_out):
    sizes = (1, 2, 3, 10, 101)
    images = labelled(*sizes)
    train, val = images.split(held_out, seed=3)
    assert sorted(train.files + val.files) == sorted(images.files)
    assert train.classes == val.classes == images.classes
    label_of = dict(zip(images.files, images.labels))
    for part in (train, val):
        assert [label_of[path] for path in part.files] == list(part.labels)
    kept, held = Counter(train.labels), Counter(val.labels)
    assert (kept[0], held[0]) == (1, 0)  # a single image stays in train
    for label, size in enumerate(sizes[1:], start=1):
        assert kept[label] >= 1
        assert held[label] >= 1
        assert abs(held[label] - held_out * size) <= 0.5 or held[label] in (1, size - 1)


def test_split_depends_on_the_seed_only():
    images = labelled(40, 40)
    order = list(range(80))
    random.Random(0).shuffle(order)
    once, again, shuffled, other, negative = (
        frozenset(part[1].files)
        for part in (
            images.split(0.25, 1),
            images.split(0.25, 1),
            images.subset(order).split(0.25, 1),
            images.split(0.25, 2),
            images.split(0.25, -1),
        )
    )
    assert once == again == shuffled
    assert len({once, other, negative}) == 3
    moved = labelled(40, 40, root="elsewhere").split(0.25, 1)[1]
    assert [path.parts[1:] for path in moved.files] == [path.parts[1:] for path in images.split(0.25, 1)[1].files]
    # The same on every machine and Python, so that a score can be compared with one reported earlier.
    assert [path.stem for path in labelled(8, 8).split(0.25, 0)[1].files] == ["000", "007", "001", "007"]


def test_multi_label_images_are_split_as_one_group():
    files = tuple(Path(f"{i:02}.jpg") for i in range(20))
    images = LabelledImages(files, ((0,), (), (0, 1), (2,)) * 5, ("a", "b", "c"))
    assert images.multilabel
    train, val = images.split(0.3, 1)
    assert (len(train), len(val)) == (14, 6)  # by class, of five images each, it would be 8
    assert sorted(train.files + val.files) == list(files)
    label_of = dict(zip(images.files, images.labels))
    assert [label_of[file] for part in (train, val) for file in part.files] == list(train.labels + val.labels)
    backwards = images.subset(range(19, -1, -1))
    assert set(backwards.split(0.3, 1)[1].files) == set(val.files) != set(images.split(0.3, 2)[1].files)
    with pytest.raises(InputError, match="none of 1 images"):
        images.subset([0]).split(0.5, 0)


def test_as_multilabel():
    images = labelled(1, 2)
    assert not images.multilabel
    several = images.as_multilabel()
    assert several == LabelledImages(images.files, ((0,), (1,), (1,)), images.classes, images.strays)
    assert several.as_multilabel() is several


def test_the_classes_are_not_split_alike():
    val = labelled(40, 40).split(0.25, 1)[1]
    assert {p.stem for p in val.files if p.parent.name == "c0"} != {p.stem for p in val.files if p.parent.name == "c1"}


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 1.5, float("nan")])
def test_split_refuses_shares_that_leave_a_part_empty(held_out):
    with pytest.raises(InputError, match="above 0 and below 1"):
        labelled(5, 5).split(held_out, 0)


def test_split_refuses_where_no_class_has_two():
    with pytest.raises(InputError, match="none of 3 images can be held out"):
        labelled(1, 1, 1).split(0.5, 0)


# ---- reading


def first_pixel(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(picture.getpixel((0, 0)))


@pytest.fixture
def folder(tmp_path) -> LabelledImages:
    """40 images whose red channel is their index; numbers 3, 11 and 27 are damaged in three ways."""
    for i in range(40):
        path = tmp_path / f"class{i // 20}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((5, 4, 3), (i, 7, 9), np.uint8)).save(path)
    (tmp_path / "class0" / "03.png").write_bytes(b"")
    whole = (tmp_path / "class0" / "11.png").read_bytes()
    (tmp_path / "class0" / "11.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "class1" / "27.png").write_text("not an image")
    return scan_class_folders(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_good_file_comes_once_and_every_damaged_one_is_named(folder, workers):
    loader = DataLoader(
        ImageFiles(folder, first_pixel), batch_size=4, shuffle=True, num_workers=workers, collate_fn=collate
    )
    batches = list(loader)
    indices = torch.cat([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == [i for i in range(40) if i not in (3, 11, 27)]
    assert torch.equal(torch.cat([batch.images for batch in batches])[:, 0], indices)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), indices // 20)
    damaged = [one for batch in batches for one in batch.damaged]
    assert sorted(one.path for one in damaged) == [str(folder.files[i]) for i in (3, 11, 27)]
    assert {one.reason for one in damaged if one.path.endswith("03.png")} == {"the file is empty"}


@pytest.mark.parametrize("workers", [0, 2])
def test_multi_label_targets(folder, workers):
    labels = tuple(((), (2,), (2, 0))[i % 3] for i in range(40))
    images = LabelledImages(folder.files, labels, ("a", "b", "c"))
    loader = DataLoader(ImageFiles(images, first_pixel), batch_size=40, num_workers=workers, collate_fn=collate)
    (batch,) = loader
    assert batch.labels.dtype == torch.float32
    expected = [[[0, 0, 0], [0, 0, 1], [1, 0, 1]][i % 3] for i in range(40) if i not in (3, 11, 27)]
    assert batch.labels.tolist() == expected


def failure_of(loader: DataLoader) -> DamagedImage:
    """Without its traceback, which would hold on to the loader: torch takes 10 s to end workers it finds as garbage."""
    try:
        list(loader)
    except DamagedImage as error:
        return error.with_traceback(None)
    pytest.fail("nothing was raised")


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_names_the_file_also_from_a_worker(folder, workers):
    files = ImageFiles(folder.subset([0, 27]), first_pixel, on_error="raise")
    error = failure_of(DataLoader(files, num_workers=workers, collate_fn=collate))
    assert error.path == str(folder.files[27])
    assert str(error).startswith(f"{folder.files[27]}: not an image of a known format")
    assert "\n" not in str(error)


def test_a_transform_that_fails_is_not_a_damaged_file(folder):
    def broken(picture):
        raise ValueError("in the transform")

    with pytest.raises(ValueError, match="in the transform"):
        ImageFiles(folder, broken)[0]


def test_dataset_is_picklable(folder):
    dataset = pickle.loads(pickle.dumps(ImageFiles(folder, first_pixel)))
    assert len(dataset) == 40
    image, label, index = dataset[21]
    assert (image.tolist(), label, index) == ([21, 7, 9], 1, 21)
    assert dataset[3] == Damaged(str(folder.files[3]), "the file is empty")


def test_collate_without_a_readable_image():
    lost = Damaged("a.jpg", "empty")
    batch = collate([lost, lost])
    assert [tuple(part.shape) for part in batch[:3]] == [(0,), (0,), (0,)]
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert batch.damaged == (lost, lost)


def test_collate_stacks_in_order():
    batch = collate([(torch.tensor([1.0]), 5, 8), Damaged("a.jpg", "empty"), (torch.tensor([2.0]), 6, 9)])
    assert batch.images.tolist() == [[1.0], [2.0]]
    assert (batch.labels.tolist(), batch.indices.tolist(), len(batch.damaged)) == ([5, 6], [8, 9], 1)
