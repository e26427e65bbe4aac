"""What DATA of videos may be: every kind is recognised, and what it does not say itself is asked for by name."""

import csv
import json
from pathlib import Path

import pytest

from tokenlearner.data.clip_sources import (
    Listing,
    clip_name,
    find_clip_parts,
    holds_videos,
    read_clip_data,
    read_clips_to_score,
)
from tokenlearner.errors import InputError

CHARADES = "id,actions\nAAAAA,c001 1.5 4.0;c000 0.0 9.9\nBBBBB,\nCCCCC,c001 0.0 2.0\nGGGGG,c000 0.0 2.0\n"
KINETICS = "label,youtube_id,time_start,time_end,split\nhug,AAAAA,0,10,train\nkick,BBBBB,5,15,train\n"


def put(root: Path, *names: str) -> Path:
    """Files that only have to be there."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def table(path: Path, *rows: tuple[str, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])
    return path


@pytest.fixture
def charades(tmp_path) -> tuple[Path, Listing]:
    classes = write(tmp_path / "classes.txt", "c000 Holding clothes\nc001 Sitting\n")
    videos = put(tmp_path / "videos", "AAAAA.mp4", "BBBBB.mp4", "CCCCC.mp4")
    return write(tmp_path / "Charades_train.csv", CHARADES), Listing(videos=videos, classes=classes)


# ---- images or videos


def test_videos_are_told_from_pictures(tmp_path):
    videos = put(tmp_path / "videos", "hug/a.mp4", "kick/b.webm", "kick/cover.jpg")
    pictures = put(tmp_path / "pictures", "cat/a.jpg", "dog/b.gif", "dog/film.mp4", "dog/c.png")
    assert holds_videos(videos)
    assert not holds_videos(pictures)
    assert not holds_videos(table(tmp_path / "a.csv", ("a.jpg", "cat"), ("b.png", "dog")))
    assert holds_videos(table(tmp_path / "b.csv", ("a.mp4", "cat"), ("b.MKV", "dog")))
    assert holds_videos(write(tmp_path / "c.csv", CHARADES))
    assert holds_videos(write(tmp_path / "d.csv", KINETICS))
    assert holds_videos(write(tmp_path / "avid.json", "{}"))
    assert not holds_videos(put(tmp_path, "shard.tar") / "shard.tar")


def test_folders_of_pictures_are_videos_where_they_have_a_rate(tmp_path):
    folder = put(tmp_path, "hug/one/1.jpg", "hug/one/2.jpg", "kick/two/1.jpg")
    assert not holds_videos(folder)
    listing = Listing(frame_fps=10.0)
    assert holds_videos(folder, listing)
    (train, val) = find_clip_parts(folder, listing)
    assert ([str(file) for file in train.read(None).files], val) == (
        [str(folder / "hug/one"), str(folder / "kick/two")],
        None,
    )


def test_two_lists_in_a_folder(tmp_path):
    put(tmp_path, *(f"{name}.mp4" for name in "abcd"))
    table(tmp_path / "train.csv", ("a.mp4", "hug"), ("b.mp4", "kick"))
    table(tmp_path / "val.csv", ("c.mp4", "kick"), ("d.mp4", "hug"))
    assert holds_videos(tmp_path)
    data = read_clip_data(tmp_path, 0.2, 0)
    assert (data.train.labels, data.val.labels, data.held_out_of) == ((0, 1), (1, 0), None)
    assert read_clips_to_score(tmp_path, ("kick", "hug"))[0].labels == (0, 1)


def test_train_and_val_folders(tmp_path):
    put(tmp_path, "train/hug/a.mp4", "train/kick/b.mp4", "val/kick/c.mp4", "val/hug/d.mp4")
    data = read_clip_data(tmp_path, 0.2, 0)
    assert ([file.name for file in data.val.files], data.val.labels) == (["d.mp4", "c.mp4"], (0, 1))
    assert read_clips_to_score(tmp_path, ("hug", "kick"))[1:] == ("val/", False)


def test_a_part_is_split_off_where_there_is_none(tmp_path):
    put(tmp_path, *(f"{name}/{i}.mp4" for name in ("hug", "kick") for i in range(4)))
    data = read_clip_data(tmp_path, 0.25, 3)
    assert (len(data.train), len(data.val), data.held_out_of) == (6, 2, tmp_path)
    assert sorted(clip_name(file, tmp_path)[:4] for file in data.val.files) == ["hug/", "kick"]


# ---- the lists of others


def test_charades_is_told_by_its_columns(charades):
    path, listing = charades
    clips = find_clip_parts(path, listing)[0].read(None)
    assert clips.classes == ("Holding clothes", "Sitting")
    assert clips.labels == ((0, 1), (), (1,))
    assert clip_name(clips.files[0], path, listing) == "AAAAA.mp4"


def test_videos_of_charades_without_an_action_are_trained_on_but_not_scored(charades):
    path, listing = charades
    data = read_clip_data(path, 0.2, 0, Listing(listing.videos, listing.classes, val=path))
    assert (data.train.labels, data.val.labels) == (((0, 1), (), (1,)), ((0, 1), (1,)))
    assert [video.name for video in data.val.missing] == ["GGGGG.mp4"]
    scored, name, is_all = read_clips_to_score(path, data.train.classes, listing)
    assert (scored.labels, name, is_all) == (((0, 1), (1,)), "Charades_train.csv", True)


def test_kinetics_is_told_by_its_columns(tmp_path):
    path = write(tmp_path / "kinetics.csv", KINETICS)
    videos = put(tmp_path / "videos", "kick/BBBBB.mp4", "hug/AAAAA_000000_000010.mp4")
    names = write(tmp_path / "labels.txt", "kick\nhug\n")
    clips = find_clip_parts(path, Listing(videos, names))[0].read(None)
    assert (clips.classes, clips.labels, clips.spans) == (("kick", "hug"), (1, 0), (None, (5.0, 15.0)))
    assert find_clip_parts(path, Listing(videos))[0].read(None).classes == ("hug", "kick")


def test_avid_is_told_by_its_ending(tmp_path):
    path = write(tmp_path / "avid.json", json.dumps({"a.mp4": "hug", "b.mp4": "kick", "c.mp4": "hug"}))
    tree = {"hug": {"parents": ["contact"]}, "kick": {"parents": [""]}, "contact": {"parents": [""]}}
    videos = put(tmp_path / "videos", "a.mp4", "b.mp4")
    assert find_clip_parts(path, Listing(videos))[0].read(None).labels == (0, 1)
    above = Listing(videos, hierarchy=write(tmp_path / "tree.json", json.dumps(tree)))
    assert find_clip_parts(path, above)[0].read(None).labels == ((0, 1), (2,))


# ---- refusals


def test_what_a_list_lacks_is_asked_for(charades, tmp_path):
    path, listing = charades
    with pytest.raises(
        InputError, match=r"Charades_train\.csv is a list of Charades, which does not say .* --videos FOL"
    ):
        find_clip_parts(path)
    with pytest.raises(InputError, match="give its class file too, --classes"):
        find_clip_parts(path, Listing(videos=listing.videos))
    with pytest.raises(InputError, match=r"k\.csv is a list of Kinetics, which does not say"):
        find_clip_parts(write(tmp_path / "k.csv", KINETICS))
    with pytest.raises(InputError, match=r"a\.json is a list of AViD, which does not say"):
        find_clip_parts(write(tmp_path / "a.json", "{}"))
    with pytest.raises(InputError, match="--val goes with a list to train on"):
        find_clip_parts(tmp_path, Listing(val=path))
    with pytest.raises(InputError, match=r"notes\.txt is no list of videos"):
        find_clip_parts(put(tmp_path, "notes.txt") / "notes.txt")
    with pytest.raises(InputError, match=r"gone\.csv can't be read"):
        find_clip_parts(tmp_path / "gone.csv")


def test_other_classes_than_the_models(charades):
    path, listing = charades
    with pytest.raises(InputError, match=r"classes\.txt names other classes than the 2 wanted"):
        read_clips_to_score(path, ("Sitting", "Holding clothes"), listing)


def test_nothing_to_score(charades, tmp_path):
    _, listing = charades
    empty = write(tmp_path / "test.csv", "id,actions\nAAAAA,\n")
    with pytest.raises(InputError, match=r"none of the 1 videos in test\.csv has an action"):
        read_clips_to_score(empty, ("Holding clothes", "Sitting"), listing)


def test_names_are_the_same_wherever_the_data_lies(tmp_path):
    inside, beside = tmp_path / "set/hug/a.mp4", tmp_path / "other/b.mp4"
    assert clip_name(inside, tmp_path / "set") == "hug/a.mp4"
    assert clip_name(inside, tmp_path / "set/list.csv") == "hug/a.mp4"
    assert clip_name(beside, tmp_path / "set") == beside.as_posix()
