"""Folders of tokens: what is in the files, which are written, and what is left when a run ends early."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from export.families import clip_model, image_model, ready
from insertion.hosts import inserted, tiny
from tokenlearner import Preprocessing, save
from tokenlearner.data import token_files
from tokenlearner.data.streaming import Pictures
from tokenlearner.data.token_files import TokenRows, read_metadata, token_file
from tokenlearner.data.videos import FrameFolder
from tokenlearner.data.write_video import write_video
from tokenlearner.errors import InputError
from tokenlearner.evaluation.tokens import stream_tokens
from tokenlearner.evaluation.write_tokens import fingerprint, output_names, write_tokens

PREPROCESSING = Preprocessing((3, 32, 32))
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
FORMATS = ["safetensors", pytest.param("parquet", marks=needs_pyarrow)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return ready(inserted(tiny(), 3, 2), PREPROCESSING)


def pictures(count: int) -> list[Image.Image]:
    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8)) for i in range(count)]


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Three videos of 5, 6 and 7 frames, one that is damaged, and five pictures, one of them damaged."""
    folder = tmp_path_factory.mktemp("data") / "films"
    for i, name in enumerate(("a/walk.mp4", "a/walk.mkv", "run.mp4")):
        write_video(pictures(5 + i), folder / name, 10)
    (folder / "a" / "broken.mp4").write_text("no video")
    (folder / "shots").mkdir()
    for i, picture in enumerate(pictures(5)):
        picture.save(folder / "shots" / f"{i}.png")
    (folder / "shots" / "2.png").write_text("no picture")
    return folder


NAMES = ["a/walk.mkv", "a/walk.mp4", "run", "shots"]


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read(path: Path, which: str = "tokens") -> torch.Tensor:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)[which]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    if which == "times":
        return torch.tensor(table["time"].to_pylist(), dtype=torch.float64)
    tokens = table["tokens"].combine_chunks()
    flat = tokens.flatten().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.copy()).unflatten(0, (len(table), tokens.type.list_size, -1))


# ---- what is written


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("format", FORMATS)
def test_files_hold_the_streamed_tokens(model, films, tmp_path, format, dtype):  # noqa: A002
    summary = write_tokens(model, films, tmp_path, name="m", format=format, dtype=dtype, batch_size=2)
    assert files_in(tmp_path) == [f"{name}.{format}" for name in NAMES]
    assert [(entry["file"], entry["rows"]) for entry in summary["files"]] == [
        (f"{name}.{format}", rows) for name, rows in zip(NAMES, (6, 5, 7, 4))
    ]
    for name, source in zip(NAMES, ("a/walk.mkv", "a/walk.mp4", "run.mp4", "shots")):
        path = films / source
        rows = list(stream_tokens(model, Pictures(path) if path.is_dir() else path, batch_size=2))
        exact = torch.from_numpy(np.concatenate([some.tokens for some in rows if len(some.tokens)]))
        found = read(tmp_path / f"{name}.{format}")
        assert found.dtype == getattr(torch, dtype)
        assert torch.equal(found, exact.to(found.dtype))
        if not path.is_dir():
            assert read(tmp_path / f"{name}.{format}", "times").tolist() == pytest.approx(
                [i / 10 for i in range(len(found))]
            )
    assert {key: summary[key] for key in ("rows", "tokens", "dim", "already_there", "of_other_shards")} == {
        "rows": 22,
        "tokens": 3,
        "dim": 32,
        "already_there": 0,
        "of_other_shards": 0,
    }
    assert [Path(entry["file"]).name for entry in summary["damaged"]["files"]] == ["broken.mp4", "2.png"]
    json.dumps(summary)


