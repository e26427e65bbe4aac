"""docs/performance.md, out of what benchmarks/performance.py measured."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels import SHAPES
from kernels import floors as floors_of
from tokenlearner.inspection.summary import count

from performance import AGAIN, LEARNED, OUTPUTS, PLANS, PRESSING, Case

BENCHMARKS = Path(__file__).parent
LATE_LINEARS = BENCHMARKS / "late_linears.json"

# Realised fractions we ask of ourselves, eager and in float32 on a CPU, by batch size.
TARGETS = {8: 0.97, 1: 0.92}
H200 = (4.8e12, 989e12)  # bytes and bfloat16 operations a second, by its data sheet

HEADER = """# Is a MAC saved a microsecond saved?

Written by `python benchmarks/performance.py report`. `tokenlearner bench` measures the same of any models on your
machine.

**Method.** Host and variant run in turns in one process, every other round in the opposite order, after a warm-up; a
GPU is waited for before the clock is read. The speed-up is the median over rounds of both speeds in the same round, so
that a machine that slows down slows both; its quartiles are in brackets. **Realised** is the speed-up divided by the
MAC ratio: 1 where time falls as MACs do. A host that is slow by itself would flatter every variant, so every round also
times a large matrix product, and *of matmul rate* is the share of its MACs a second that the model reaches. The peers
have about the MACs of 8 tokens at ½. All weights are random; what a variant does to accuracy is not the question here.
*Peak memory* is what a pass allocates beyond weights and input. A layer's weights have to be read however few tokens
there are, which the MACs don't count: at batch 1 the layers on learned tokens do little else. Where "the host again" is
not 1.00, so much of any other number is noise.
"""

COLUMNS = (
    *("model", "setting", "GMACs", "{inputs}/s", "speed-up", "MAC ratio", "realised", "of matmul rate", "peak memory"),
    "latency at 1",
)


def write_report(path: Path, outputs: Mapping[str, Path] = OUTPUTS) -> None:
    sections = (line for plan in outputs for line in section(plan, outputs[plan]))
    path.write_text("\n".join([HEADER, *sections, *kernels(), *reading(), *streaming()]))


def section(plan: str, measured: Path) -> Iterator[str]:
    yield f"## On a {plan.upper()}\n"
    if not measured.exists():
        names = "; ".join(f"{case.name}, batch {_listed(case.batch_sizes)}" for case in PLANS[plan])
        yield f"Not run on a {plan.upper()}. Ready, as `python benchmarks/performance.py {plan}`: {names}.\n"
        return
    document = json.loads(measured.read_text(encoding="utf-8"))
    rows = {(row["case"], row["variant"]): row for row in document["rows"]}
    commits, loads = sorted({row["commit"] for row in rows.values()}), [row["load_before"] for row in rows.values()]
    yield (
        f"{document['hardware']}; torch {document['torch']}, timm {document['timm']}; commit {_listed(commits)}; by "
        f"`{document['command']}`. Load of the machine before a row: {min(loads):.1f} to {max(loads):.1f}.\n"
    )
    if plan == "cpu":
        yield from against_targets(rows, document.get("together", ()))
    for case in PLANS[plan]:
        yield from of_case(case, rows)


def against_targets(
    rows: Mapping[tuple[str, str], Mapping[str, Any]], together: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    yield from _head(("host", "batch", "realised", "quartiles", "target", "", "the host again", "host, of matmul rate"))
    for case in (case for case in PLANS["cpu"] if case.has_parts):
        learned, again = rows.get((case.name, LEARNED)), rows.get((case.name, AGAIN))
        for i, size in enumerate(case.batch_sizes):
            target = TARGETS[size]
            if learned is None:
                yield _line((case.name, size, "not run", "", target, "", "", ""))
                continue
            found = learned["measured"][i]
            realised, (low, high) = found["realised"], (q / found["mac_ratio"] for q in found["speedup_quartiles"])
            verdict = "met" if realised >= target else f"missed by {target - realised:.3f}"
            verdict += ", within the quartiles" if low <= target <= high else ""
            control = f"{again['measured'][i]['speedup']:.3f}" if again else "not run"
            rate = f"{learned['host'][i]['matmul_share']:.0%}"
            spread = f"{low:.3f}–{high:.3f}"
            yield _line((case.name, size, f"{realised:.3f}", spread, target, verdict, control, rate))
    yield ""
    yield from against_peers(together)
    yield from memory(rows)
    yield from late_linears(rows)


def against_peers(together: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    cases = [case for case in PLANS["cpu"] if case.pressing]
    if not cases:
        return
    yield (
        f"At equal MACs learned tokens should be faster than merging and pruning, no slower than pooling. {LEARNED} "
        "and these were timed in turns with each other: their speed over that of learned tokens, with its quartiles. "
        "Faster or slower are those whose quartiles leave out 1.\n"
    )
    yield from _head(("host", "batch", *PRESSING, "faster than learned tokens", "slower"))
    found = {row["case"]: row["measured"] for row in together}
    for case in cases:
        for size in case.batch_sizes:
            measured = {e["name"]: e for e in found.get(case.name, ()) if e["batch_size"] == size}
            spans = {name: measured[name]["speedup_quartiles"] for name in PRESSING if name in measured}
            cells = (
                f"{measured[name]['speedup']:.2f}× ({spans[name][0]:.2f}–{spans[name][1]:.2f})"
                if name in spans
                else "not run"
                for name in PRESSING
            )
            faster = ", ".join(name for name, (low, _) in spans.items() if low > 1) or "none"
            slower = ", ".join(name for name, (_, high) in spans.items() if high < 1) or "none"
            yield _line((case.name, size, *cells, *((faster, slower) if spans else ("not run", ""))))
    yield ""


def memory(rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[str]:
    """Where peak memory falls, and where it can't."""
    steps = [case for case in PLANS["cpu"] if case.conditions.get("mode") == "train" and (case.name, LEARNED) in rows]
    if not steps:
        return
    yield (
        "Peak memory falls in training steps, which keep what every layer computed. In a forward pass the peak is in "
        "the layers before the insertion, which see all patches as the host's do, so it stays:\n"
    )
    yield from _head(("case", "batch", "host", LEARNED, "share"))
    for case in (*steps, *(case for case in PLANS["cpu"] if case.has_parts and (case.name, LEARNED) in rows)):
        row = rows[case.name, LEARNED]
        for i, size in enumerate(case.batch_sizes):
            peaks = [side[i]["peak_memory"] for side in (row["host"], row["measured"])]
            yield _line((case.name, size, *(f"{count(peak)}B" for peak in peaks), f"{peaks[1] / peaks[0]:.2f}"))
    yield ""


