"""The command line: parse, call one function, turn known errors into one line. Heavy imports wait for the command."""

import json
import sys
import warnings
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
    help="Distil CLIP-class teachers from a feature cache: pay for the teacher once, train any number of students.",
)

cache_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="What is in a cache, whether it is sound, and how to mend it and let it grow.",
)
app.add_typer(cache_app, name="cache")

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML config file; `dimefm demo` writes one.")]
RunsArgument = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or a config file for all of its runs.")
]
CacheArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a cache: a config's cache.dir.")]
ThresholdOption = Annotated[float, typer.Option(metavar="COSINE", help="Least cosine of rows that count as the same.")]
SaveMaskOption = Annotated[str | None, typer.Option(metavar="NAME", help="Save the rows that stay as a mask.")]
WithinOption = Annotated[
    str | None, typer.Option(metavar="MASK", help="Look at the rows of this mask only; what stays is a part of it.")
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="A Dask scheduler whose workers see the same files; default: this process."),
]
ConfigOption = Annotated[
    Path | None, typer.Option(metavar="CONFIG", help="The config that made it; default: the one it remembers.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead.")]


@app.command()
def demo(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")]) -> None:
    """Write a self-contained example: images, sentences, classes, a small teacher, demo.toml."""
    from .pipeline.demo import run_demo

    run_demo(folder)


@app.command()
def plan(config: ConfigArgument, as_json: JsonOption = False) -> None:
    """Say, loading no model, what is done and what is left, and what it will take."""
    from .pipeline.config.load import load_config
    from .pipeline.upkeep.plan import describe_plan, plan_lines

    found = describe_plan(load_config(config))
    typer.echo(_document(found) if as_json else "\n".join(plan_lines(found)))


@app.command("cache-teacher")
def cache_teacher(
    config: ConfigArgument,
    scheduler: SchedulerOption = None,
) -> None:
    """Stage one: embeddings, indexes, pseudo-pairs. Safe to repeat: finished shards are skipped."""
    from .pipeline.config.load import load_config

    loaded = load_config(config)
    from .pipeline.stage_one.cache_teacher import cache_teacher as run

    run(loaded, scheduler)


@app.command()
def distill(
    config: ConfigArgument,
    student: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this student; may be given several times.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after N steps, to see shapes, memory and speed.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Train all of them from one stream of batches: images are decoded once.")
    ] = False,
) -> None:
    """Stage two, from the cache alone: train the config's students, or those named. Resumes by default.

    `torchrun --nproc-per-node N -m dimefm distill CONFIG` trains on N devices: a batch is divided among them.
    """
    from .pipeline.config.load import load_config

    loaded = load_config(config)
    from .pipeline.stage_two.distill import distill as run

    run(loaded, student or [], steps, together=together)


