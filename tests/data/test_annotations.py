"""Published lists of videos: their layouts, their oddities, what is missing, and what each broken one is called."""

import csv
import json
from pathlib import Path

import pytest

from tokenlearner.data.annotations import (
    read_avid,
    read_charades,
    read_clip_list,
    read_kinetics,
    read_labels,
    scan_video_folders,
)
from tokenlearner.data.clips import Event
from tokenlearner.data.videos import FrameFolder
from tokenlearner.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(read, path: Path, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        read(path, *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


# ---- class lists


def test_labels(tmp_path):
    path = write(tmp_path / "labels.txt", b"\xef\xbb\xbfair drumming\r\nabseiling\r\n\r\n")
    assert read_labels(path) == ("air drumming", "abseiling")  # a line is a number: not sorted
    assert "names no class" in refused(read_labels, write(path, "\n"))
    assert "twice" in refused(read_labels, write(path, "a\nb\na\n"))
    assert "is no text in UTF-8" in refused(read_labels, write(path, b"caf\xe9\n"))
    assert "can't be read (No such file or directory)" in refused(read_labels, tmp_path / "gone.txt")


@needs_shared
@pytest.mark.parametrize(
    ("name", "count", "place", "label"),
    [
        ("kinetics400", 400, 1, "air drumming"),
        ("kinetics600", 600, 1, "acting in play"),
        ("ucf101", 101, 0, "ApplyEyeMakeup"),
        ("hmdb51", 51, 2, "catch"),
        ("jester", 27, 1, "Swiping Right"),
        ("something_v2", 174, 0, "Approaching something with your camera"),
    ],
)
def test_published_labels(name, count, place, label):
    labels = read_labels(SHARED / "annotations" / f"{name}_labels.txt")
    assert (len(labels), labels[place]) == (count, label)


# ---- Charades

CHARADES_HEADER = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\r\n"
CHARADES_ROWS = (
    'AAAAA,T0,Kitchen,1,1,Yes,"One, two.",box;cup,"A, b;c.",c001 1.50 4.00;c000 0.00 99.90;c001 6.00 7.00,8.5\r\n'
    'BBBBB,T0,Other,,,Yes,"Says ""hi""\r\nand goes.",,x,,12.3\r\n'
    "CCCCC,T1,Other,2,2,No,x,y,z,c002 0.00 2.00,5\r\n"
    "DDDDD,T1,Other,2,2,No,x,y,z,c002 3.00 2.00,5\r\n"
)


@pytest.fixture
def charades(tmp_path) -> tuple[Path, Path, Path]:
    classes = write(tmp_path / "classes.txt", "c000 Holding some clothes\nc001 Putting, clothes\nc002 Taking clothes\n")
    path = write(tmp_path / "train.csv", CHARADES_HEADER + CHARADES_ROWS)
    return path, put(tmp_path / "videos", "AAAAA.mp4", "BBBBB.mp4", "DDDDD.mp4"), classes


def test_charades(charades):
    path, videos, _ = charades
    clips = read_charades(*charades)
    assert clips.classes == ("Holding some clothes", "Putting, clothes", "Taking clothes")
    assert clips.files == tuple(videos / f"{name * 5}.mp4" for name in "ABD")
    assert clips.labels == ((0, 1), (), (2,))  # each class once; none is a label too
    assert clips.multilabel
    assert clips.events[0] == (Event(1, 1.5, 4.0), Event(0, 0.0, 99.9), Event(1, 6.0, 7.0))
    assert clips.events[1] == ()
    assert clips.spans is None
    assert clips.missing == (videos / "CCCCC.mp4",)
    assert path.read_bytes().count(b"\r\n") == 6  # one of them inside quotes


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("id,subject", "ids,subject", " has no column 'id': its columns are ids, subject"),
        ("c002 0.00", "c009 0.00", ", line 5: label 'c009' is not one of the 3 known classes: c000, c001, c002"),
        ("c002 0.00", "c002", ", line 5: action 'c002 2.00': expected a class, its start and its end"),
        ("c002 0.00", "c002 zero", ", line 5: 'zero' is no time: expected seconds"),
        ("c002 0.00", "c002 nan", ", line 5: 'nan' is no time"),
        ("c002 0.00", "c002 -1", ", line 5: '-1' is no time"),
        ("c002 0.00 2.00,5", "c002 0.00 2.00", ", line 5 has 10 cells, the header 11"),
    ],
)
def test_broken_charades(charades, old, new, reason):
    path, videos, classes = charades
    write(path, path.read_bytes().decode().replace(old, new, 1))
    assert refused(read_charades, path, videos, classes).startswith(reason)


