"""What DATA may be: every kind is recognised, split the same way, and named the same way in held_out.json."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tokenlearner.data.images import LabelledImages
from tokenlearner.data.sharding import write_shards
from tokenlearner.data.sources import find_parts, held_out_names, name_of, read_images, read_parts, read_split
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import images_to_score

CLASSES = ("ant", "bee")


def folders(root: Path, each: int = 4) -> Path:
    for position, name in enumerate(CLASSES):
        for i in range(each):
            path = root / name / f"{name}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (60 * i, 200 * position, 0)).save(path)
    return root


def table(path: Path, rows: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows.items()])
    return path


def listed(path: Path, each: int = 4) -> Path:
    return table(path, {f"{name}/{name}{i}.png": name for name in CLASSES for i in range(each)})


def stems(images: LabelledImages) -> set[str]:
    """Of the original files, whether they lie in a shard or not."""
    return {Path(source.name).stem.rpartition("-")[2] for source in images.files}


@pytest.fixture(params=["folders", "list", "shards", "one shard", "their shards"])
def unsplit(request, tmp_path) -> Path:
    photos = folders(tmp_path / "photos")
    if request.param == "folders":
        return photos
    if request.param == "list":
        return listed(photos / "all.csv")
    write_shards(photos, tmp_path / "shards", per_shard=3 if request.param != "one shard" else 100)
    if request.param == "their shards":
        (tmp_path / "shards" / "dataset.json").rename(tmp_path / "shards" / "notes.json")
        (tmp_path / "shards" / "classes.txt").write_text("ant\nbee\n")
    return tmp_path / "shards" / ("data-000000.tar" if request.param == "one shard" else "")


def test_without_an_evaluation_part_one_is_split_off(unsplit):
    data = read_images(unsplit, 0.25, 3)
    assert data.held_out_of == unsplit
    assert data.train.classes == data.val.classes == CLASSES
    assert sorted(data.train.labels) == [0, 0, 0, 1, 1, 1]
    assert sorted(data.val.labels) == [0, 1]
    assert stems(data.train).isdisjoint(stems(data.val))
    for images in (data.train, data.val):
        for source, label in zip(images.files, images.labels):
            assert CLASSES[label] in source.name
    again, other = (held_out_names(read_images(unsplit, 0.25, seed)) for seed in (3, 5))
    assert held_out_names(data) == again != other
    assert stems(read_split(unsplit)) == stems(data.train) | stems(data.val)
    assert read_split(unsplit, ("bee", "cow", "ant")).labels.count(2) == 4


def test_what_training_held_out_is_found_again_wherever_the_data_lies_now(unsplit, tmp_path):
    data = read_images(unsplit, 0.25, 3)
    (tmp_path / "held_out.json").write_text(json.dumps({"files": held_out_names(data)}))
    moved = tmp_path / "elsewhere"
    folder = unsplit if unsplit.is_dir() else unsplit.parent
    folder.rename(moved)
    model = torch.nn.Identity()
    model.label_names = CLASSES
    now = moved if folder == unsplit else moved / unsplit.name
    images, which = images_to_score(model, tmp_path, now)
    assert which == "the 2 images held out in training (of 8)"
    assert stems(images) == stems(data.val)
    assert len(images_to_score(model, tmp_path, now, "all")[0]) == 8


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
@pytest.mark.parametrize("kind", ["folders", "lists", "shards", "folders of shards", "named shards"])
def test_an_evaluation_part_is_taken_as_it_is(tmp_path, kind, name):
    data, photos = tmp_path / "data", tmp_path / "photos"
    folders(photos / "train")
    folders(photos / name, 1)
    if kind == "folders":
        data = photos
    elif kind == "lists":
        listed(data / "train.csv")
        listed(data / f"{name}.csv", 1)
    elif kind == "shards":
        write_shards(photos, data)
        name = "val"
    else:
        data.mkdir()
        write_shards(photos / "train", tmp_path / "a")
        write_shards(photos / name, tmp_path / "b")
        for part, written in (("train", "a"), (name, "b")):
            target = data / part / "0.tar" if kind == "folders of shards" else data / f"photos-{part}-0.tar"
            target.parent.mkdir(exist_ok=True)
            (tmp_path / written / "data-000000.tar").rename(target)
        (data / "classes.txt").write_text("\n".join(CLASSES))
    images = read_images(data, 0.5, 0)
    assert (len(images.train), len(images.val), images.held_out_of) == (8, 2, None)
    assert images.train.classes == images.val.classes == CLASSES
    assert images.val.labels == (0, 1)
    assert stems(images.val) == {"ant0", "bee0"}
    assert held_out_names(images) == []
    swapped = read_split(data, ("bee", "ant"))
    assert (swapped.labels, swapped.classes) == ((1, 0), ("bee", "ant"))
    called = {"folders": f"{name}/", "folders of shards": f"{name}/", "lists": f"{name}.csv"}
    model = torch.nn.Identity()
    model.label_names = ("bee", "ant")
    assert images_to_score(model, tmp_path, data) == (
        swapped,
        f"the images in {called.get(kind, f'the {name} shards')}",
    )


def test_strays_are_kept_where_a_part_is_split_off(tmp_path):
    folders(tmp_path)
    (tmp_path / "stray.jpg").touch()
    assert read_images(tmp_path, 0.5, 0).train.strays == (tmp_path / "stray.jpg",)


def test_an_archive_beside_its_folders_is_no_shard(tmp_path):
    folders(tmp_path)
    (tmp_path / "photos.tar").touch()
    assert len(read_split(tmp_path)) == 8
    for other in (b'{"title": "somebody else\'s"}', b"[1]", b"{", b"\xff"):
        (tmp_path / "dataset.json").write_bytes(other)
        assert len(read_split(tmp_path)) == 8


def test_other_tars_belong_to_no_part_where_there_are_two(tmp_path):
    folders(tmp_path / "photos" / "train")
    folders(tmp_path / "photos" / "val", 1)
    write_shards(tmp_path / "photos", tmp_path / "shards")
    (tmp_path / "shards" / "dataset.json").unlink()
    (tmp_path / "shards" / "extra-0.tar").write_text("not read")
    train, val = read_parts(tmp_path / "shards")
    assert (len(train), len(val)) == (8, 2)
    (tmp_path / "shards" / "val-000000.tar").unlink()
    assert find_parts(tmp_path / "shards")[1] is None
    with pytest.raises(InputError, match=r"extra-0\.tar can't be read as a tar"):
        read_parts(tmp_path / "shards")


@pytest.mark.parametrize("several", ["train", "val"])
def test_both_parts_are_multi_label_if_one_is(tmp_path, several):
    single = {"a.jpg": "cat", "b.jpg": "dog"}
    for name in ("train", "val"):
        table(tmp_path / f"{name}.csv", single | ({"c.jpg": "cat;dog"} if name == several else {}))
    data = read_images(tmp_path, 0.5, 0)
    assert (data.train.labels[:2], data.val.labels[:2]) == (((0,), (1,)),) * 2
    assert {"train": data.train, "val": data.val}[several].labels[2] == (0, 1)


def test_names_in_held_out_json(tmp_path):
    assert name_of(tmp_path / "a" / "1.jpg", tmp_path) == "a/1.jpg"
    assert name_of(tmp_path / "a" / "1.jpg", tmp_path / "list.csv") == "a/1.jpg"
    assert name_of(Path("/far/1.jpg"), tmp_path / "list.csv") == "/far/1.jpg"
    (tmp_path / "folder.csv").mkdir()
    assert name_of(tmp_path / "folder.csv" / "a" / "1.jpg", tmp_path / "folder.csv") == "a/1.jpg"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone", "gone can't be listed"),
        ("gone.csv", "gone.csv can't be read (No such file or directory)"),
        ("gone.tar", "gone.tar can't be read as a tar (No such file or directory)"),
        ("notes.txt", "notes.txt is neither a .csv nor a .tar"),
        ("photos.tgz", "photos.tgz is compressed"),
        ("empty", "empty holds no class folder"),
    ],
)
def test_what_is_no_data(tmp_path, name, reason):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "photos.tgz").write_bytes(b"\x1f\x8b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        read_images(tmp_path / name, 0.5, 0)
    assert str(caught.value).startswith(f"{tmp_path}/{reason}")