@app.command()
def evaluate(
    runs: RunsArgument,
    weights: Annotated[
        Literal["best", "last"] | None,
        typer.Option(help="The step that scored best while it was trained, or the last; default: best where there is."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score finished runs on every [evaluate.*] set; writes evaluation.json into each."""
    from .pipeline.stage_two.evaluate import evaluate as run
    from .pipeline.stage_two.score_table import score_table

    scores = run(runs, weights)
    typer.echo(_document(scores) if as_json else score_table(scores))


@cache_app.command("inspect")
def cache_inspect(folder: CacheArgument, as_json: JsonOption = False) -> None:
    """A screenful on what is in a cache: teacher, counts, sizes, failures, masks, recall, similarities, hubs."""
    from .pipeline.upkeep.inspect import inspect, inspect_lines

    found = inspect(folder)
    typer.echo(_document(found) if as_json else "\n".join(inspect_lines(found)))


@cache_app.command("duplicates")
def cache_duplicates(
    folder: CacheArgument,
    threshold: ThresholdOption,
    side: Annotated[str, typer.Option(help="images or sentences")] = "images",
    mask: SaveMaskOption = None,
    within: WithinOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find rows that nearly repeat an earlier one, by the teacher's cosine."""
    from .pipeline.row_masks.duplicates import duplicate_lines, duplicates

    found = duplicates(folder, threshold, side, mask, within)
    typer.echo(_document(found) if as_json else "\n".join(duplicate_lines(found)))


@cache_app.command("leakage")
def cache_leakage(
    folder: CacheArgument,
    threshold: ThresholdOption,
    mask: SaveMaskOption = None,
    within: WithinOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find training images that are too close to an image of an evaluation set."""
    from .pipeline.row_masks.duplicates import leakage, leakage_lines

    found = leakage(folder, threshold, mask, within)
    typer.echo(_document(found) if as_json else "\n".join(leakage_lines(found)))


@cache_app.command("select")
def cache_select(
    folder: CacheArgument,
    mask: Annotated[str, typer.Option(metavar="NAME", help="Name of the mask that they become.")],
    side: Annotated[str, typer.Option(help="sentences: what is chosen")] = "sentences",
    k: Annotated[
        int | None, typer.Option("--k", metavar="N", help="Sentences that an image counts for; default: all cached.")
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(metavar="COSINE", help="Least cosine, whatever the ranking.")
    ] = None,
    cap: Annotated[int | None, typer.Option(metavar="N", help="Images that count for one sentence, the best.")] = None,
    target: Annotated[int | None, typer.Option(metavar="N", help="Sentences to keep at most.")] = None,
    rank: Annotated[str, typer.Option(help="cosine, csls or inverted_softmax")] = "cosine",
    within: Annotated[str | None, typer.Option(metavar="MASK", help="Choose from this mask of sentences.")] = None,
    images_mask: Annotated[str | None, typer.Option(metavar="MASK", help="Choose for this mask of images.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose the sentences that images retrieve, as a mask for `sentences.mask`, and report what they cover."""
    from .pipeline.row_masks.select import select, select_lines

    found = select(
        folder,
        mask,
        side=side,
        k=k,
        min_score=min_score,
        cap=cap,
        target=target,
        rank=rank,
        within=within,
        images_mask=images_mask,
    )
    typer.echo(_document(found) if as_json else "\n".join(select_lines(found)))


@cache_app.command("verify")
def cache_verify(
    folder: CacheArgument,
    as_json: JsonOption = False,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Also embed a sample of rows again with the live teacher.")
    ] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="Also say which sources have changed, are gone or are new.")
    ] = False,
    config: ConfigOption = None,
) -> None:
    """Read every file of a cache and say whether it is sound; if not, which rows and files, and what to do."""
    from .pipeline.upkeep.verify import report_lines, require_sound
    from .pipeline.upkeep.verify import verify as run

    found = run(folder, config, teacher=teacher, sources=sources)
    typer.echo(_document(found) if as_json else "\n".join(report_lines(found)))
    require_sound(found)


@cache_app.command("repair")
def cache_repair(folder: CacheArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Mend what `verify` finds: recompute the bad shards, indexes and pairs; mark rows that cannot be as lost."""
    from .pipeline.upkeep.repair.repair import outcome_lines, require_mended
    from .pipeline.upkeep.repair.repair import repair as run

    found = run(folder, config)
    typer.echo(_document(found) if as_json else "\n".join(outcome_lines(found)))
    require_mended(found)


@cache_app.command("append")
def cache_append(
    folder: CacheArgument,
    config: ConfigOption = None,
    scheduler: SchedulerOption = None,
) -> None:
    """Take in images, sentences and evaluation sets that have come since; what is there is not embedded again."""
    from .pipeline.upkeep.append import append_to

    append_to(folder, config, scheduler)


@cache_app.command("mask")
def cache_mask(
    folder: CacheArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What configs will call it.")],
    keep: Annotated[
        Path, typer.Option(metavar="FILE", help="Rows to keep: numbers, one a line; or a .npy of numbers or bools.")
    ],
    side: Annotated[str, typer.Option(help="images or sentences")] = "images",
) -> None:
    """Name a choice of rows: `images.mask` and `sentences.mask` select it for a run."""
    from .pipeline.row_masks.mask import mask_from_file

    typer.echo(mask_from_file(folder, name, side, keep))


def _document(found: Any) -> str:
    return json.dumps(found, indent=1, allow_nan=False)  # strict readers (jq) refuse NaN


def main() -> None:
    """Entry point of `dimefm`: exit code 0 done, 1 a known error, 2 wrong usage, 130 interrupted with state saved."""
    warnings.filterwarnings("ignore", module="PIL")  # an odd image has its row's reason; Pillow's remarks name no file
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
        if leaving.code == EXIT_INTERRUPTED:  # Ctrl-C outside of a training loop, which saves its own state
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
