"""Shards: written and read by webdataset and by us, whole or broken."""

import gc
import io
import json
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from tokenlearner.cli import main
from tokenlearner.data.decode import DamagedImage, decode_image
from tokenlearner.data.images import ImageFiles, collate, read_picture
from tokenlearner.data.members import TarMember
from tokenlearner.data.sharding import write_shards
from tokenlearner.data.shards import read_shards, shard_splits
from tokenlearner.errors import InputError


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixel(level: int) -> bytes:
    return encoded(Image.new("RGB", (2, 2), (level, 0, 0)))


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def sample_of(key: str, label: object, suffix: str = "cls", level: int = 0) -> dict:
    return {"__key__": key, "png": pixel(level), suffix: label}


def theirs(path: Path, *samples: dict) -> Path:
    """A shard as webdataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def read_by_webdataset(folder: Path) -> list[dict]:
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing its files to the garbage collector
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
        gc.collect()
    return samples


def packed(path: Path, files: dict[str, bytes]) -> Path:
    """A tar of these files in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def refused(*arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_shards(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def red(source) -> int:
    return read_picture(source).getpixel((0, 0))[0]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes of six pictures, red by 40·number in the first and 20 above in the second; one file is damaged."""
    for position, name in enumerate(("ant", "bee")):
        for i in range(6):
            picture = Image.new("RGB", (30, 20), (40 * i + 20 * position, 0, 0))
            put(tmp_path / "photos" / name / f"{name}.{i}.png", encoded(picture))
    put(tmp_path / "photos" / "bee" / "cut.png", b"not a picture")
    return tmp_path / "photos"


# ---- a tar's member


def test_a_member_reads_its_bytes_and_travels_to_workers(tmp_path):
    archive = packed(tmp_path / "a.tar", {"x/1.jpg": b"one", "2.jpg": b"two"})
    with tarfile.open(archive) as tar:
        first, second = (TarMember(archive, m.name, m.offset_data, m.size) for m in tar.getmembers())
    assert (first.read(), second.read()) == (b"one", b"two")
    assert str(first) == f"{archive}/x/1.jpg"
    assert pickle.loads(pickle.dumps(first)) == first
    assert sorted([first, second]) == [second, first]  # by name, as files of a folder
    archive.write_bytes(archive.read_bytes()[: second.offset + 1])
    with pytest.raises(OSError, match="ends 2 bytes before the file does"):
        second.read()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_members_are_named(tmp_path, workers):
    samples = [sample_of(f"{i}", i % 2, level=i) for i in range(6)]
    samples[4]["png"] = b"nonsense"
    images = read_shards(theirs(tmp_path / "a.tar", *samples))
    files = ImageFiles(images, lambda picture: torch.tensor(picture.getpixel((0, 0))[0]))
    batches = list(DataLoader(files, batch_size=4, num_workers=workers, collate_fn=collate))
    assert torch.cat([batch.images for batch in batches]).tolist() == [0, 1, 2, 3, 5]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 0, 1, 1]
    (damaged,) = batches[1].damaged
    assert damaged.path == str(images.files[4]) == f"{tmp_path}/a.tar/4.png"
    assert damaged.reason.startswith("not an image of a known format")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DamagedImage, match=r"a\.tar/0\.png: No such file or directory"):
        read_picture(images.files[0])


# ---- written by us


def test_what_is_written_is_what_was_read(photos, tmp_path):
    calls = []
    summary = write_shards(photos, tmp_path / "out", per_shard=5, progress=lambda *call: calls.append(call))
    assert [(shard["file"], shard["samples"]) for shard in summary["splits"]["data"]] == [
        ("data-000000.tar", 5),
        ("data-000001.tar", 5),
        ("data-000002.tar", 2),
    ]
    assert (summary["images"], summary["classes"], summary["stored_as_they_were"]) == (12, 2, 0)
    assert [entry["file"] for entry in summary["damaged"]["files"]] == [str(photos / "bee" / "cut.png")]
    assert calls == [(i, 13) for i in range(1, 14)]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"dataset.json", "data-000000.tar", "data-000001.tar", "data-000002.tar"}

    images = read_shards(tmp_path / "out")
    assert images.classes == ("ant", "bee")
    levels = [red(source) for source in images.files]
    expected = {40 * i + 20 * position: position for position in (0, 1) for i in range(6)}
    assert [expected[min(expected, key=lambda known: abs(known - level))] for level in levels] == list(images.labels)
    assert len({round(level / 20) for level in levels}) == 12
    assert sorted(images.labels[:5]) not in ([0] * 5, [1] * 5)  # shuffled: no shard is of one class
    for source, label in zip(images.files, images.labels):
        assert source.name.split("-")[1:] in [[images.classes[label], f"{i}.jpg"] for i in range(6)]


def test_the_seed_decides_and_nothing_else(photos, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_shards(photos, tmp_path / name, per_shard=5, seed=seed)
    a, b, c = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "abc")
    assert a == b
    assert a["data-000000.tar"] != c["data-000000.tar"]


def test_webdataset_reads_our_shards(photos, tmp_path):
    write_shards(photos, tmp_path / "out", per_shard=5)
    samples = read_by_webdataset(tmp_path / "out")
    ours = read_shards(tmp_path / "out")
    assert [sample["cls"] for sample in samples] == list(ours.labels)
    assert [f"{sample['__key__']}.jpg" for sample in samples] == [source.name for source in ours.files]
    for sample, source in zip(samples, ours.files):
        assert np.array_equal(np.asarray(sample["jpg"]), np.asarray(read_picture(source)))


def test_parts_and_their_order(photos, tmp_path):
    (photos / "bee" / "cut.png").unlink()
    for name in ("train", "test"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for kind in ("ant", "bee"):
            (tmp_path / "data" / name / kind).symlink_to(photos / kind)
    summary = write_shards(tmp_path / "data", tmp_path / "out")
    assert list(summary["splits"]) == ["train", "val"]
    train, val = (read_shards(tmp_path / "out", split=split) for split in ("train", "val"))
    assert val.labels == (0,) * 6 + (1,) * 6
    assert sorted(train.labels) == sorted(val.labels)
    assert train.labels != val.labels
    assert len({source.name.split(".")[0] for source in train.files + val.files}) == 24  # keys differ over both
    assert read_shards(tmp_path / "out").files == train.files + val.files
    assert refused(tmp_path / "out", split="test") == f"{tmp_path}/out has no shards of 'test': there is train, val"
    assert read_shards(tmp_path / "out", ("bee", "cow", "ant"), "val").labels == (2,) * 6 + (0,) * 6
    assert "label 'bee' is not one of the 1 known classes: ant" in refused(tmp_path / "out", ["ant"])


def test_several_classes_an_image(photos, tmp_path):
    (tmp_path / "photos" / "list.csv").write_text(
        "file,label\nant/ant.1.png,ant\nbee/bee.1.png,cat;ant\nbee/bee.5.png,\nant/ant.4.png,bee;cat\n"
    )
    write_shards(photos / "list.csv", tmp_path / "out")
    images = read_shards(tmp_path / "out")
    of = {source.name[9:14]: label for source, label in zip(images.files, images.labels)}
    assert of == {"ant-1": (0,), "bee-1": (0, 2), "bee-5": (), "ant-4": (1, 2)}
    assert images.classes == ("ant", "bee", "cat")
    assert [tuple(sample["json"]) for sample in read_by_webdataset(tmp_path / "out")] == list(images.labels)
    renamed = read_shards(tmp_path / "out", ("cat", "bee", "ant"))
    assert [tuple(sorted(2 - i for i in label)) for label in renamed.labels] == list(images.labels)


def test_size_and_which_jpegs_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (48, 32, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    originals = {
        "kept": encoded(noise, "JPEG", quality=40),
        "upright": encoded(noise, "JPEG", exif=upright),
        "progressive": encoded(noise, "JPEG", progressive=True),
        "turned": encoded(noise, "JPEG", exif=turned),
        "grey": encoded(noise.convert("L"), "JPEG"),
        "cmyk": encoded(noise.convert("CMYK"), "JPEG"),
        "png": encoded(noise),
        "large": encoded(noise.resize((66, 99)), "JPEG"),
        "wide": encoded(noise.resize((200, 50)), "JPEG"),
    }
    for name, content in originals.items():
        put(tmp_path / "in" / "ab"[len(name) % 2] / f"{name}.jpg", content)
    summary = write_shards(tmp_path / "in", tmp_path / "out", size=32)
    stored = {source.name[9:-4]: source.read() for source in read_shards(tmp_path / "out").files}
    same = {name for name, content in originals.items() if stored[name] == content}
    assert same == {"kept", "upright", "progressive"}
    assert summary["stored_as_they_were"] == 3
    pictures = {name: Image.open(io.BytesIO(content)) for name, content in stored.items()}
    seen = {name: (p.format, p.mode, p.getexif().get(0x0112, 1)) for name, p in pictures.items()}
    assert seen == dict.fromkeys(originals, ("JPEG", "RGB", 1))
    sizes = {name: picture.size for name, picture in pictures.items()}
    assert (sizes["png"], sizes["turned"], sizes["large"], sizes["wide"]) == ((32, 48), (48, 32), (32, 48), (128, 32))
    shrunk = decode_image(originals["large"]).resize((32, 48), Image.Resampling.BICUBIC)
    assert stored["large"] == encoded(shrunk, "JPEG", quality=90)
    write_shards(tmp_path / "in", tmp_path / "rough", size=32, quality=20)
    again = {source.name[9:-4]: source.read() for source in read_shards(tmp_path / "rough").files}
    assert again["large"] == encoded(shrunk, "JPEG", quality=20)
    assert again["kept"] == stored["kept"]


def test_shards_can_be_written_again_from_shards(photos, tmp_path):
    write_shards(photos, tmp_path / "once", per_shard=5)
    summary = write_shards(tmp_path / "once", tmp_path / "twice", per_shard=6)
    assert (summary["images"], summary["stored_as_they_were"]) == (12, 12)
    both = [read_shards(tmp_path / name) for name in ("once", "twice")]
    once, twice = ({source.read(): label for source, label in zip(i.files, i.labels)} for i in both)
    assert once == twice


@pytest.mark.parametrize("when", [1, 7, 13])
def test_an_interrupted_writing_leaves_nothing(photos, tmp_path, when):
    def interrupt(done, total):
        if done == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(photos, tmp_path / "out", per_shard=2, progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []
    write_shards(photos, tmp_path / "out")  # and is no hindrance to the next
    assert len(read_shards(tmp_path / "out")) == 12


def test_raise_stops_at_the_damaged_file(photos, tmp_path):
    with pytest.raises(DamagedImage, match=r"bee/cut\.png: not an image"):
        write_shards(photos, tmp_path / "out", on_error="raise")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_part_without_a_readable_image(tmp_path):
    for name in ("train/a", "train/b", "val/a"):
        put(tmp_path / "data" / name / "1.png", pixel(1) if "train" in name else b"")
    with pytest.raises(InputError, match="none of the 1 val images could be decoded"):
        write_shards(tmp_path / "data", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["dataset.json", "other.tar"])
def test_nothing_is_written_over(photos, tmp_path, name):
    put(tmp_path / "out" / name, b"mine")
    with pytest.raises(InputError, match=f"out already has {name}"):
        write_shards(photos, tmp_path / "out")
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"mine"]


def test_where_nothing_can_be_written(photos, tmp_path):
    put(tmp_path / "file", b"")
    with pytest.raises(InputError, match=r"file can't be written to \(File exists\)"):
        write_shards(photos, tmp_path / "file")


@pytest.mark.parametrize("option", [{"size": 0}, {"per_shard": 0}, {"quality": 0}, {"quality": 101}])
def test_options_out_of_range(photos, tmp_path, option):
    with pytest.raises(InputError, match="give at least 1, 1, and 1 to 100"):
        write_shards(photos, tmp_path / "out", **option)


def test_a_picture_too_long_for_a_jpeg_is_damaged(photos, tmp_path):
    put(photos / "bee" / "cut.png", encoded(Image.new("1", (70_000, 1))))
    (entry,) = write_shards(photos, tmp_path / "out")["damaged"]["files"]
    assert entry["file"] == str(photos / "bee" / "cut.png")
    assert entry["reason"].startswith("can't be a JPEG of 70000 × 1")


# ---- our description


def described(folder: Path, **changes) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_shards_that_do_not_fit_their_description(photos, tmp_path):
    out = tmp_path / "out"
    write_shards(photos, out, per_shard=5)
    last = (out / "data-000002.tar").read_bytes()
    (out / "data-000002.tar").write_bytes((out / "data-000001.tar").read_bytes())
    assert refused(out).startswith(f"{out}/data-000002.tar holds 5 samples, where dataset.json says 2")
    (out / "data-000002.tar").unlink()
    assert refused(out).startswith(f"{out}/data-000002.tar can't be read as a tar (No such file or directory)")
    (out / "data-000002.tar").write_bytes(last)
    theirs(out / "more.tar", sample_of("more", 0))  # not named: not read
    assert len(read_shards(out)) == 12
    described(out, format="tokenlearner-shards-9")
    assert "has the format tokenlearner-shards-9, and this version reads tokenlearner-shards-1" in refused(out)
    described(out, format="tokenlearner-shards-1", splits={"data": [{"file": "data-000000.tar"}]})
    assert "lacks what tokenlearner-shards-1 has (KeyError('samples'))" in refused(out)
    path = out / "dataset.json"
    path.write_text(path.read_text()[:-5])
    assert "dataset.json lacks what tokenlearner-shards-1 has (JSONDecodeError" in refused(out)


# ---- written by others


def test_labels_by_number(tmp_path):
    folder = theirs(tmp_path / "x-0.tar", *(sample_of(f"a/{i}", i % 3, level=i) for i in range(6))).parent
    theirs(tmp_path / "x-1.tar", sample_of("a/0", 4, level=6))  # the same key in another shard is another sample
    images = read_shards(folder)
    assert images.classes == ("0", "1", "2", "3", "4")
    assert images.labels == (0, 1, 2, 0, 1, 2, 4)
    assert [red(source) for source in images.files] == list(range(7))
    assert read_shards(folder, "vwxyz").classes == ("v", "w", "x", "y", "z")
    assert read_shards(folder, "vwxyz").labels == images.labels
    assert refused(folder, "vw").endswith("x-0.tar: sample a/2: label 2 is not the position of one of 2 classes")
    (folder / "classes.txt").write_text("bee\nant\r\ncat\n\neel\ndog\n")
    assert read_shards(folder).classes == ("bee", "ant", "cat", "eel", "dog")
    assert read_shards(folder, ("dog", "cat", "ant", "bee")).labels == (3, 2, 1, 3, 2, 1, 0)
    assert read_shards([folder / "x-1.tar"], ("dog", "cat", "ant", "bee")).labels == (0,)


def test_webdatasets_own_shards_with_several_files_a_sample(tmp_path):
    pattern = str(tmp_path / "x-%02d.tar")
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as writer:
        for i in range(5):
            picture = np.full((4, 4, 3), 10 * i, np.uint8)
            extra = {"seg.png": picture, "json": {"caption": "a b"}, "txt": "words", "__url__": "none"}
            writer.write({"__key__": f"{i:03}", "jpg": picture, "cls": i % 2, **extra})
    images = read_shards(tmp_path)
    assert [source.archive.name for source in images.files] == [f"x-0{i}.tar" for i in (0, 0, 1, 1, 2)]
    assert (images.labels, [red(source) for source in images.files]) == ((0, 1, 0, 1, 0), [0, 10, 20, 30, 40])


@pytest.mark.parametrize(("suffix", "wrap"), [("cls", str), ("json", str), ("json", lambda name: {"label": name})])
def test_labels_by_name(tmp_path, suffix, wrap):
    names = ("dog", "ant", "dog", "cow")
    write = json.dumps if suffix == "json" else str
    samples = [sample_of(f"{i}", write(wrap(name)), suffix) for i, name in enumerate(names)]
    images = read_shards(theirs(tmp_path / "a.tar", *samples))
    assert (images.classes, images.labels) == (("ant", "cow", "dog"), (2, 0, 2, 1))
    assert read_shards(tmp_path / "a.tar", ("dog", "cow", "ant")).labels == (0, 2, 0, 1)
    assert refused(tmp_path / "a.tar", ("ant", "dogs", "cow")).endswith(
        "a.tar: sample 0: label 'dog' is not one of the 3 known classes: ant, dogs, cow; did you mean dogs?"
    )


def test_lists_of_labels(tmp_path):
    labels = ([1, 0, 1], [], 3, {"label": [2]})
    samples = [sample_of(f"{i}", label, "json") for i, label in enumerate(labels)]
    images = read_shards(theirs(tmp_path / "a.tar", *samples))
    assert (images.labels, images.classes) == (((0, 1), (), (3,), (2,)), ("0", "1", "2", "3"))


def test_any_order_and_names_that_are_no_samples(tmp_path):
    files = {"./2.JPG": pixel(2), "./1.jpg": pixel(1), "notes": b"", "._1.jpg": b"mac", "./1.cls": b" 1\n"}
    packed(tmp_path / "a.tar", files | {"./2.cls": b"0"})
    images = read_shards(tmp_path / "a.tar")
    assert ([red(source) for source in images.files], images.labels) == ([2, 1], (0, 1))


def test_shard_splits_by_name(tmp_path):
    for name in ("in1k-train-0.tar", "in1k-train-1.tar", "in1k-validation-0.tar", "strain-0.tar", ".train-9.tar"):
        (tmp_path / name).touch()
    assert {split: [tar.name for tar in tars] for split, tars in shard_splits(tmp_path).items()} == {
        "train": ["in1k-train-0.tar", "in1k-train-1.tar"],
        "validation": ["in1k-validation-0.tar"],
    }
    (tmp_path / "in1k-validation-0.tar").unlink()
    assert list(shard_splits(tmp_path)) == ["data"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"1.jpg": b"", "1.cls": b"0", "2.jpg": b""}, "sample 2 has no label: expected 2.cls, or 2.json with a label"),
        ({"1.jpg": b"", "1.json": b'{"caption": "x"}'}, "sample 1 has no label: expected 1.cls"),
        ({"1.jpg": b"", "1.cls": b"0", "2.cls": b"1"}, "sample 2 has no picture (.avif"),
        ({"cat.1.jpg": b"", "cat.1.cls": b"0"}, "holds no sample: expected pictures and their labels in a.tar"),
        ({"1.jpg": b"", "1.cls": b"0", "1.png": b""}, "sample 1 has two pictures, 1.jpg and 1.png: expected one"),
        ({"1.jpg": b"", "1.cls": b"0", "1.CLS": b"0"}, "sample 1 is there twice"),
        ({"1.jpg": b"", "1.cls": b" "}, "1.cls is no label: it is empty"),
        ({"1.jpg": b"", "1.cls": b"\xff"}, "1.cls is no label: 'utf-8' codec can't decode"),
        ({"1.jpg": b"", "1.json": b"{"}, "1.json is no label: Expecting property name"),
        ({"1.jpg": b"", "1.json": b"[0.5]"}, "1.json is no label: expected a class's position, its name, or a list"),
        ({"1.jpg": b"", "1.json": b"true"}, "1.json is no label: expected a class's position"),
        ({"1.jpg": b"", "1.cls": b"-1"}, "holds fewer than 2 classes"),
        ({"1.jpg": b"", "1.cls": b"dog"}, "holds fewer than 2 classes: dog"),
        ({"1.jpg": b"", "1.cls": b"3", "2.jpg": b"", "2.cls": b"-1"}, "sample 2: label -1 is not the position"),
        ({"1.jpg": b"", "1.cls": b"3", "2.jpg": b"", "2.cls": b"x"}, "labels by number (3) and by name (x)"),
        ({}, "holds no sample"),
    ],
)
def test_broken_samples(tmp_path, files, reason):
    message = refused(packed(tmp_path / "a.tar", files))
    assert reason in message
    assert message.startswith(str(tmp_path))


# ---- broken tars


def test_every_cut_is_noticed(tmp_path):
    path = theirs(tmp_path / "a.tar", *(sample_of(f"{i}", i) for i in range(3)))
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0"))
    end = -(-used // 512) * 512
    for length in (0, 100, 512, 1000, 1024, 1536, 2048, used, end, end + 511):
        path.write_bytes(whole[:length])
        message = refused(path)
        assert message.startswith(f"{path} ")
        assert message.endswith("get or write it again")
    path.write_bytes(whole[: end + 512])
    assert len(read_shards(path)) == 3


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path):
    path = theirs(tmp_path / "a.tar", *(sample_of(f"{i}", i) for i in range(3)))
    content = bytearray(path.read_bytes())
    content[2048 + 10] ^= 1  # of the second sample's label, after two headers and two blocks of content
    path.write_bytes(content)
    assert refused(path) == f"{path} is damaged or cut off at byte 2,048: get or write it again"


@pytest.mark.parametrize(("suffix", "mode"), [("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar", "w:bz2"), ("tar", "w:xz")])
def test_compressed_tars(tmp_path, suffix, mode):
    path = tmp_path / f"a.{suffix}"
    with tarfile.open(path, mode):
        pass
    for source in (path, tmp_path):
        assert refused(source).startswith(f"{path} is compressed")
        assert refused(source).endswith("unpack it to a .tar")


def test_where_there_is_nothing(tmp_path):
    assert refused(tmp_path / "gone").startswith(f"{tmp_path}/gone can't be read as a tar (No such file or directory)")
    assert refused(tmp_path) == f"{tmp_path} holds no shard: expected files that end in .tar"
    (tmp_path / "a.tar").write_text("text, and more of it than a header's 512 bytes. " * 20)
    assert refused(tmp_path).startswith(f"{tmp_path}/a.tar can't be read as a tar (")


# ---- the command


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(photos, tmp_path, capsys):
    out = tmp_path / "out"
    code, shown, damaged = command(capsys, "shards", photos, out, "--size", 8, "--per-shard", 7, "--quality", 50)
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert rows == [["data-000000.tar", "7"], ["data-000001.tar", "5"]]
    assert f"12 pictures of 2 classes in {out}" in shown
    assert damaged.startswith(f"1 damaged file skipped:\n  {photos}/bee/cut.png: not an image")
    sizes = {read_picture(source).size for source in read_shards(out).files}
    assert sizes == {(12, 8)}

    code, shown, error = command(capsys, "shards", photos, out)
    assert (code, shown) == (1, "")
    assert error == f"tokenlearner: {out} already has data-000000.tar: give a new folder, or empty this one first\n"

    code, shown, error = command(capsys, "shards", photos, tmp_path / "two", "--json")
    summary = json.loads(shown)
    assert (code, error, summary["images"], summary["damaged"]["count"]) == (0, "", 12, 1)

    code, shown, error = command(capsys, "shards", photos, tmp_path / "three", "--on-error", "raise")
    assert (code, shown) == (1, "")
    assert error.startswith(f"tokenlearner: {photos}/bee/cut.png: not an image")
