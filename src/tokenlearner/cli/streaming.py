"""The command that writes tokens of videos and pictures for other models to read: tokens."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tokenlearner.cli.options import FrameFps, Json, OnError, app
from tokenlearner.cli.printing import print_table, progress_bar, show, warn_damaged
from tokenlearner.errors import InputError


@app.command
def tokens(
    model: Path,
    source: Path,
    out: Path,
    /,
    *,
    layer: Annotated[
        Literal["last", "learned"],
        Parameter(
            help="last: after the last layer and its norm, what a head or a language model reads. "
            "learned: what the TokenLearner puts out; the layers after it are not run."
        ),
    ] = "last",
    format: Annotated[  # noqa: A002
        Literal["safetensors", "parquet"], Parameter(help="parquet needs pyarrow.")
    ] = "safetensors",
    dtype: Annotated[Literal["float16", "float32"], Parameter(help="Of the tokens in the files.")] = "float16",
    fps: Annotated[
        float | None,
        Parameter(help="Frames a second to take; all when not given, for a model of clips as many as it learned with."),
    ] = None,
    frame_fps: FrameFps = None,
    shard: Annotated[
        str, Parameter(help="i/n, i from 1 to n: do the i-th of the files and every n-th after it, by name.")
    ] = "1/1",
    resume: Annotated[bool, Parameter(negative="", help="Go on in OUT: leave out what has its file there.")] = False,
    batch_size: Annotated[int, Parameter(help="Frames at once.")] = 32,
    device: Annotated[
        str, Parameter(help="auto, cpu, cuda or, say, cuda:1; auto is cuda where there is one.")
    ] = "auto",
    precision: Annotated[Literal["float32", "bf16"], Parameter(help="Of the arithmetic.")] = "float32",
    on_error: OnError = "skip",
    json: Json = False,
) -> None:
    """Turn every frame of videos, or every picture, into its few learned tokens, in a file for each video or folder.

    MODEL is a saved folder, or the name of a model with weights, and has a TokenLearner. SOURCE is a video, a picture,
    or a folder of them at any depth. OUT is a new folder. However long a video is, memory stays the same. A model of
    clips gives tokens of every slice of windows that follow each other.

    Example: `tokenlearner tokens runs/photos films film-tokens --fps 2`
    """
    from tokenlearner.evaluation.write_tokens import write_tokens
    from tokenlearner.models import open_trained

    with progress_bar("files") as progress:
        summary = write_tokens(
            open_trained(model),
            source,
            out,
            name=str(model),
            layer=layer,
            format=format,
            dtype=dtype,
            fps=fps,
            frame_fps=frame_fps,
            shard=_shard(shard),
            resume=resume,
            batch_size=batch_size,
            device=device,
            precision=precision,
            on_error=on_error,
            progress=progress,
        )

    def table() -> None:
        rows = [(entry["file"], f"{entry['rows']:,}", entry["source"]) for entry in summary["files"]]
        if not rows and not summary["already_there"]:
            others = summary["of_other_shards"]
            print(f"nothing to do in shard {shard}: {others:,} videos and folders of pictures are in others")
            return
        print_table(("file", "rows", "of"), rows)
        warn_damaged(summary["damaged"])
        present = summary["already_there"]
        there = f", {present:,} {'file was' if present == 1 else 'files were'} there" if present else ""
        each = f"{summary['tokens']} tokens of {summary['dim']} numbers"
        print(f"{summary['rows']:,} rows of {each} in {out}, {summary['seconds']:.0f} s{there}")

    show(summary, json, table)


def _shard(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise InputError(f"--shard is {text}: give i/n with i from 1 to n, such as 1/4")
    return int(i), int(n)
