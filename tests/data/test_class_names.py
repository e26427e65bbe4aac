"""Which output of a model a class of somebody's data is."""

import pytest
import timm.data

from tokenlearner.data.class_names import distinct, published_labels, read_as, renamed
from tokenlearner.errors import InputError


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["a", "b"], ["b"], ["a", "b"]),
        (["Golden Retriever", "cat"], ["golden_retriever"], ["golden_retriever", "cat"]),
        (["tench, Tinca tinca", "cat"], ["CAT", "tinca-tinca"], ["tinca-tinca", "CAT"]),
    ],
)
def test_names_that_mean_a_label(labels, names, expected):
    assert renamed(labels, names) == expected


def test_names_of_imagenets_classes():
    labels = published_labels(1000)
    classes = renamed(labels, ["tench", "daisy"])
    assert classes[0] == "tench"
    assert classes[985] == "daisy"
    assert classes[1:985] == labels[1:985]
    with pytest.raises(InputError, match="the class crane could be n02012849 or n03126707: name it as one"):
        renamed(labels, ["crane"])


def test_names_that_mean_no_label_or_the_same():
    with pytest.raises(InputError, match="the class dog is not one of the 2 known classes: cat, cow"):
        renamed(["cat", "cow"], ["dog"])
    with pytest.raises(InputError, match="the classes Cat and CAT both mean cat: put them into one"):
        renamed(["cat", "cow"], ["Cat", "CAT"])


def test_an_error_that_is_not_about_classes_is_passed_on():
    def read(classes):
        raise InputError("no such folder")

    with pytest.raises(InputError, match="no such folder"):
        read_as(["a"], read, lambda it: it)


def test_imagenets_labels_are_known_by_their_number():
    labels = published_labels(1000)
    assert (len(labels), labels[0]) == (1000, "n01440764")
    assert published_labels(10) is None


def words_of_imagenet() -> list[str]:
    """The labels of transformers' models, in which two are called crane and two maillot."""
    info = timm.data.ImageNetInfo("imagenet-1k")
    return [info.index_to_description(i) for i in range(1000)]


def test_labels_that_are_there_twice_are_told_apart():
    assert distinct(["crane", "cat", "crane"]) == ["crane (0)", "cat", "crane (2)"]
    labels = distinct(words_of_imagenet())
    assert len(set(labels)) == 1000
    assert (labels[134], labels[517]) == ("crane (134)", "crane (517)")


def test_a_label_that_is_there_twice_matters_only_where_the_data_has_it():
    def read(classes):
        if classes is None:
            return names
        if len(set(classes)) < len(classes):
            raise InputError("a class name is there twice")
        if unknown := set(names) - set(classes):
            raise InputError(f"unknown: {unknown}")
        return list(classes)

    labels = words_of_imagenet()
    for names, place in ((["tench"], 0), (["crane (517)"], 517), (["n02012849"], 134), (["n03126707"], 517)):
        assert read_as(labels, read, lambda it: it)[place] == names[0]
    names = ["crane"]
    with pytest.raises(InputError, match=r"the class crane could be crane \(134\) or crane \(517\): name it as one"):
        read_as(labels, read, lambda it: it)


def test_the_folders_of_imagenet_mean_its_words_only_in_its_order():
    labels = distinct(words_of_imagenet())
    assert renamed(labels, ["n01440764"])[0] == "n01440764"
    with pytest.raises(InputError, match="the class n01440764 is not one of the 1000 known classes"):
        renamed(labels[::-1], ["n01440764"])
    with pytest.raises(InputError, match="the class n01440764 is not one of the 1000 known classes"):
        renamed([f"thing {i}" for i in range(1000)], ["n01440764"])
