"""Measures the README's numbers and writes them into its tables, so that none is typed by hand.

python benchmarks/readme.py measure   # times ViTs on this machine → benchmarks/readme.json (about 4 minutes)
python benchmarks/readme.py demo      # copies runs/demo/summary.json and its picture → benchmarks/demo.json, docs/
python benchmarks/readme.py write     # both files → README.md; `--check` only says whether it is up to date
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEASURED, DEMO, README = ROOT / "benchmarks/readme.json", ROOT / "benchmarks/demo.json", ROOT / "README.md"

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

    shutil.copy(ROOT / "runs/demo/summary.json", DEMO)
    pictures = find_images(ROOT / "runs/demo/pictures")
    write_sheets(load(ROOT / "runs/demo/tokenlearner"), pictures, ROOT / "docs", columns=len(pictures))


def tables() -> dict[str, str]:
    """The README's generated parts by name."""
    demo, measured = json.loads(DEMO.read_text()), json.loads(MEASURED.read_text())
    return {"demo": demo_table(demo), "speed": speed_table(measured)}


def demo_table(demo: dict) -> str:
    lines = ["| digits, `make demo` | accuracy | MACs | images/s | tokens per layer |", "|---|---|---|---|---|"]
    for row in demo["models"]:
        tokens = " ".join(map(str, row["tokens_per_layer"]))
        lines.append(
            f"| {row['name']} | {row['accuracy']:.1%} | {row['macs'] / 1e6:.2f} M | "
            f"{row['images_per_second']:,.0f} ({row['speedup']:.2f}×) | {tokens} |"
        )
    return "\n".join(
        [*lines, "", f"{demo['seconds']:.0f} s in all, {demo['held_out']} held-out digits, {demo['hardware']}."]
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