@pytest.mark.parametrize("format", FORMATS)
def test_files_say_how_they_were_made(model, films, tmp_path, format):  # noqa: A002
    write_tokens(model, films / "run.mp4", tmp_path, name="m", fps=5.0, layer="learned", format=format)
    found = read_metadata(tmp_path / f"run.{format}")
    assert {key: found[key] for key in ("model", "layer", "tokens", "fps", "source", "dtype", "weights")} == {
        "model": "m",
        "layer": "learned",
        "tokens": "3",
        "fps": "5",
        "source": str(films / "run.mp4"),
        "dtype": "float16",
        "weights": fingerprint(model),
    }
    assert read(tmp_path / f"run.{format}", "times").tolist() == pytest.approx([0, 0.2, 0.4, 0.6])


def test_pictures_are_named_and_have_no_times(model, films, tmp_path):
    write_tokens(model, films / "shots", tmp_path)
    path = tmp_path / "shots.safetensors"
    assert json.loads(read_metadata(path)["files"]) == ["0.png", "1.png", "3.png", "4.png"]
    assert sorted(safetensors.torch.load_file(path)) == ["tokens"]
    write_tokens(model, films / "shots" / "4.png", tmp_path / "one")
    assert torch.equal(read(tmp_path / "one" / "4.safetensors")[0], read(path)[3])
    assert "files" not in read_metadata(tmp_path / "one" / "4.safetensors")


@needs_pyarrow
def test_rows_of_parquet(model, films, tmp_path):
    import pyarrow.parquet

    write_tokens(model, films, tmp_path, format="parquet", batch_size=2)
    rows = pyarrow.parquet.read_table(tmp_path / "shots.parquet")
    assert rows.column_names == ["file", "frame", "time", "tokens"]
    assert rows["file"].to_pylist() == [str(films / "shots" / f"{i}.png") for i in (0, 1, 3, 4)]
    assert rows["frame"].to_pylist() == [0, 1, 3, 4]
    assert rows["time"].to_pylist() == [None] * 4
    rows = pyarrow.parquet.read_table(tmp_path / "run.parquet")
    assert rows["file"].to_pylist() == [str(films / "run.mp4")] * 7
    assert rows["frame"].to_pylist() == list(range(7))


@needs_pyarrow
def test_parquet_is_written_in_groups(tmp_path, monkeypatch):
    import pyarrow.parquet

    monkeypatch.setattr(token_files, "_ROW_GROUP", 100)  # bytes; a row has 2·3·2
    tokens = np.arange(30 * 6, dtype=np.float32).reshape(30, 2, 3)
    with token_file(tmp_path / "a.parquet", "parquet", "float16", {"source": "a"}) as file:
        for i in range(0, 30, 3):
            numbers = tuple(range(i, i + 3))
            file.write(TokenRows(tokens[i : i + 3], (0.5,) * 3, ("",) * 3, numbers, (), 0.0))
    found = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet")
    assert [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)] == [9, 9, 9, 3]
    assert torch.equal(read(tmp_path / "a.parquet"), torch.from_numpy(tokens).half())


def test_the_file_itself(tmp_path):
    """Byte for byte what the format says: length, header, times and tokens, all aligned to their size."""
    tokens = np.arange(3, dtype=np.float32).reshape(3, 1, 1)
    with token_file(tmp_path / "a.safetensors", "safetensors", "float16", {"layer": "last"}) as file:
        file.write(TokenRows(tokens[:2], (0.0, 0.5), ("x", "y"), (0, 1), (), 0.5))
        file.write(TokenRows(tokens[2:], (1.0,), ("z\udcff",), (2,), (), 1.0))
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    assert length % 8 == 0
    assert header["__metadata__"] == {"layer": "last", "files": '["x", "y", "z\\\\udcff"]'}
    assert header["times"] == {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}
    assert header["tokens"] == {"dtype": "F16", "shape": [3, 1, 1], "data_offsets": [24, 30]}
    assert data == np.array([0, 0.5, 1]).tobytes() + np.array([0, 1, 2], np.float16).tobytes()
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert (found["tokens"].flatten().tolist(), found["times"].tolist()) == ([0, 1, 2], [0, 0.5, 1])


