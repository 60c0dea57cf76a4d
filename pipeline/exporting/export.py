"""`dimefm export`: a finished run as files that open_clip, timm, ONNX Runtime or torch load, with proof and card."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...cache.disk.durable import write_bytes, write_json
from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ...stages.devices import memory_errors_as
from ...stages.export.export_job import Exported, ExportJob
from ...stages.export.exporters import exporter_for
from ...stages.export.hub import push as push_to_hub
from ...stages.export.hub import require_repo
from ...stages.export.latency import latencies, no_faster
from ...stages.export.model_card import model_card
from ...stages.export.text_side import text_side
from ...stages.export.whole_folder import MARK, require_free, whole_folder
from ...stages.run_folder.load_student import Which, load_student, load_text_student
from ...stages.run_folder.run_record import read_run_record
from ...stages.settings.loss_terms import LOSS_TERMS
from ...stages.settings.plugins import is_function
from ..progress import say
from ..stage_two.run_source import runs_to_score
from .certify import certify_run
from .drawn_rows import DrawnRows
from .prove import prove

CERTIFICATE, CARD = "certificate.json", "README.md"
EXPORTED, STUDENT, FLOAT = "exported", "student in torch", "the same graph in float32"


@dataclass(frozen=True)
class ExportOptions:
    """What the command line says.

    Attributes:
        format: a name of `EXPORTERS`.
        out: the folder that is written.
        weights: `best` or `last`; None: the best where the run keeps one.
        precision: `fp32`, `fp16` or `int8`.
        certify: whether a certificate is made.
        push: a repository of the hub.
        license: as the hub abbreviates it.
    """

    format: str
    out: Path
    weights: Which | None = None
    precision: str = "fp32"
    certify: bool = False
    push: str | None = None
    license: str = "unknown"


def export(run: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a run's student, proved, into `options.out`: the folder is whole or absent, whenever this is killed.

    Returns:
        The document of `export.json`; with a certificate as `certificate`, with a commit of the hub as `pushed`.

    Raises:
        InputError: if the format cannot take this student, a file of it is missing, or the path holds something else.
        CacheError: if the cache it was trained from is gone or damaged.
    """
    spec = read_run_record(run)
    exporter = exporter_for(options.format, options.precision, spec["student"][spec["name"]]["model"])
    require_free(options.out)
    if options.push is not None:
        require_repo(options.push)
    ((_, source),) = runs_to_score([run])
    cache = FeatureCache.open(source.cache)
    student, record = load_student(run, options.weights)
    _require_cache_of(record, cache, run)
    own = load_text_student(run, "cpu", which=options.weights)
    text = text_side(cache, record, own)
    rows = DrawnRows(cache, record, text, say)
    write = exporter.load()
    with whole_folder(options.out) as folder, memory_errors_as(f"{run}: exporting it does not fit into memory"):
        job = ExportJob(
            student, record, text, float(cache.teacher["logit_scale"]), folder, options.precision, rows.calibration, say
        )
        say(f"{run}: {job.spec} as {options.format}, {options.precision}")
        exported: Exported = write(job=job)
        document = {
            **_facts(job, cache, options),
            **exported.facts,
            **prove(job, exported, cache, source, rows, record["chosen_on"]),
            "usage": list(exported.usage),
            "notes": exported.notes,
        }
        document["latency"] = _latency(job, exported)
        document["notes"] += _slow(document)
        certificate = certify_run(job, exported, cache, rows) if options.certify else None
        if certificate is not None:
            write_json(folder / CERTIFICATE, certificate)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        document |= {"files": sizes, "bytes": sum(sizes.values())}
        write_bytes(folder / CARD, model_card(document, certificate, exporter.library).encode())
        write_json(folder / MARK, document)
    found = {**document, **({"certificate": certificate} if certificate else {})}
    if options.push is not None:
        found["pushed"] = push_to_hub(options.out, options.push)
    return found


def export_lines(found: Mapping[str, Any]) -> list[str]:
    """What `dimefm export` prints."""
    lines = [f"{found['format']}, {found['precision']}: {found['bytes'] / 1e6:,.1f} MB in {found['out']}"]
    for name, of in found["sets"].items():
        if "missing" in of:
            lines.append(f"{name}: not measured, {of['missing']}")
            continue
        before = of["unexported"]
        lines.append(
            f"{name}: top-1 {100 * of['student_top1']:.1f} % (before {100 * before['top1']:.1f} %, teacher "
            f"{100 * of['teacher_top1']:.1f} %), same class as the student {_percent(before['agreement'])} %"
        )
    for size, exported in found["latency"]["batches"][EXPORTED].items():
        lines.append(f"batch of {size}: {exported['median_ms']:.2f} ms, median, {found['latency']['threads']} threads")
    for name, of in found.get("certificate", {}).get("comparisons", {}).items():
        kept = ", ".join(f"top {k} {100 * value['kept']:.1f} %" for k, value in of["student"].items())
        lines.append(f"kept of {name}: {kept}")
    lines += found["notes"]
    if "pushed" in found:
        lines.append(f"pushed: {found['pushed']}")
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _require_cache_of(record: Mapping[str, Any], cache: FeatureCache, run: Path) -> None:
    teacher = {key: cache.teacher.get(key) for key in record["teacher"]}
    if teacher != record["teacher"]:
        raise InputError(
            f"{cache.layout.root}: embeddings of {teacher}, but {run} learned from {record['teacher']}; put the cache "
            "of its own teacher back"
        )


def _facts(job: ExportJob, cache: FeatureCache, options: ExportOptions) -> dict[str, Any]:
    """What is known before anything is measured."""
    record = job.record
    distill = record["distill"]
    weights = {name: of["weight"] if isinstance(of, dict) else of for name, of in distill["loss"].items() if of}
    built_in = {term.name for term in LOSS_TERMS}
    return {
        "format": options.format,
        "precision": options.precision,
        "out": str(options.out),
        "license": options.license,
        "run": {
            "name": job.name,
            "model": job.spec,
            "image_size": job.image_size,
            "parameters": sum(value.numel() for value in job.student.parameters()),
            **{key: record[key] for key in ("step", "total_steps", "weights", "checkpoint")},
            **{key: distill.get(key) for key in ("batch_images", "lr", "seed")},
            "losses": {name: weight for name, weight in weights.items() if name in built_in or is_function(name)},
        },
        "teacher": dict(record["teacher"]),
        "logit_scale": job.logit_scale,
        "preprocess": job.preprocess,
        "text": None if job.text is None else {"owner": job.text.owner, "tokenizer": job.text.tokenizer},
        "cache": record["cache"],
        "data": dict(record["rows"]),
        "transductive": cache.transductive,
        "versions": {**record["versions"], "dimefm": __version__},
    }


def _latency(job: ExportJob, exported: Exported) -> dict[str, Any]:
    modules = {EXPORTED: exported.image.cpu()}
    modules[STUDENT if exported.baseline is None else FLOAT] = exported.baseline or job.student.cpu()
    return latencies(modules, job.example_images(1))


def _slow(document: Mapping[str, Any]) -> list[str]:
    """A sentence where a smaller precision gains nothing."""
    if document["precision"] == "fp32" or FLOAT not in document["latency"]["batches"]:
        return []
    sizes = no_faster(document["latency"], EXPORTED, FLOAT)
    if not sizes:
        return []
    return [f"{document['precision']} is no faster than float32 here at batches of {' and '.join(sizes)}."]
