"""An exported file runs without this package and gives what the model gives, or there is no file."""

import copy
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.testing import assert_close

import tokenlearner
from export.families import CLIPS, FAMILIES, LABELS, OF_TRANSFORMERS, clip_model, image_model, ready, x2plus1d
from insertion.hosts import tiny
from tokenlearner import InputError
from tokenlearner.cli import main
from tokenlearner.data.write_video import write_video
from tokenlearner.export import comparing, export_model, exporting, tracing
from tokenlearner.export.comparing import check_difference, difference

pytestmark = pytest.mark.usefixtures("without_shape_checks")

# Of the families without a head.
OUTPUTS = {
    "SigLIP, headless": "features",
    "transformers DINOv2": "pooler_output",
    "transformers DINOv3": "pooler_output",
    "transformers CLIP": "image_embeds",
    "transformers SigLIP": "pooler_output",
    "transformers V-JEPA 2": "last_hidden_state",
}
HARD_TO_RUN = ("Scatter", "Sort", "TopK", "NonZero")  # slow or unknown on most accelerators


@pytest.fixture(params=["onnx", "pt2"])
def file_format(request):
    if request.param == "onnx":
        _need_onnx()
    return request.param


def _need_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="exporting to ONNX needs onnx, onnxscript and onnxruntime")


def exported(model, folder, **options):
    return export_model(model, folder, **{"measure": False, "log": lambda line: None, **options})


def run_onnx(folder, x, output="logits"):
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([output], {session.get_inputs()[0].name: x.numpy()})[0])


def run_program(folder, x):
    return torch.export.load(folder / "model.pt2").module()(x)


def made(family):
    if family in OF_TRANSFORMERS:
        pytest.importorskip("transformers", reason="transformers is not installed")
    return FAMILIES[family]()


@torch.no_grad()
def expected_of(model, family, x):
    if family not in OF_TRANSFORMERS:
        return model(x)
    return getattr(model(x.transpose(1, 2) if x.ndim == 5 else x), OUTPUTS.get(family, "logits"))


def inputs_of(model, batch=3):
    return torch.randn(batch, *model.preprocessing.model_input)


def hard_operators(summary):
    return {name for name in summary["operators"] if name.startswith(HARD_TO_RUN)}


@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_gives_what_the_model_gives(family, tmp_path):
    _need_onnx()
    model, output = made(family), OUTPUTS.get(family, "logits")
    summary = exported(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "preprocessing.json"]
    for batch in (1, 3):
        x = inputs_of(model, batch)
        assert_close(run_onnx(tmp_path, x, output), expected_of(model, family, x), rtol=1e-4, atol=1e-4)
    comparison = summary["comparison"]
    assert 0 < comparison["noise"]["largest_relative"] <= 1e-4
    assert comparison["real"]["top1_agreement"] == (1.0 if output == "logits" else None)
    assert summary["labels"] == (list(LABELS) if output == "logits" else None)
    if (hard := hard_operators(summary)) and tokenlearner.insertion_of(model):
        host = exported(tokenlearner.remove(copy.deepcopy(model)), tmp_path / "host")
        assert hard <= hard_operators(host)
    else:
        assert not hard


@pytest.mark.parametrize(
    "family",
    [
        "conv, fuser, registers",
        "ViViT, window",
        "X(2+1)D with TokenLearner",
        "BEiT v2",
        "transformers BEiT",
        "transformers V-JEPA 2",
    ],
)
def test_an_exported_program_gives_what_the_model_gives(family, tmp_path):
    model = made(family)
    summary = exported(model, tmp_path, format="pt2")
    for batch in (1, 3):
        x = inputs_of(model, batch)
        assert_close(run_program(tmp_path, x), expected_of(model, family, x))
    assert summary["operators"]["aten.layer_norm.default"] > 0
    assert not any(word in name for name in summary["operators"] for word in ("scatter", "sort", "topk", "index_put"))