def test_what_float16_cannot_hold_is_refused(tmp_path):
    rows = TokenRows(np.array([[[65504.0, -65520.0]]], np.float32), (0.0,), ("",), (0,), (), 1.0)
    with (
        pytest.raises(InputError, match=r"the tokens reach 6\.55e\+04, and float16 ends at 65504: use float32"),
        token_file(tmp_path / "a.safetensors", "safetensors", "float16", {}) as file,
    ):
        file.write(rows)
    assert list(tmp_path.iterdir()) == []
    with token_file(tmp_path / "a.safetensors", "safetensors", "float32", {}) as file:
        file.write(rows)
    assert read(tmp_path / "a.safetensors").flatten().tolist() == [65504, -65520]


def test_a_clip_host_leaves_pictures_alone(films, tmp_path):
    model = clip_model()
    summary = write_tokens(model, films, tmp_path / "a")  # six frames a second; the videos last 0.5 to 0.7 s
    assert [(entry["file"], entry["rows"]) for entry in summary["files"]] == [
        ("a/walk.mkv.safetensors", 2),
        ("a/walk.mp4.safetensors", 2),
        ("run.safetensors", 3),
    ]
    assert read(tmp_path / "a" / "run.safetensors", "times").tolist() == pytest.approx([0, 2 / 6, 4 / 6])
    with pytest.raises(InputError, match="shots holds pictures, and the model takes clips"):
        write_tokens(model, films / "shots", tmp_path / "b")


# ---- names


def test_names_are_those_of_the_sources(tmp_path):
    for folder in ("v.1", "b"):
        (tmp_path / folder).mkdir()
    names = ["a.mp4", "A.avi", "b.mp4", "b/c.d.mp4"]
    sources = [*(tmp_path / name for name in names), Pictures(tmp_path / "v.1"), FrameFolder(tmp_path / "b", 5.0)]
    assert list(output_names(sources, tmp_path, ".x").values()) == [
        *("a.mp4.x", "A.avi.x", "b.mp4.x", "b/c.d.x", "v.1.x", "b.x")
    ]
    assert output_names([Pictures(tmp_path)], tmp_path, ".x") == {Pictures(tmp_path): f"{tmp_path.name}.x"}
    clash = [tmp_path / name for name in ("a.mp4", "a.avi", "a.mp4.mp4")]
    with pytest.raises(InputError, match=r"a\.mp4 and .*a\.mp4\.mp4 would both be written to a\.mp4\.x: rename"):
        output_names(clash, tmp_path, ".x")


# ---- shards, and going on


def test_shards_part_the_sources_exactly(model, films, tmp_path):
    found = []
    for i in (1, 2, 3):
        summary = write_tokens(model, films, tmp_path / "all", shard=(i, 3))  # into one folder
        found.append([entry["file"] for entry in summary["files"]])
        assert summary["of_other_shards"] == (3 if i < 3 else 4)
    # In the order a/broken, a/walk.mkv, a/walk.mp4, run, shots; the first is damaged.
    assert found == [["run.safetensors"], ["a/walk.mkv.safetensors", "shots.safetensors"], ["a/walk.mp4.safetensors"]]
    write_tokens(model, films, tmp_path / "once")
    for name in NAMES:
        assert torch.equal(
            read(tmp_path / "all" / f"{name}.safetensors"), read(tmp_path / "once" / f"{name}.safetensors")
        )
    assert write_tokens(model, films, tmp_path / "none", shard=(6, 6))["files"] == []
    with pytest.raises(InputError, match=r"already has run\.safetensors"):
        write_tokens(model, films, tmp_path / "all", shard=(1, 3))
    with pytest.raises(InputError, match="shard is 4/3: give i/n, with i from 1 to n"):
        write_tokens(model, films, tmp_path / "all", shard=(4, 3))


