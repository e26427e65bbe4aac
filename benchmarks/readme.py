"""Measures the README's numbers and writes them into its tables, so that none is typed by hand.

python benchmarks/readme.py measure   # times ViTs on this machine → benchmarks/readme.json (about 4 minutes)
python benchmarks/readme.py demo      # copies summaries and pictures of both demos in runs/ → benchmarks/, docs/
python benchmarks/readme.py write     # both files → README.md; `--check` only says whether it is up to date
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEASURED, README = ROOT / "benchmarks/readme.json", ROOT / "README.md"
DEMOS = {"demo": ROOT / "benchmarks/demo.json", "demo-video": ROOT / "benchmarks/demo-video.json"}
PHOTOS = {name: ROOT / f"studies/photos/{name}/summary.json" for name in ("cifar10", "flowers")}  # by report.py there
INTERACTIONS = ROOT / "studies/ut_interaction/summary.json"
COMPRESS = ROOT / "studies/compress/summary.json"

# Host, image size, batch: the sizes the project compares itself on.
CASES = (("vit_small_patch16_224", 224, 8), ("vit_base_patch16_224", 224, 8), ("vit_base_patch16_384", 384, 4))


def measure() -> None:
    import tokenlearner
    from tokenlearner.inspection import measure_speed
    from tokenlearner.inspection.summary import hardware

    import timm
    import torch

    rows = []
    for name, side, batch in CASES:
        models = {"plain": timm.create_model(name)}
        models["8 tokens at ½"] = tokenlearner.insert(timm.create_model(name), num_tokens=8, at=0.5)
        speeds = {s.name: s for s in measure_speed(models, torch.randn(batch, 3, side, side), rounds=9)}
        for label, model in models.items():
            counted = tokenlearner.cost(model, (3, side, side))
            rows.append(
                {
                    "host": name,
                    "model": label,
                    "batch": batch,
                    "parameters": counted.parameters,
                    "macs": counted.macs,
                    "images_per_second": round(speeds[label].images_per_second, 2),
                    "speedup": round(speeds[label].ratio, 3),
                }
            )
            print(rows[-1], flush=True)
    document = {"command": "python benchmarks/readme.py measure", "hardware": hardware(), "torch": torch.__version__}
    MEASURED.write_text(json.dumps({**document, "dtype": "float32", "rounds": 9, "rows": rows}, indent=2) + "\n")


def copy_demo() -> None:
    import tokenlearner  # noqa: F401 - before timm
    from tokenlearner.data.images import find_images
    from tokenlearner.evaluation.predict import write_sheets
    from tokenlearner.insertion.saving import load

    for name, path in DEMOS.items():
        shutil.copy(ROOT / "runs" / name / "summary.json", path)
    shutil.copy(ROOT / "runs/demo-video/maps/clockwise.png", ROOT / "docs/maps-video.png")
    pictures = find_images(ROOT / "runs/demo/pictures")
    write_sheets(load(ROOT / "runs/demo/tokenlearner"), pictures, ROOT / "docs", columns=len(pictures))


def tables() -> dict[str, str]:
    """The README's generated parts by name."""
    demo, video = (json.loads(path.read_text()) for path in DEMOS.values())
    measured = json.loads(MEASURED.read_text())
    photos = {name: json.loads(path.read_text()) for name, path in PHOTOS.items()}
    demos = {
        "demo": demo_table(demo, "digits, `make demo`", "digits"),
        "demo-video": demo_table(video, "moving digits, `tokenlearner demo --video`", "clips"),
    }
    interactions = json.loads(INTERACTIONS.read_text())
    studies = {
        "photos": photos_table(photos),
        "ut-interaction": interactions_table(interactions),
        "compress": compress_table(json.loads(COMPRESS.read_text())),
    }
    return {**demos, "speed": speed_table(measured), **studies}


def demo_table(demo: dict, title: str, what: str) -> str:
    rate = "images/s" if what == "digits" else f"{what}/s"
    lines = [f"| {title} | accuracy | MACs | {rate} | tokens per layer |", "|---|---|---|---|---|"]
    for row in demo["models"]:
        tokens = " ".join(map(str, row["tokens_per_layer"]))
        lines.append(
            f"| {row['name']} | {row['accuracy']:.1%} | {row['macs'] / 1e6:.2f} M | "
            f"{row['images_per_second']:,.0f} ({row['speedup']:.2f}×) | {tokens} |"
        )
    return "\n".join(
        [*lines, "", f"{demo['seconds']:.0f} s in all, {demo['held_out']} held-out {what}, {demo['hardware']}."]
    )