@pytest.mark.parametrize("family", ["mlp", "ViViT, fuser by clip"])
def test_half_precision_takes_and_gives_float32_and_keeps_maps_in_it(family, tmp_path):
    _need_onnx()
    import onnx

    model = FAMILIES[family]()
    summary = exported(model, tmp_path, precision="fp16")
    x = inputs_of(model)
    y = run_onnx(tmp_path, x)
    with torch.no_grad():
        expected = model(x)
    assert y.dtype == torch.float32
    assert 1e-6 < (y - expected).abs().max() / expected.abs().max() <= 2e-2
    assert summary["input"]["dtype"] == summary["output"]["dtype"] == "float32"
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx")).graph
    stored = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    assert not stored
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    squash = "Softmax" if family == "mlp" else "Sigmoid"
    squashed = [types[node.output[0]] for node in graph.node if node.op_type == squash]
    assert onnx.TensorProto.FLOAT in squashed  # the learner's


def test_half_precision_as_a_program(tmp_path):
    model = image_model()
    exported(model, tmp_path, format="pt2", precision="fp16")
    x = inputs_of(model)
    with torch.no_grad():
        y, expected = run_program(tmp_path, x), model(x)
    assert y.dtype == torch.float32
    assert 1e-6 < (y - expected).abs().max() / expected.abs().max() <= 2e-2
    program = torch.export.load(tmp_path / "model.pt2")
    assert {t.dtype for t in program.state_dict.values()} == {torch.float16}
    assert program.example_inputs is None  # of clips they would be megabytes


def test_the_folder_says_all_that_running_the_file_needs(file_format, tmp_path, capfd):
    model = clip_model().train()
    before = copy.deepcopy(model.state_dict())
    lines = []
    summary = exported(model, tmp_path, format=file_format, log=lines.append)
    assert capfd.readouterr() == ("", "")
    assert [line.split()[0] for line in lines] == ["exporting", "noise", "4", "wrote"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"model.{file_format}", "preprocessing.json"]
    said = json.loads((tmp_path / "preprocessing.json").read_text())
    content = (tmp_path / said["file"]).read_bytes()
    assert said["sha256"] == hashlib.sha256(content).hexdigest()
    assert said["bytes"] == len(content)
    assert str(Path(tokenlearner.__file__).parent).encode() not in content  # no folder of ours in somebody's file
    assert said["input"] == {"name": "clips", "shape": ["batch", 3, 6, 16, 16], "dtype": "float32"}
    assert said["output"]["shape"] == ["batch", 5]
    assert said["preprocessing"]["frames"] == 6
    assert said["preprocessing"]["fps"] == 6.0
    assert said["preprocessing"]["mean"] == list(CLIPS.mean)
    assert said["labels"] == list(LABELS)
    assert said["insertion"]["num_tokens"] == 4
    assert said["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(summary))["sha256"] == said["sha256"]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_onnx_names_its_input_output_and_batch(tmp_path):
    _need_onnx()
    import onnxruntime

    exported(image_model(), tmp_path, opset=18)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        ("images", ["batch", 3, 32, 32], "tensor(float)")
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 5])]


def test_a_models_own_file_and_its_hosts_are_timed_in_turns(file_format, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "ROUNDS", 2)
    monkeypatch.setattr(exporting, "SECONDS_PER_ROUND", 0.01)
    model = image_model()
    summary = exported(model, tmp_path, format=file_format, measure=True)
    host, tokens = summary["speed"]["files"]
    assert (host["name"], tokens["name"]) == ("host", "TokenLearner")
    assert host["ratio"] == 1
    assert tokens["images_per_second"] > 0
    assert summary["speed"]["runtime"] == ("onnxruntime" if file_format == "onnx" else "torch")
    assert summary["speed"]["threads"] == torch.get_num_threads()
    assert sum(summary["host_operators"].values()) < sum(summary["operators"].values())
    assert tokenlearner.insertion_of(model) is not None
    assert len(list(tmp_path.iterdir())) == 2  # the host's file was for timing only


def test_a_model_without_insertion_is_timed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "ROUNDS", 1)
    monkeypatch.setattr(exporting, "SECONDS_PER_ROUND", 0.01)
    summary = exported(FAMILIES["X(2+1)D with TokenLearner"](), tmp_path, format="pt2", measure=True)
    (only,) = summary["speed"]["files"]
    assert only["name"] == "X2Plus1D"
    assert only["clips_per_second"] > 0
    assert summary["host_operators"] is None


