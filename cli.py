"""The command line: parse, call one function, turn known errors into one line. Heavy imports wait for the command."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .cache.errors import DimefmError
from .stages.interrupt import Interrupted

EXIT_KNOWN_ERROR = 1
EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil CLIP-class teachers from a feature cache: pay for the teacher once, train any number of students.",
)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML config file; `dimefm demo` writes one.")]
RunsArgument = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or a config file for all of its runs.")
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
    from .pipeline.config import load_config
    from .pipeline.plan import describe_plan, plan_lines

    found = describe_plan(load_config(config))
    typer.echo(json.dumps(found, indent=1) if as_json else "\n".join(plan_lines(found)))


@app.command("cache-teacher")
def cache_teacher(
    config: ConfigArgument,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="A Dask scheduler whose workers see the same files; default: this process."
        ),
    ] = None,
) -> None:
    """Stage one: embeddings, indexes, pseudo-pairs. Safe to repeat: finished shards are skipped."""
    from .pipeline.config import load_config

    loaded = load_config(config)
    from .pipeline.cache_teacher import cache_teacher as run

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
) -> None:
    """Stage two, from the cache alone: train the config's students, or those named. Resumes by default."""
    from .pipeline.config import load_config

    loaded = load_config(config)
    from .pipeline.distill import distill as run

    run(loaded, student or [], steps)


@app.command()
def evaluate(runs: RunsArgument, as_json: JsonOption = False) -> None:
    """Score finished runs on every [evaluate.*] set; writes evaluation.json into each."""
    from .pipeline.evaluate import evaluate as run
    from .pipeline.evaluate import score_table

    scores = run(runs)
    typer.echo(json.dumps(scores, indent=1) if as_json else score_table(scores))


def main() -> None:
    """Entry point of `dimefm`: exit code 0 done, 1 a known error, 2 wrong usage, 130 interrupted with state saved."""
    warnings.filterwarnings("ignore", module="PIL")  # an odd image has its row's reason; Pillow's remarks name no file
    try:
        app()
    except DimefmError as error:
        _leave(f"error: {' '.join(str(error).split())}", EXIT_KNOWN_ERROR)
    except Interrupted as interrupted:
        _leave(str(interrupted), EXIT_INTERRUPTED)
    except SystemExit as leaving:
        if leaving.code == EXIT_INTERRUPTED:  # Ctrl-C outside of a training loop, which saves its own state
            _leave("interrupted: what was finished is saved; run the same command to go on", EXIT_INTERRUPTED)
        raise


def _leave(line: str, code: int) -> None:
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)
