"""The command line: parse, call one function, turn known errors into one line. Heavy imports wait for the command."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .cache.errors import DimefmError, os_advice
from .stages.train.interrupt import Interrupted

EXIT_KNOWN_ERROR = 1
EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # in "rich", the default, `[evaluate.*]` is markup and vanishes from the help
    help="Distil CLIP models from a feature cache: run the teacher once, then train any number of students.",
)

cache_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Inspect, verify, repair and grow a cache, and name choices of its rows.",
)
app.add_typer(cache_app, name="cache")

Sides = Literal["images", "sentences"]

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="Config file (TOML). `dimefm demo` writes one to start from.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the config, such as distill.epochs=3. VALUE is TOML; other text is a string. Repeatable.",
    ),
]
CacheArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a cache: cache.dir of its config.")]
ThresholdOption = Annotated[
    float, typer.Option(metavar="COSINE", help="Rows with at least this cosine similarity count as the same.")
]
SaveMaskOption = Annotated[str | None, typer.Option(metavar="NAME", help="Save the remaining rows as a mask.")]
WithinOption = Annotated[str | None, typer.Option(metavar="MASK", help="Consider only the rows of this mask.")]
SideOption = Annotated[Sides, typer.Option(help="Which rows of the cache.")]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Embed on the workers of this Dask scheduler, which must see the same files. Default: in this process.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="CONFIG", help="Config file of the cache. Default: the one that the cache was made with."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@app.command()
def demo(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write into.")]) -> None:
    """Write a self-contained example: images, sentences, classes, a small teacher and demo.toml."""
    from .pipeline.demo import run_demo

    run_demo(folder)


@app.command()
def plan(config: ConfigArgument, changes: SetOption = None, as_json: JsonOption = False) -> None:
    """Show what stage one has done and has left to do, and the disk, memory and time it needs. Loads no model."""
    from .pipeline.config.load import load_config
    from .pipeline.upkeep.plan import describe_plan, plan_lines

    _report(describe_plan(load_config(config, changes or ())), plan_lines, as_json)


@app.command("cache-teacher")
def cache_teacher(
    config: ConfigArgument,
    changes: SetOption = None,
    scheduler: SchedulerOption = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Embed rows again that failed, once their files are mended or put back."),
    ] = False,
) -> None:
    """Run stage one: embeddings, indexes and pseudo-pairs. Run it again to resume; finished shards are skipped."""
    from .pipeline.config.load import load_config

    loaded = load_config(config, changes or ())  # a wrong config is refused before torch is imported
    from .pipeline.stage_one.cache_teacher import cache_teacher as run

    run(loaded, scheduler, retry=retry_failed)


@app.command()
def distill(
    config: ConfigArgument,
    student: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Train only this student. Repeatable. Default: all.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after N steps, to see shapes, memory and speed.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Train all students on one stream of batches; images are decoded once.")
    ] = False,
    changes: SetOption = None,
) -> None:
    """Run stage two: train students from the cache, without the teacher. Run it again to resume.

    `torchrun --nproc-per-node N -m dimefm distill CONFIG` trains on N devices and divides each batch among them.
    """
    from .pipeline.config.load import load_config

    loaded = load_config(config, changes or ())
    from .pipeline.stage_two.distill import distill as run

    run(loaded, student or [], steps, together=together)


@app.command()
def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, or a config file for the runs of all its students."),
    ],
    weights: Annotated[
        Literal["best", "last"] | None,
        typer.Option(help="Score the best step or the last one. Default: the best where the run has kept it."),
    ] = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score finished runs on every [evaluate.*] set and write evaluation.json into each run's folder."""
    from .pipeline.stage_two.evaluate import evaluate as run
    from .pipeline.stage_two.score_table import score_table

    _report(run(runs, weights, changes or ()), lambda scores: [score_table(scores)], as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    form: Annotated[Literal["open_clip", "timm", "onnx", "torch"], typer.Option("--format", help="What will load it.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="Folder to write: whole or absent at any time.")],
    weights: Annotated[
        Literal["best", "last"] | None,
        typer.Option(help="Export the best step or the last one. Default: the best where the run has kept it."),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"], typer.Option(help="Number format of the weights; int8 is for onnx.")
    ] = "fp32",
    certify: Annotated[
        bool,
        typer.Option("--certify", help="Also measure whether it may replace the teacher before a vector database."),
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also upload the folder to this repository of the hub.")
    ] = None,
    license_name: Annotated[
        str, typer.Option("--license", metavar="NAME", help="Licence for the card, as the hub abbreviates it.")
    ] = "unknown",
    as_json: JsonOption = False,
) -> None:
    """Write a student as files that load without dimefm, with a proof of what they are worth and a model card."""
    from .pipeline.exporting.export import ExportOptions, export_lines
    from .pipeline.exporting.export import export as write

    options = ExportOptions(form, out, weights, precision, certify, push, license_name)
    _report(write(run, options), export_lines, as_json)


@cache_app.command("inspect")
def cache_inspect(
    folder: CacheArgument,
    failed: Annotated[
        bool, typer.Option("--failed", help="List each row that has no embedding: set, row, name, reason.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Summarise a cache: teacher, counts, sizes, failures, masks, index recall, similarities, hubs."""
    from .pipeline.upkeep.inspect import failed_lines, inspect, inspect_failed, inspect_lines

    if failed:
        _report(inspect_failed(folder), failed_lines, as_json)
    else:
        _report(inspect(folder), inspect_lines, as_json)


@cache_app.command("duplicates")
def cache_duplicates(
    folder: CacheArgument,
    threshold: ThresholdOption,
    side: SideOption = "images",
    mask: SaveMaskOption = None,
    within: WithinOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find rows that nearly repeat an earlier row, by the cosine of the teacher's embeddings."""
    from .pipeline.row_masks.duplicates import duplicate_lines, duplicates

    _report(duplicates(folder, threshold, side, mask, within), duplicate_lines, as_json)


@cache_app.command("leakage")
def cache_leakage(
    folder: CacheArgument,
    threshold: ThresholdOption,
    mask: SaveMaskOption = None,
    within: WithinOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find training images that nearly repeat an image of an evaluation set."""
    from .pipeline.row_masks.duplicates import leakage, leakage_lines

    _report(leakage(folder, threshold, mask, within), leakage_lines, as_json)


@cache_app.command("select")
def cache_select(
    folder: CacheArgument,
    mask: Annotated[str, typer.Option(metavar="NAME", help="Save the selected sentences as this mask.")],
    side: Annotated[Literal["sentences"], typer.Option(hidden=True)] = "sentences",  # all that can be selected so far
    k: Annotated[
        int | None,
        typer.Option("--k", metavar="N", help="Count each image for its N best sentences. Default: all cached ones."),
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(metavar="COSINE", help="Least cosine of an image and a sentence, whatever the rank.")
    ] = None,
    cap: Annotated[
        int | None, typer.Option(metavar="N", help="Count at most N images for one sentence, the best ones.")
    ] = None,
    target: Annotated[int | None, typer.Option(metavar="N", help="Keep at most N sentences.")] = None,
    rank: Annotated[
        Literal["cosine", "csls", "inverted_softmax"],
        typer.Option(help="Score that ranks sentences; the last two correct for hubs."),
    ] = "cosine",
    within: Annotated[
        str | None, typer.Option(metavar="MASK", help="Select only from the sentences of this mask.")
    ] = None,
    images_mask: Annotated[
        str | None, typer.Option(metavar="MASK", help="Select only for the images of this mask.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Select the sentences that images retrieve, save them as a mask for `sentences.mask`, and report coverage."""
    from .pipeline.row_masks.select import select, select_lines

    choice: dict[str, Any] = {"k": k, "min_score": min_score, "cap": cap, "target": target, "rank": rank}
    found = select(folder, mask, side=side, within=within, images_mask=images_mask, **choice)
    _report(found, select_lines, as_json)


@cache_app.command("verify")
def cache_verify(
    folder: CacheArgument,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Also embed a sample of rows again with the teacher and compare.")
    ] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="Also report source files that have changed, are gone or are new.")
    ] = False,
    config: ConfigOption = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every file of a cache and report damage: which rows and files, and what to do about it."""
    from .pipeline.config.remembered import ConfigChoice
    from .pipeline.upkeep.verify import report_lines, require_sound
    from .pipeline.upkeep.verify import verify as run

    found = run(folder, ConfigChoice.of(folder, config, changes), teacher=teacher, sources=sources)
    _report(found, report_lines, as_json)
    require_sound(found)


@cache_app.command("repair")
def cache_repair(
    folder: CacheArgument, config: ConfigOption = None, changes: SetOption = None, as_json: JsonOption = False
) -> None:
    """Repair what `verify` finds: recompute bad shards, indexes and pairs, and mark rows that cannot be as lost."""
    from .pipeline.config.remembered import ConfigChoice
    from .pipeline.upkeep.repair.repair import outcome_lines, require_mended
    from .pipeline.upkeep.repair.repair import repair as run

    found = run(folder, ConfigChoice.of(folder, config, changes))
    _report(found, outcome_lines, as_json)
    require_mended(found)


@cache_app.command("append")
def cache_append(
    folder: CacheArgument,
    config: ConfigOption = None,
    changes: SetOption = None,
    scheduler: SchedulerOption = None,
) -> None:
    """Add new images, sentences and evaluation sets to a finished cache. Nothing is embedded twice."""
    from .pipeline.config.remembered import ConfigChoice
    from .pipeline.upkeep.append import append_to

    append_to(folder, ConfigChoice.of(folder, config, changes), scheduler)


@cache_app.command("mask")
def cache_mask(
    folder: CacheArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the mask, for `images.mask` in a config.")],
    keep: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Rows to keep: numbers, one a line, or a .npy array of numbers or bools."),
    ],
    side: SideOption = "images",
) -> None:
    """Name a choice of rows, which `images.mask` or `sentences.mask` of a config then selects."""
    from .pipeline.row_masks.mask import mask_from_file

    typer.echo(mask_from_file(folder, name, side, keep))


def _report(found: Any, lines: Callable[[Any], list[str]], as_json: bool) -> None:
    """Print a command's result: one JSON document (no NaN, which strict readers refuse), or lines of text."""
    typer.echo(json.dumps(found, indent=1, allow_nan=False) if as_json else "\n".join(lines(found)))


def main() -> None:
    """Entry point of `dimefm`: exit code 0 done, 1 a known error, 2 wrong usage, 130 interrupted with state saved."""
    warnings.filterwarnings("ignore", module="PIL")  # they name no file; what is unreadable is in its row's reason
    try:
        app()
    except DimefmError as error:
        _leave(f"error: {' '.join(str(error).split())}", EXIT_KNOWN_ERROR)
    except MemoryError:
        advice = "lower workers, or the batch size of this stage; `dimefm plan` says what building an index takes"
        _leave(f"error: the memory of this machine is full; {advice}", EXIT_KNOWN_ERROR)
    except Interrupted as interrupted:
        _leave(str(interrupted), EXIT_INTERRUPTED)
    except SystemExit as leaving:
        if leaving.code == EXIT_INTERRUPTED:  # Ctrl-C outside of the training loop
            _leave("interrupted: what was finished is saved; run the same command to go on", EXIT_INTERRUPTED)
        raise
    except Exception as error:
        refused = os_advice(error)
        if refused is None:
            raise
        _leave(f"error: {' '.join(refused.split())}", EXIT_KNOWN_ERROR)


def _leave(line: str, code: int) -> None:
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)