def test_broken_charades_classes_and_no_videos(charades, tmp_path):
    path, _, classes = charades
    gone = tmp_path / "elsewhere"
    assert refused(read_charades, path, gone, classes) == (
        f" gives no clip: none of its 4 videos is there, {gone / 'AAAAA.mp4'} the first"
    )
    for text, line in (("c000 A\nB\n", 2), ("c000\n", 1), ("c000 A\nc000 B\n", 2), ("Holding\n", 1)):
        sentence = refused(read_charades, path, gone, write(classes, text))
        assert f"classes.txt, line {line}: " in sentence
        assert "is no new class: expected a code and a name" in sentence


@needs_shared
@pytest.mark.parametrize("part", ["train", "test"])
def test_all_of_the_published_layout(part, tmp_path):
    folder = SHARED / "annotations"
    path = folder / f"charades_format_{part}.csv"
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    put(tmp_path, *(f"{row['id']}.mp4" for row in rows[1:]))
    clips = read_charades(path, tmp_path, folder / "charades_format_classes.txt")
    assert (len(clips), len(clips.classes)) == (len(rows) - 1, 157)
    assert clips.missing == (tmp_path / f"{rows[0]['id']}.mp4",)
    for row, file, label, events in zip(rows[1:], clips.files, clips.labels, clips.events):
        assert file.stem == row["id"]
        assert len(events) == (row["actions"].count(";") + 1 if row["actions"] else 0)
        assert label == tuple(sorted({int(action[1:4]) for action in row["actions"].split(";") if action}))


# ---- Kinetics

KINETICS = """label,youtube_id,time_start,time_end,split
"playing, guitar",-a_B1234567,10,20,train
abseiling,bbbbbbbbbbb,0,10,train
abseiling,ccccccccccc,150,160,val
air drumming,ddddddddddd,5,15,train
"""


def test_kinetics(tmp_path):
    path = write(tmp_path / "list.csv", KINETICS)
    cut = "playing, guitar/-a_B1234567_000010_000020.mp4"
    videos = put(tmp_path / "v", cut, "bbbbbbbbbbb.mkv", "x/ccccccccccc.mp4", "ccccccccccc_000150_000160.webm")
    clips = read_kinetics(path, videos)
    assert clips.classes == ("abseiling", "air drumming", "playing, guitar")
    assert clips.files == (videos / cut, videos / "bbbbbbbbbbb.mkv", videos / "ccccccccccc_000150_000160.webm")
    assert clips.labels == (2, 0, 0)
    assert clips.spans == (None, (0.0, 10.0), None)
    assert clips.missing == (videos / "ddddddddddd_000005_000015.mp4",)
    train = read_kinetics(path, videos, ["playing, guitar", "air drumming", "abseiling"], split="train")
    assert (train.labels, len(train.missing)) == ((0, 2), 1)


def test_broken_kinetics(tmp_path):
    path = write(tmp_path / "list.csv", KINETICS)
    videos = put(tmp_path / "v", "other.mp4")
    assert "none of its 4 videos is there" in refused(read_kinetics, path, videos)
    assert "gives no clip: expected a line" in refused(read_kinetics, path, videos, split="holdout")
    assert "line 3: label 'abseiling' is not one of the 1 known" in refused(
        read_kinetics, path, videos, ["playing, guitar"]
    )
    assert "line 2: 'ten' is no time" in refused(
        read_kinetics, write(path, KINETICS.replace("10,20", "ten,20")), videos
    )
    assert "no column 'time_end'" in refused(read_kinetics, write(path, KINETICS.replace("time_end", "end")), videos)
    assert "holds no video" in refused(read_kinetics, path, put(tmp_path / "none", "a.txt"))


# ---- AViD