def late_linears(rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[str]:
    """What batch 1 would come to if the linear layers on learned tokens read their weights in other ways."""
    document = json.loads(LATE_LINEARS.read_text(encoding="utf-8"))
    yield (
        f"At batch 1 most of what is missing is in {document['what']}: a product with so few "
        f"rows takes as long as its weights take to read. `{document['command']}` times these layers alone; the last "
        "column is what would be realised with them done so and all else as it was measured. Summing the weights does "
        "not compute the layers: it is as fast as reading them gets, so no learner can realise more than that row.\n"
    )
    yield from _head(("host", "way", "ms", "GB/s", "realised with it"))
    for case in (case for case in PLANS["cpu"] if case.name in document["hosts"]):
        found, row = document["hosts"][case.name], rows.get((case.name, LEARNED))
        as_is, *_ = found["seconds"].values()
        parts = row["parts"][case.batch_sizes.index(1)] if row else []
        whole = sum(part["seconds"][1] for part in parts)
        for way, seconds in found["seconds"].items():
            then = f"{floors(parts)[1] * whole / (whole - as_is + seconds):.2f}" if row else "not run"
            yield _line((case.name, way, f"{1e3 * seconds:.2f}", f"{found['weights'] / seconds / 1e9:.1f}", then))
    yield ""


def of_case(case: Case, rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[str]:
    found = {name: rows[case.name, name] for name in case.variants if (case.name, name) in rows}
    inputs = "images" if len(case.size) == 3 else "clips"
    yield f"### {case.name}\n"
    if not found:
        yield "Not run.\n"
        return
    how = {"device": "cpu", "precision": "float32", "compiled": False, "mode": "forward", **case.conditions}
    step = "training steps" if how["mode"] == "train" else "forward passes"
    yield f"`{case.host}`, {step} in {how['precision']}, {'compiled' if how['compiled'] else 'eager'}.\n"
    hosts = found.get(LEARNED, next(iter(found.values())))["host"]
    for i, size in enumerate(case.batch_sizes):
        yield f"Batch {size}:\n"
        yield from _head(column.format(inputs=inputs) for column in COLUMNS)
        yield _line(("host", "", *cells(hosts[i])))
        for name in case.variants:
            row = found.get(name)
            yield _line((name, row["setting"], *cells(row["measured"][i])) if row else (name, "not run", *[""] * 8))
        yield ""
        if "parts" in found.get(LEARNED, {}):
            yield from where_time_goes(found[LEARNED], i, size)


def kernels(measured: Path = BENCHMARKS / "kernels.json") -> Iterator[str]:
    yield "## Kernels\n"
    if measured.exists():
        yield f"Timed by `{json.loads(measured.read_text())['command']}`: `benchmarks/{measured.name}`.\n"
    else:
        b, n, d = SHAPES[0]
        yield (
            "The Triton kernels of learner and fuser compute what PyTorch's operations do, as is tested without a GPU; "
            "not timed on one, so the gap to the floors is not known. Ready: `python benchmarks/kernels.py`, which "
            f"measures the card's own rates. By its data sheet an H200 reads {H200[0] / 1e12:g} TB and computes "
            f"{H200[1] / 1e12:g} T operations (bfloat16, dense) a second; then a forward pass at batch {b}, {n:,} "
            f"positions, width {d:,} takes at least, X read once:\n"
        )
        yield from _head(("module", "bytes, µs", "operations, µs"))
        for kind in ("learner", "fuser"):
            found = floors_of(b, n, d, kind, *H200)
            yield _line((kind, *(f"{1e6 * found[which]:.0f}" for which in ("bytes", "operations"))))
        yield (
            "\nThe backward pass of both is PyTorch's own operations, run again from the inputs. Whether a kernel of "
            "its own is worth it depends on its share of a training step, which is not measured: "
            "`benchmarks/kernels.py` tells it.\n"
        )


def reading() -> Iterator[str]:
    """What the readers of pictures and of clips do in a second, beside bare Pillow and PyAV."""
    pictures, videos = (json.loads((BENCHMARKS / f"{kind}_loading.json").read_text()) for kind in ("image", "video"))
    commands = f"`{pictures['command']}` and `{videos['command']}`"
    names = {
        "evaluation": "for evaluation",
        "training": "for training, with RandAugment and jitter",
        "training_crops": "for training, crops and flips alone",
    }
    rows = {
        **{
            f"pictures {names[key]}": (pictures["pictures_per_second"][key], pictures["ratio_over"][key])
            for key in names
        },
        **{
            f"frames, {name}": (window["frames_per_second"]["reader"], window["ratio_over"])
            for name, window in videos["windows"].items()
        },
    }
    yield "## Reading pictures and videos\n"
    yield f"Pictures ({pictures['pictures']}): {pictures['what']}. Videos: {videos['what']}. By {commands}.\n"
    yield from _head(("what", "a second", "of bare decoding and resizing", "of bare decoding"))
    for name, (rate, ratio) in rows.items():
        yield _line((name, f"{rate:.0f}", f"{ratio['bare_resized']:.2f}", f"{ratio['bare']:.2f}"))
    yield ""


def streaming() -> Iterator[str]:
    document = json.loads((BENCHMARKS / "streaming.json").read_text())
    yield "## The tokens of a long video\n"
    yield f"`tokenlearner tokens` on {document['what']}; `{document['command']}`.\n"
    yield from _head(("minutes", "frames", "tokens, MB", "peak memory of the process, MB"))
    for video in document["videos"]:
        yield _line(video[key] for key in ("minutes", "frames", "tokens_mb", "peak_mb"))
    yield ""


def cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = entry["speedup_quartiles"]
    return (
        f"{entry['macs'] / 1e9:.2f}",
        f"{entry['images_per_second']:.4g}",
        f"{entry['speedup']:.2f}× ({low:.2f}–{high:.2f})",
        f"{entry['mac_ratio']:.2f}×",
        f"{entry['realised']:.2f}",
        f"{entry['matmul_share']:.0%}",
        "" if entry["peak_memory"] is None else f"{count(entry['peak_memory'])}B",
        "" if entry["latency"] is None else f"{1e3 * entry['latency']:,.{0 if entry['latency'] >= 0.1 else 1}f} ms",
    )


def floors(parts: Sequence[Mapping[str, Any]]) -> tuple[list[float], float]:
    """The seconds that every part's MACs take at the host's own mean rate, and their sum's share of what it took."""
    host_macs, host_seconds = (sum(part[key][0] for part in parts) for key in ("macs", "seconds"))
    found = [part["macs"][1] * host_seconds / host_macs for part in parts]
    return found, sum(found) / sum(part["seconds"][1] for part in parts)


def where_time_goes(row: Mapping[str, Any], index: int, batch_size: int) -> Iterator[str]:
    """Each part's floor, its MACs at the host's own mean rate; what it took; and what its weights take to read."""
    parts, rate = row["parts"][index], row["bytes_read_per_second"]
    whole, (of_parts, realised) = sum(part["seconds"][1] for part in parts), floors(parts)
    yield f"Where the pass with {LEARNED} goes; its floor is the host's own mean MACs a second:\n"
    yield from _head(
        ("part", "GMACs", "host, ms", "floor, ms", "measured, ms", "above the floor", "weights", "reading them, ms")
    )
    labels = {"before": "up to the learner", "learning": "learning the tokens", "after": "from there on"}
    above = {}
    for part, floor in zip(parts, of_parts):
        plain, taken = part["seconds"]
        above[labels[part["part"]]] = taken - floor
        yield _line(
            (
                labels[part["part"]],
                f"{part['macs'][1] * batch_size / 1e9:.2f}",
                f"{1e3 * plain:.2f}" if part["part"] != "learning" else "",
                f"{1e3 * floor:.2f}",
                f"{1e3 * taken:.2f}",
                f"{(taken - floor) / whole:+.1%} of the pass",
                f"{count(part['weights'])}B",
                f"{1e3 * part['weights'] / rate:.2f}",
            )
        )
    most = max(above, key=above.__getitem__)
    yield (
        f"\nIn these passes {realised:.3f} is realised; what is above the floor adds up to the rest, mostly {most}. "
        f"Reading is at {rate / 1e9:.0f} GB/s, as fast as this machine sums a large tensor.\n"
    )


def _head(columns: Any) -> Iterator[str]:
    titles = list(columns)
    yield _line(titles)
    yield _line(["---"] * len(titles))


def _line(cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _listed(items: Sequence[Any]) -> str:
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last