def speed_table(measured: dict) -> str:
    lines = ["| host | model | parameters | GMACs | images/s | speed-up | MAC ratio |", "|---|---|---|---|---|---|---|"]
    for row in measured["rows"]:
        plain = next(r for r in measured["rows"] if r["host"] == row["host"])
        lines.append(
            f"| `{row['host']}` | {row['model']} | {row['parameters'] / 1e6:.2f} M | {row['macs'] / 1e9:.2f} | "
            f"{row['images_per_second']:.1f} | {row['speedup']:.2f}× | {plain['macs'] / row['macs']:.2f}× |"
        )
    batches = ", ".join(str(batch) for _, _, batch in CASES)
    how = f"Forward passes in float32, batch {batches}, median of {measured['rounds']} alternated rounds."
    return "\n".join([*lines, "", f"{how} {measured['hardware']}, torch {measured['torch']}."])


def photos_table(studies: dict[str, dict]) -> str:
    cifar, flowers = studies["cifar10"], studies["flowers"]
    lines = ["| model | MACs | CIFAR-10, top-1 | flowers, top-1 |", "|---|---|---|---|"]
    plain = cifar["models"]["plain"]
    for name, model in cifar["models"].items():
        macs = f"{model['macs'] / 1e6:.1f} M ({model['macs'] / plain['macs']:.2f}×)"
        scores = [photos_score(study["models"][name]) for study in studies.values()]
        lines.append(f"| {model['label']} | {macs} | {' | '.join(scores)} |")
    seeds, (hardware,) = {m["n"] for s in studies.values() for m in s["models"].values()}, cifar["hardware"]
    how = (
        f"Mean ± sample deviation of {' or '.join(map(str, sorted(seeds)))} seeds on the whole test sets, of the last "
        f"epoch's averaged weights; {cifar['recipe']['epochs']} and {flowers['recipe']['epochs']} epochs. MACs on "
        f"CIFAR-10. In brackets the difference to the plain ViT beside its 95 % margin. {hardware}."
    )
    return "\n".join([*lines, "", how])


def photos_score(model: dict) -> str:
    score = f"{model['top1_mean']:.1f} ± {model['top1_deviation']:.1f} %"
    against = model.get("against_plain")
    if against is None:
        return score
    return f"{score} ({against['verdict']}: {against['difference']:+.1f}, margin {against['margin']:.1f})"


def interactions_table(study: dict) -> str:
    lines = ["| model | MACs a view | set 1 → 2 | set 2 → 1 | both |", "|---|---|---|---|---|"]
    models, plain = study["models"], None
    for name, model in models.items():
        plain = model if not name.endswith("-tl8") else plain
        macs = f"{model['macs'] / 1e6:.0f} M ({model['macs'] / plain['macs']:.2f}×)"
        parts = [f"{part['top1_mean']:.1f} ± {part['top1_deviation']:.1f} %" for part in directions(model)]
        lines.append(f"| {model['label']} | {macs} | {' | '.join(parts)} | {photos_score(model)} |")
    (seeds,), (hardware,) = {len(m["seeds"]) for m in models.values()}, study["hardware"]
    how = (
        f"Top-1, mean ± sample deviation of {seeds} seeds, last epoch, {study['views']} views. In brackets "
        f"the difference to the plain model beside its 95 % margin. {hardware}."
    )
    return "\n".join([*lines, "", how])


def compress_table(study: dict) -> str:
    """Every method; its label says where it was trained longer, or has the time of TokenLearner and not its MACs."""
    titles = ("CIFAR-10, a small ViT", "MACs", "images/s", "points from the host", "averaged")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in study["methods"]:
        deviation = row["points_deviation"]
        spread = "" if deviation is None else f" ± {deviation:.1f}"
        seeds = len(row["seeds"])
        points = f"{row['points_mean']:+.1f}{spread}" + ("" if seeds > 1 else " (one seed)")
        cost = f"{row['macs_share']:.2f}× | {row['speedup']:.2f}×"
        longer = "" if row["epochs"] == study["epochs"] else f", {row['epochs']} epochs"
        label = row["label"] + longer + (", at equal time" if row["budget"] == "latency" else "")
        lines.append(f"| {label} | {cost} | {points} | {row['points_averaged']:+.1f} |")
    (hardware,) = study["hardware"]
    how = (
        f"Top-1 on all test images beside the host's {study['host_accuracy']:.1%}; {study['epochs']} epochs after the "
        f"host's {study['host_epochs']} unless it says otherwise, the host as teacher; mean ± sample deviation over "
        "the seeds, and the mean of the same models by the average of their weights over the training. "
        f"{hardware}."
    )
    return "\n".join([*lines, "", how])


def directions(model: dict) -> list[dict]:
    return [model["set1_to_set2"], model["set2_to_set1"]]


def written() -> str:
    text = README.read_text()
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
        if not found:
            sys.exit(f"README.md has no place <!-- {name} --> … <!-- /{name} --> for that table")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("measure", "demo", "write"))
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.step == "measure":
        measure()
    elif arguments.step == "demo":
        copy_demo()
    elif not arguments.check:
        README.write_text(written())
    elif README.read_text() != written():
        sys.exit("README.md is not what benchmarks/readme.py write makes of the measurements")


if __name__ == "__main__":
    main()