def test_resume_writes_what_is_missing(model, films, tmp_path):
    write_tokens(model, films, tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    stamp = (tmp_path / "shots.safetensors").stat().st_mtime_ns
    (tmp_path / "run.safetensors").unlink()
    with pytest.raises(InputError, match="already has a: go on there with --resume, or give a new folder"):
        write_tokens(model, films, tmp_path)
    done = []
    summary = write_tokens(model, films, tmp_path, resume=True, progress=lambda *args: done.append(args))
    assert [entry["file"] for entry in summary["files"]] == ["run.safetensors"]
    assert (summary["already_there"], summary["damaged"]["count"]) == (3, 1)
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == whole
    assert (tmp_path / "shots.safetensors").stat().st_mtime_ns == stamp
    assert [total for _, total in done] == [5]
    assert 3 < done[0][0] <= 4


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"layer": "learned"}, "was made with layer last, not learned"),
        ({"fps": 5.0}, "was made with fps all, not 5"),
        ({"dtype": "float32"}, "was made with dtype float16, not float32"),
        ({"precision": "bf16"}, "was made with precision float32, not bf16"),
    ],
)
def test_resume_goes_on_as_it_began(model, films, tmp_path, changed, reason):
    write_tokens(model, films / "run.mp4", tmp_path)
    with pytest.raises(InputError, match=reason):
        write_tokens(model, films / "run.mp4", tmp_path, resume=True, **changed)