def test_avid(tmp_path):
    document = {"a.mp4": "tai chi", "b.mp4": "none", "c.mp4": "exercise", "d.mp4": "tai chi", "e.mp4": "vaulting"}
    path = write(tmp_path / "val.json", json.dumps(document))
    videos = put(tmp_path / "v", "a.mp4", "b.mp4", "c.mp4", "e.mp4")
    clips = read_avid(path, videos)
    assert clips.classes == ("exercise", "none", "tai chi", "vaulting")
    assert [(file.stem, label) for file, label in zip(clips.files, clips.labels)] == [
        ("a", 2),
        ("b", 1),
        ("c", 0),
        ("e", 3),
    ]
    assert clips.missing == (videos / "d.mp4",)
    known = read_avid(path, videos, ["vaulting", "tai chi", "exercise"], drop=("none",))
    assert known.labels == (1, 2, 0)
    assert "a.mp4: label 'tai chi' is not one of the 1 known" in refused(read_avid, path, videos, ["none"])


def test_avids_hierarchy(tmp_path):
    path = write(tmp_path / "val.json", '{"a.mp4": "tai chi", "b.mp4": "none", "c.mp4": "vaulting", "d.mp4": "loop"}')
    parents = {"": [], "none": [], "tai chi": ["exercise", "art"], "exercise": ["activity"], "activity": [""]}
    parents |= {"art": [], "loop": ["loop", "art"]}
    hierarchy = write(tmp_path / "h.json", json.dumps({k: {"parents": p, "name": k} for k, p in parents.items()}))
    clips = read_avid(path, put(tmp_path / "v", *(f"{name}.mp4" for name in "abcd")), hierarchy=hierarchy)
    assert clips.classes == ("activity", "art", "exercise", "loop", "none", "tai chi", "vaulting")
    assert clips.labels == ((0, 1, 2, 5), (4,), (6,), (1, 3))
    write(hierarchy, '{"a": ["b"]}')
    assert "h.json is no hierarchy" in refused(read_avid, path, tmp_path / "v", hierarchy=hierarchy)


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"a.mp4"', " is no JSON"), ("[1]", " holds a list: expected"), ('{"a.mp4": 3}', ": the label of a.mp4 is 3")],
)
def test_broken_avid(tmp_path, content, reason):
    assert refused(read_avid, write(tmp_path / "a.json", content), tmp_path).startswith(reason)


@needs_shared
def test_the_published_avid(tmp_path):
    folder = SHARED / "annotations"
    document = json.loads((folder / "avid_val.json").read_text())
    chosen = list(document)[:50]
    put(tmp_path, *chosen)
    clips = read_avid(folder / "avid_val.json", tmp_path, hierarchy=folder / "avid_hierarchy.json")
    assert (len(clips), len(clips.missing)) == (50, 46850 - 50)
    for file, label in zip(clips.files, clips.labels):
        names = {clips.classes[position] for position in label}
        assert document[file.name] in names
        assert "" not in names


# ---- folders and lists


def test_class_folders(tmp_path):
    root = put(tmp_path, "hug/2.mp4", "hug/1.avi", "kick/deep/3.webm", "notes.txt", ".hidden/x.mp4", "stray.mp4")
    clips = scan_video_folders(root)
    assert clips.classes == ("hug", "kick")
    assert clips.files == (root / "hug/1.avi", root / "hug/2.mp4", root / "kick/deep/3.webm")
    assert (clips.labels, clips.spans, clips.missing) == ((0, 0, 1), None, ())
    assert scan_video_folders(root, ["kick", "run", "hug"]).labels == (2, 2, 0)


def test_folders_of_kinetics_with_underscores(tmp_path):
    root = put(tmp_path, "air_drumming/a.mp4", "abseiling/b.mp4")
    assert scan_video_folders(root, ["abseiling", "air drumming"]).labels == (0, 1)
    assert scan_video_folders(root, ["abseiling", "air_drumming"]).labels == (0, 1)
    assert refused(scan_video_folders, root, ["abseiling", "run"]) == (
        "/air_drumming is not one of the 2 known classes: abseiling, run"
    )