def test_pictures_given_are_what_is_compared_on(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((40, 36), 60).save(folder / f"{i}.png")
    (folder / "9.png").write_bytes(b"no picture")
    real = exported(image_model(), tmp_path / "out", format="pt2", inputs=[folder])["comparison"]["real"]
    assert real["source"] == "the images given"
    assert real["inputs"] == 3
    assert [Path(entry["file"]).name for entry in real["damaged"]["files"]] == ["9.png"]


def test_videos_given_are_what_is_compared_on(tmp_path):
    video = write_video([Image.effect_noise((32, 24), 60) for _ in range(8)], tmp_path / "a.mp4", 6)
    real = exported(clip_model(), tmp_path / "out", format="pt2", inputs=[video])["comparison"]["real"]
    assert (real["source"], real["inputs"]) == ("the clips given", 1)


def test_nothing_is_written_where_no_input_can_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of the 1 files could be read"):
        exported(image_model(), tmp_path / "out", format="pt2", inputs=[tmp_path / "a.png"])
    assert not list((tmp_path / "out").iterdir())


def test_a_model_of_four_channels_is_compared_on_noise_alone(tmp_path):
    model = ready(tiny(depth=1, in_chans=4), replace(image_model().preprocessing, input_size=(4, 32, 32)))
    summary = exported(model, tmp_path, format="pt2")
    assert summary["comparison"]["noise"]["inputs"] == 8
    assert summary["comparison"]["real"] is None
    assert summary["preprocessing"]["pixels"] == "4 channels, 0 to 1"


def test_a_file_that_differs_is_not_kept_and_an_older_one_stays(tmp_path, monkeypatch):
    older = exported(image_model(), tmp_path, format="pt2")["sha256"]
    monkeypatch.setitem(comparing.TOLERANCE, "fp16", 1e-7)
    with pytest.raises(InputError, match=r"off by [\d.e-]+ on noise, where the model's outputs reach [\d.]+:"):
        exported(image_model(), tmp_path, format="pt2", precision="fp16")
    assert hashlib.sha256((tmp_path / "model.pt2").read_bytes()).hexdigest() == older
    assert len(list(tmp_path.iterdir())) == 2


def test_half_precision_that_overflows_is_refused(tmp_path):
    model = image_model()
    with torch.no_grad():
        model.pos_embed.fill_(40000)
        model.patch_embed.proj.bias.fill_(40000)  # each fits in float16, and their sum doesn't
    with pytest.raises(InputError, match=r"off by nan on noise.* use precision='fp32'"):
        exported(model, tmp_path, format="pt2", precision="fp16")
    with torch.no_grad():
        model.pos_embed.fill_(70000)
    with pytest.raises(InputError, match=r"^pos_embed has numbers beyond 65504, float16's largest"):
        exported(model, tmp_path, format="pt2", precision="fp16")
    assert not list(tmp_path.iterdir())


class OfTheBatch(nn.Module):
    """Reads off the numbers which way to go, so no one graph does for all inputs."""

    preprocessing = replace(CLIPS, frames=None, fps=None)

    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class OfTwo(OfTheBatch):
    def forward(self, x):
        return x.reshape(2, -1)


@pytest.mark.parametrize("model", [OfTheBatch, OfTwo])
def test_a_model_without_one_graph_is_refused_in_a_sentence(model, file_format, tmp_path, capfd):
    with pytest.raises(
        InputError, match=rf"^this {model.__name__} can't be exported to {file_format}: \w+: "
    ) as raised:
        exported(model(), tmp_path, format=file_format)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def on_meta():
    with torch.device("meta"):
        return ready(VisionTransformer(img_size=32, depth=1))


def compiled():
    return torch.compile(image_model(), backend="eager")


def compiled_inside():
    model = image_model()
    model.blocks[0].compile(backend="eager")
    return model


def of_other_channels():
    return ready(tiny(depth=1), replace(image_model().preprocessing, input_size=(4, 32, 32)))


def unprepared():
    return tiny(depth=1)


def clips_prepared_as_pictures():
    return ready(x2plus1d(), replace(CLIPS, frames=None))


REFUSED = {
    "format": (image_model, {"format": "tflite"}, "format is 'onnx' or 'pt2', not 'tflite'"),
    "precision": (image_model, {"precision": "int8"}, "precision is 'fp32' or 'fp16', not 'int8'"),
    "opset of a program": (image_model, {"format": "pt2", "opset": 20}, "opset=20 is a version of ONNX's operators"),
    "opset": (image_model, {"opset": 9}, "opset is 18 to 25, not 9"),
    "meta": (on_meta, {"format": "pt2"}, "on the meta device, so it has no weights to export"),
    "compiled": (compiled, {"format": "pt2"}, "compiled: export the model that was given to torch.compile"),
    "a compiled block": (compiled_inside, {"format": "pt2"}, "a part of it is compiled"),
    "no preprocessing": (unprepared, {"format": "pt2"}, r"does not say how its images are prepared"),
    "no frames": (clips_prepared_as_pictures, {"format": "pt2"}, r"how its clips are prepared.*frames=\.\.\., fps="),
    "other channels": (
        of_other_channels,
        {"format": "pt2"},
        r"does not run on an input of shape \(4, 32, 32\), which its p",
    ),
    "no inputs": (image_model, {"format": "pt2", "inputs": []}, "inputs is empty"),
    "no such input": (image_model, {"format": "pt2", "inputs": ["nowhere.png"]}, "nowhere.png does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, tmp_path):
    build, options, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        exported(build(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_weights_beyond_one_onnx_file_are_refused_with_what_would_fit(tmp_path, monkeypatch):
    model = image_model()
    size = sum(t.numel() for t in model.state_dict().values()) * 4
    monkeypatch.setattr(tracing, "MOST_ONNX_BYTES", size - 4)
    with pytest.raises(InputError, match=r"one ONNX file holds less than 2: use precision='fp16' or format='pt2'"):
        exported(model, tmp_path)
    monkeypatch.setattr(tracing, "MOST_ONNX_BYTES", size // 2 - 4)
    with pytest.raises(InputError, match=r"GiB in fp16, and one ONNX file holds less than 2: use format='pt2'"):
        exported(model, tmp_path, precision="fp16")


def test_what_onnx_needs_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    with pytest.raises(InputError, match="needs the package onnxscript, which is not there: pip install onnx"):
        exported(image_model(), tmp_path)


def compared(one, other, precision="fp32"):
    Y, other_Y = torch.tensor(one), torch.tensor(other)
    return difference(lambda x: Y, lambda x: other_Y, [torch.zeros(1)], close=comparing.CLOSE[precision], classes=True)


def test_another_top1_is_refused_although_the_outputs_are_near():
    found = compared([[0.0, 1.0], [1.0, 0.985]], [[0.0, 1.0], [1.0, 1.001]], "fp16")
    assert (found.agreeing, found.counted) == (1, 2)
    with pytest.raises(InputError, match="has the model's top-1 on 1 of 2 clear cases among photos"):
        check_difference(found, "fp16", "photos", top1=True)
    check_difference(found, "fp16", "noise", top1=False)


def test_outputs_nearer_than_the_precision_have_no_top1():
    found = compared([[0.0, 1.0], [1.0, 0.999]], [[0.0, 1.0], [1.0, 1.001]], "fp16")
    assert (found.agreeing, found.counted) == (1, 1)
    check_difference(found, "fp16", "photos", top1=True)


def test_a_difference_is_told_with_its_size():
    found = compared([[0.0, 4.0]], [[0.5, 4.0]])
    assert (found.largest_absolute, found.scale, found.largest_relative) == (0.5, 4.0, 0.125)
    with pytest.raises(InputError, match=r"off by 0\.5 on noise, where the model's outputs reach 4: 0\.12 of that"):
        check_difference(found, "fp32", "noise", top1=False)


def test_outputs_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="off by nan"):
        check_difference(compared([[0.0, 1.0]], [[0.0, float("nan")]]), "fp32", "noise", top1=False)
    with pytest.raises(InputError, match="the model's own outputs on noise are not finite"):
        check_difference(compared([[0.0, float("inf")]], [[0.0, 1.0]]), "fp32", "noise", top1=False)
    check_difference(compared([[0.0, 0.0]], [[0.0, 0.0]]), "fp32", "noise", top1=True)  # a head that starts at zero


def test_the_command(tmp_path, capsys):
    options = ["--format", "pt2", "--no-measure", "--json"]
    main(["export", "tokenlearner_micro4_32_8at2_mlp", "--output", str(tmp_path), *options])
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["file"], summary["precision"], summary["speed"]) == ("model.pt2", "fp32", None)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2", "preprocessing.json"}
    assert "same top-1" in printed.err
