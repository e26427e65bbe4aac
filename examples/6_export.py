"""A trained model as an ONNX file that runs without this package and without PyTorch, compared with the model."""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import tokenlearner
from tokenlearner.export import export_model
from tokenlearner.models import open_trained

import numpy as np
import torch

if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
    print(f"skipped: exporting to ONNX needs {', '.join(missing)}; export_model(..., format='pt2') does not")
    sys.exit()

import onnxruntime

model = open_trained("tokenlearner_micro4_32_8at2_mlp")  # ours, trained on CIFAR-10; comes with the package
images = torch.randn(3, *model.preprocessing.model_input)

with tempfile.TemporaryDirectory() as folder:
    summary = export_model(model, folder)  # raises where the file computes anything else than the model

    # What a service does with the folder: numpy and onnxruntime, nothing of ours.
    description = json.loads((Path(folder) / "preprocessing.json").read_text())
    session = onnxruntime.InferenceSession(Path(folder) / description["file"])
    (logits,) = session.run(None, {description["input"]["name"]: images.numpy()})

labels = [description["labels"][i] for i in logits.argmax(axis=1)]
with torch.no_grad():
    assert np.allclose(logits, model(images), atol=1e-4)
print(f"{labels}, and {tokenlearner.insertion_of(model).describe()}")
print(json.dumps(summary["comparison"]["real"], indent=2))