def test_class_folders_of_frame_folders(tmp_path):
    root = put(tmp_path, "a/v_1/i_1.jpg", "a/v_2/i_1.jpg", "b/v_3/i_1.png", "b/x.mp4")
    clips = scan_video_folders(root, frame_fps=25.0)
    assert clips.files == (
        FrameFolder(root / "a/v_1", 25.0),
        FrameFolder(root / "a/v_2", 25.0),
        root / "b/x.mp4",
        FrameFolder(root / "b/v_3", 25.0),
    )
    assert clips.labels == (0, 0, 1, 1)


def test_broken_class_folders(tmp_path):
    put(tmp_path, "flat/1.mp4", "single/a/1.mp4", "empty/a/1.mp4", "empty/b/1.txt")
    assert "holds no class folder" in refused(scan_video_folders, tmp_path / "flat")
    assert "single class folder, a: expected at least 2" in refused(scan_video_folders, tmp_path / "single")
    assert "/b holds no video" in refused(scan_video_folders, tmp_path / "empty")
    assert "can't be listed (No such file or directory)" in refused(scan_video_folders, tmp_path / "gone")


def test_a_list(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    path = write(tmp_path / "list.csv", "file,label,start,end\na.mp4,run,1,2.5\ngone.mp4,hop,,\nb.mp4,hop,,\n")
    clips = read_clip_list(path)
    assert clips.files == (tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert (clips.classes, clips.labels, clips.spans) == (("hop", "run"), (1, 0), ((1.0, 2.5), None))
    assert clips.missing == (tmp_path / "gone.mp4",)
    write(path, "file,label\na.mp4,run;hop\nb.mp4,\n")
    assert (read_clip_list(path).classes, read_clip_list(path).labels) == (("hop", "run"), ((0, 1), ()))
    write(path, "file,name\na.mp4,run\nb.mp4,hop\n")
    assert read_clip_list(path, ["run", "hop"]).labels == (0, 1)


def test_a_list_with_numbers_and_names(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    path = write(tmp_path / "clips.csv", "file,label,name,sequence\na.mp4,10,push,1\nb.mp4,2,hug,1\nc.mp4,3,kick,2\n")
    clips = read_clip_list(path)
    assert (clips.classes, clips.labels) == (("hug", "kick", "push"), (2, 0, 1))
    kept = read_clip_list(path, clips.classes, keep=lambda row: row["sequence"] == "2")
    assert (kept.files, kept.labels) == ((tmp_path / "c.mp4",), (1,))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("name,label\na.mp4,x\n", " has no column 'file': its columns are name, label"),
        ("file,class\na.mp4,x\n", " has no column 'label': its columns are file, class"),
        ("", " has no column 'file': its columns are none"),
        ("file,label\n", " gives no clip: expected a line for each"),
        ("file,label\nz.mp4,x\n", " gives no clip: none of its 1 videos is there"),
        ("file,label,name\na.mp4,1,x\na.mp4,2,x\n", ", line 3: x is 2, above 1"),
        ("file,label,name\na.mp4,one,x\n", ", line 2: label 'one' is no number"),
        ("file,label,start,end\na.mp4,x,3,2\n", ", line 2: the clip ends at 2 s, not after its start at 3 s"),
        ("file,label,start,end\na.mp4,x,3,\n", ", line 2: '' is no time"),
    ],
)
def test_broken_lists(tmp_path, content, reason):
    put(tmp_path, "a.mp4")
    assert refused(read_clip_list, write(tmp_path / "l.csv", content)).startswith(reason)


@needs_shared
def test_the_shared_lists():
    clips = read_clip_list(SHARED / "videos" / "ut_interaction" / "clips.csv")
    assert clips.classes == ("shake_hands", "hug", "kick", "point", "punch", "push", "other")
    assert (len(clips), clips.missing) == (218, ())
    assert all(file.parent.name == clips.classes[label] for file, label in zip(clips.files, clips.labels))
    held_out = read_clip_list(
        SHARED / "videos" / "ut_interaction" / "clips.csv",
        clips.classes,
        keep=lambda row: row["set"] == "1" and row["sequence"] == "7" and row["name"] != "other",
    )
    assert len(held_out) == 6
    folders = scan_video_folders(SHARED / "videos" / "surveillance_fight", ["no_fight", "fight"])
    listed = read_clip_list(SHARED / "videos" / "surveillance_fight" / "clips.csv")
    assert (len(folders), set(zip(folders.files, folders.labels))) == (220, set(zip(listed.files, listed.labels)))
