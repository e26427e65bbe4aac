"""Lists of images: what a CSV may look like, what its labels become, and what each broken one is called."""

from pathlib import Path

import pytest

from tokenlearner.data.lists import read_list
from tokenlearner.errors import InputError


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "list.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        read_list(path, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


PLAIN = "file,label\na.jpg,dog\nsub/b.jpg,cat\n/far/c.jpg,dog\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.rstrip("\n"),
        PLAIN.replace("label", "labels"),
        b"\xef\xbb\xbf" + PLAIN.encode(),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\n\n"),
        'label , when, file\n dog,"1, 2",a.jpg\n"cat ",,"sub/b.jpg",and more\ndog,3,/far/c.jpg\n',
        PLAIN + "a.jpg,dog\n",  # said twice
    ],
    ids=["plain", "no last newline", "labels", "BOM", "CRLF", "empty lines", "other columns", "said twice"],
)
def test_one_class_an_image(tmp_path, content):
    images = read_list(str(write(tmp_path, content)))
    assert images.files == (tmp_path / "a.jpg", tmp_path / "sub" / "b.jpg", Path("/far/c.jpg"))
    assert images.labels == (1, 0, 1)
    assert images.classes == ("cat", "dog")
    assert not images.multilabel


def test_names_are_not_ascii_alone_and_may_hold_what_csv_quotes(tmp_path):
    images = read_list(write(tmp_path, 'file,label\n"a,b.jpg",Übung\n"say ""hi"".jpg",Ж\n'))
    assert [file.name for file in images.files] == ["a,b.jpg", 'say "hi".jpg']
    assert images.classes == ("Übung", "Ж")


@pytest.mark.parametrize("empty", [";", "", "  ", " ; ;"])
def test_several_classes_or_none_make_the_list_multi_label(tmp_path, empty):
    images = read_list(write(tmp_path, f"file,label\na.jpg,dog\nb.jpg,dog; cat;dog\nc.jpg,{empty}\nd.jpg,eel;\n"))
    assert images.classes == ("cat", "dog", "eel")
    assert images.labels == ((1,), (0, 1), (), (2,))
    assert images.multilabel


def test_given_classes_keep_their_order(tmp_path):
    path = write(tmp_path, PLAIN)
    images = read_list(path, ["dog", "cow", "cat"])
    assert (images.classes, images.labels) == (("dog", "cow", "cat"), (0, 2, 0))
    path.write_text("file,label\na.jpg,dog;cat\n")
    assert read_list(path, ["dog", "cow", "cat"]).labels == ((0, 2),)
    path.write_text("file,label\na.jpg,dog\n")
    assert read_list(path, ["dog"]).labels == (0,)  # one class is enough where the classes are known


def test_labels_the_model_does_not_know(tmp_path):
    path = write(tmp_path, "file,label\na.jpg,dog\nb.jpg,cats\n")
    assert refused(path, ["dog", "cat"]) == (
        ", line 3: label 'cats' is not one of the 2 known classes: dog, cat; did you mean cat?"
    )
    assert refused(path, ["ant", "dog"]).endswith("classes: ant, dog")
    assert "twice" in refused(path, ["dog", "cats", "dog"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("path,class\na.jpg,dog\n", " has no column 'file': expected file and label, its columns are path, class"),
        ("file,class\na.jpg,dog\n", " has no column 'label': expected file and label, its columns are file, class"),
        ("", " has no column 'file': expected file and label, its columns are none"),
        ("file,label\n", " lists no image: expected a line for each below the header"),
        ("file,label\na,dog\nb,dog\n", " holds a single class, dog: expected at least 2 classes"),
        ("file,label\na,\nb,\n", " holds no class: expected at least 2 classes"),
        ("label,file\ndog,a.jpg\ncat\n", ", line 3 has 1 cells, where the header has 2"),
        ("file,label\n,dog\n", ", line 2 names no file"),
        ("file,label\na,dog\nb,cat\n./a,cat\n", ", line 4: ./a has another label than in line 2"),
        ("file,label\na,dog;cat\nb,cat\na,cat\n", ", line 4: a has another label than in line 2"),
        (b"file,label\na,caf\xe9\n", " is no CSV in UTF-8: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_what_is_no_list(tmp_path, content, reason):
    assert refused(write(tmp_path, content)).startswith(reason)


def test_what_is_no_file(tmp_path):
    expected = "expected a CSV with file and label"
    assert refused(tmp_path / "gone.csv") == f" can't be read (No such file or directory): {expected}"
    assert refused(tmp_path) == f" can't be read (Is a directory): {expected}"