def test_resume_of_another_video_or_in_another_format(model, films, tmp_path):
    write_tokens(model, films / "run.mp4", tmp_path / "out")
    (tmp_path / "run.mp4").write_bytes((films / "run.mp4").read_bytes() + bytes(8))
    with pytest.raises(InputError, match=r"run\.safetensors is of .*run\.mp4, of \d+ bytes, not of .*run\.mp4, of \d+"):
        write_tokens(model, tmp_path / "run.mp4", tmp_path / "out", resume=True)
    pytest.importorskip("pyarrow")
    with pytest.raises(
        InputError, match=r"has run\.safetensors: --resume goes on with the --format a folder was begun"
    ):
        write_tokens(model, films / "run.mp4", tmp_path / "out", resume=True, format="parquet")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"frame_fps": 0.0}, "frame_fps must be above 0, not 0"),
    ],
)
def test_numbers_that_make_no_sense_leave_no_folder(model, films, tmp_path, options, reason):
    with pytest.raises(InputError, match=reason):
        write_tokens(model, films / "run.mp4", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_resume_with_other_weights_or_a_strange_file(model, films, tmp_path):
    write_tokens(model, films / "run.mp4", tmp_path)
    other = image_model()
    with pytest.raises(InputError, match=r"was made with weights [0-9a-f]{16}, not [0-9a-f]{16}"):
        write_tokens(other, films / "run.mp4", tmp_path, resume=True)
    (tmp_path / "run.safetensors").write_text("something else")
    with pytest.raises(InputError, match=r"run\.safetensors is no file of tokens"):
        write_tokens(model, films / "run.mp4", tmp_path, resume=True)


def test_a_fingerprint_is_of_every_weight(model):
    before = fingerprint(model)
    assert before == fingerprint(model)
    bias = model.blocks[2].token_learner.alpha.fc2.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[0] += 1e-3
        changed = fingerprint(model)
        bias.copy_(kept)
    assert (changed != before, fingerprint(model)) == (True, before)


# ---- ends


def test_damage_raises_where_it_is_to(model, films, tmp_path):
    with pytest.raises(InputError, match=r"broken\.mp4: no video of a known format"):
        write_tokens(model, films, tmp_path, on_error="raise")
    with pytest.raises(InputError, match=r"none of the 1 files could be read; the first: .*broken\.mp4"):
        write_tokens(model, films / "a" / "broken.mp4", tmp_path / "b")


def test_a_damaged_frame_of_a_video_is_named(films, tmp_path):
    shutil.copytree(films / "shots", tmp_path / "in" / "shots")
    write_video(pictures(6), tmp_path / "in" / "a.mp4", 10)
    summary = write_tokens(clip_model(), tmp_path / "in", tmp_path / "out", fps=10.0, frame_fps=10.0)
    assert [entry["file"] for entry in summary["files"]] == ["a.safetensors"]
    (entry,) = summary["damaged"]["files"]
    assert entry["file"] == str(tmp_path / "in" / "shots")
    assert entry["reason"].startswith("2.png: not an image")


def test_a_video_that_ends_in_damage_leaves_nothing(model, tmp_path):
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)) for i in range(60)]
    path = write_video(noise, tmp_path / "in" / "cut.mkv", 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    write_video(noise[:3], tmp_path / "in" / "whole.mp4", 30)
    done = []
    summary = write_tokens(
        model, tmp_path / "in", tmp_path / "out", batch_size=2, progress=lambda part, _: done.append(part)
    )
    assert 0 < done[0] < done[3] < 1  # some of it had been written
    assert "cut off" in summary["damaged"]["files"][0]["reason"]
    assert files_in(tmp_path / "out") == ["whole.safetensors"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole.safetensors"]


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (tiny, {}, "has no TokenLearner"),
        (image_model, {"format": "csv"}, "format is 'safetensors' or 'parquet'"),
        (image_model, {"dtype": "int8"}, "dtype 'float16' or 'float32', not safetensors, int8"),
        (image_model, {"fps": 0.0}, "fps is 0.0: give the frames a second, above 0"),
        (image_model, {"fps": 2.0}, "shots holds pictures, and 2 a second of them are wanted"),
    ],
)
def test_bad_options_leave_no_folder(films, tmp_path, model, options, reason):
    with pytest.raises(InputError, match=reason):
        write_tokens(model(), films, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_parquet_without_pyarrow(model, films, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tokenlearner\[parquet\]'"):
        write_tokens(model, films, tmp_path, format="parquet")


# ---- in processes of their own

KILLED = """
import os, signal, sys
import tokenlearner
from tokenlearner.evaluation.write_tokens import write_tokens
def stop(done, total):
    if done > 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
write_tokens(tokenlearner.load(sys.argv[1]), sys.argv[2], sys.argv[3], batch_size=4, progress=stop)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_part_under_its_name(model, tmp_path):
    source = write_video(pictures(30), tmp_path / "in" / "a.mp4", 30)
    folder = save(model, tmp_path / "model", preprocessing=PREPROCESSING, labels=())
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", KILLED, folder, source, out], timeout=120, check=False)
    assert run.returncode == -9
    (left,) = out.iterdir()
    assert left.name.startswith(".a.safetensors.writing-")
    assert [path.name for path in left.iterdir()] == ["tokens"]
    with pytest.raises(InputError, match="already has"):
        write_tokens(model, source, out)
    assert write_tokens(model, source, out, resume=True)["rows"] == 30
    assert [path.name for path in out.iterdir()] == ["a.safetensors"]


GROWTH = """
import json, sys
from pathlib import Path
import tokenlearner, torch
from tokenlearner.evaluation.write_tokens import write_tokens
torch.set_num_threads(1)
model, peaks = tokenlearner.load(sys.argv[1]), []
for video in sys.argv[4:]:
    for format in sys.argv[3].split():
        out = f"{sys.argv[2]}/{format}"
        write_tokens(model, video, out, resume=True, layer="learned", dtype="float32", format=format)
    status = Path("/proc/self/status").read_text().splitlines()
    peaks.append(next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")))
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_stays_flat_over_a_long_video(tmp_path):
    """The second has 500 frames of 128 × 256 tokens more, 66 MB; the first already fills Parquet's groups of rows."""
    folder = save(ready(inserted(tiny(embed_dim=256, depth=1), 128, 0), PREPROCESSING), tmp_path / "model")
    videos = [write_video(pictures(10) * times, tmp_path / f"{times}.mp4", 30) for times in (30, 80)]
    formats = "safetensors" if importlib.util.find_spec("pyarrow") is None else "safetensors parquet"
    command = [sys.executable, "-c", GROWTH, folder, tmp_path / "out", formats, *videos]
    run = subprocess.run(command, timeout=200, check=True, capture_output=True, text=True)
    sizes = [(tmp_path / "out/safetensors" / f"{times}.safetensors").stat().st_size for times in (30, 80)]
    assert sizes[1] - sizes[0] > 65e6
    short, long = json.loads(run.stdout)
    assert long - short < 20
