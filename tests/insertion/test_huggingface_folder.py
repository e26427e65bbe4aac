"""A folder of transformers is opened with what is beside its weights, or refused for what is not."""

import json
from functools import partial

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import tokenlearner
from export.families import OF_TRANSFORMERS
from insertion.hosts import inserted
from tokenlearner.errors import InputError
from tokenlearner.export import export_model
from tokenlearner.insertion.huggingface_folder import is_pretrained, open_pretrained

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CROP = {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
FRAME = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
PROCESSORS = {
    "transformers ViT": lambda: transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
    "transformers BEiT": lambda: transformers.BeitImageProcessor(size={"height": 36, "width": 36}, **CROP),
    "transformers CLIP": lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 36}, **CROP),
    "transformers ViViT": lambda: transformers.VivitVideoProcessor(**FRAME),
    "transformers VideoMAE": lambda: transformers.VideoMAEImageProcessor(**FRAME),
    "transformers V-JEPA 2": lambda: transformers.VJEPA2VideoProcessor(crop_size=16),
}
CLIP_MODELS = ("transformers ViViT", "transformers VideoMAE", "transformers V-JEPA 2")


def saved(family, folder, **changes):
    model = OF_TRANSFORMERS[family]()
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    PROCESSORS[family]().save_pretrained(folder)
    return model


def photo():
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[0]).resize((80, 60))  # so that crops are centred to the pixel


@pytest.mark.parametrize("family", PROCESSORS)
def test_pictures_are_prepared_as_the_processor_prepares_them(family, tmp_path):
    saved(family, tmp_path)
    preprocessing = open_pretrained(tmp_path).preprocessing
    processor, picture = PROCESSORS[family](), photo()
    if family in CLIP_MODELS:
        (theirs,) = processor([[picture] * 2], return_tensors="pt").values()
        theirs = theirs[0, 0]
        assert preprocessing.model_input == (3, 6, 16, 16)
    else:
        theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
        assert preprocessing.model_input == (3, 32, 32)
    difference = (preprocessing.transform()(picture) - theirs).mul(torch.tensor(preprocessing.std)[:, None, None])
    assert difference.abs().mean() < 0.005


@pytest.mark.parametrize("family", ["transformers ViT", "transformers V-JEPA 2"])
def test_the_model_is_the_one_saved(family, tmp_path):
    model = saved(family, tmp_path, id2label=dict(enumerate("vwxyz")))
    opened = open_pretrained(tmp_path)
    assert tokenlearner.insertion_of(opened) == tokenlearner.insertion_of(model)
    assert opened.label_names == (tuple("vwxyz") if family == "transformers ViT" else None)
    assert_close(opened.model.state_dict(), model.state_dict())
    assert not opened.training


def test_a_folder_to_a_file(tmp_path):
    model = saved("transformers ViViT", tmp_path / "saved", id2label=dict(enumerate("vwxyz")))
    summary = export_model(
        open_pretrained(tmp_path / "saved"), tmp_path / "out", format="pt2", measure=False, log=lambda line: None
    )
    said = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert said["input"]["shape"] == ["batch", 3, 6, 16, 16]
    assert said["labels"] == list("vwxyz")
    assert said["versions"]["transformers"] == transformers.__version__
    assert said["preprocessing"]["frames"] == 6
    assert said["insertion"] == tokenlearner.insertion_of(model).to_dict()
    assert summary["comparison"]["real"]["inputs"] == 4
    clips = torch.randn(2, 3, 6, 16, 16)
    with torch.no_grad():
        assert_close(
            torch.export.load(tmp_path / "out" / "model.pt2").module()(clips), model(clips.transpose(1, 2)).logits
        )


def test_clips_of_an_unknown_rate_are_not_cut_from_videos(tmp_path):
    saved("transformers ViViT", tmp_path / "saved")
    with pytest.raises(InputError, match=r"how many frames a second its clips show.* or give no videos"):
        export_model(open_pretrained(tmp_path / "saved"), tmp_path / "out", format="pt2", inputs=[tmp_path])


def test_whose_folder_it_is(tmp_path):
    saved("transformers ViT", tmp_path)
    assert is_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 1, "host": {}}')
    assert not is_pretrained(tmp_path)
    assert not is_pretrained(tmp_path / "nowhere")


def without_processor(folder):
    saved("transformers ViT", folder)
    (folder / "preprocessor_config.json").unlink()


def without_weights(folder):
    saved("transformers ViT", folder)
    (folder / "model.safetensors").unlink()


def of_another_class(folder):
    config = transformers.ViTMAEConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    config.architectures = ["ViTMAEModel"]
    config.save_pretrained(folder)


def inserted_inside(folder):
    """What is saved is the outer model, whose configuration knows nothing of the learner."""
    host = tokenlearner.remove(OF_TRANSFORMERS["transformers ViT"]())
    host.vit = inserted(host.vit, 4, 0)
    host.save_pretrained(folder)


def with_another_head(folder):
    saved("transformers ViT", folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["TokenLearnerDeiTForImageClassification"]
    (folder / "config.json").write_text(json.dumps(config))


def of_no_fixed_size(folder):
    saved("transformers ViT", folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(folder)


def damaged(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{")


def cut_short(folder):
    saved("transformers ViT", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def changed(folder, **entries):
    saved("transformers ViT", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


REFUSED = {
    "cut short": (cut_short, "the model in .*saved can't be loaded: .*header"),
    "a word for a number": (partial(changed, hidden_size="x"), "the model in .* can't be loaded: .*hidden_size"),
    "another shape": (
        partial(changed, num_labels=7, id2label=None),
        r"classifier\.\w+ is \(5.* there and \(7.* by the config",
    ),
    "a class of no list": (partial(changed, architectures="ViTNothing"), "has a ViTNothing, which is not served; of"),
    "no processor": (without_processor, r"has no image processor, so how .* processor\.save_pretrained\("),
    "no weights": (without_weights, "the model in .* can't be loaded: "),
    "no host": (
        of_another_class,
        "has a ViTMAEModel, which is not served: it keeps a random part of the patches",
    ),
    "inserted inside": (inserted_inside, "they also have .*token_learner.*; insert into the model that is saved"),
    "another class": (with_another_head, "not those of the TokenLearnerDeiTForImageClassification .* says: they lack "),
    "no fixed size": (of_no_fixed_size, "CLIPImageProcessor in .* prepares images of no fixed size"),
    "damaged": (damaged, "config.json is not readable JSON"),
}


@pytest.mark.filterwarnings("ignore:You are using a model of type")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_is_said(case, tmp_path):
    build, sentence = REFUSED[case]
    build(tmp_path / "saved")
    with pytest.raises(InputError, match=sentence):
        open_pretrained(tmp_path / "saved")
