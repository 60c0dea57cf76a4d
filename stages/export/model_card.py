"""README.md of an export, as the hub reads it: what it is, what it was made of, its scores, how to load it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

_TASK = "zero-shot-image-classification"
_TITLES = {"student": "student", "teacher_fp16": "teacher at 16 bits"}


def model_card(document: Mapping[str, Any], certificate: Mapping[str, Any] | None, library: str) -> str:
    """The card.

    Args:
        document: of export.json.
        certificate: of certificate.json, where there is one.
        library: what the hub calls the library that loads it.
    """
    name = document["run"]["name"]
    results = [
        EvalResult(
            task_type=_TASK,
            task_name="Zero-shot image classification",
            dataset_type=of_set,
            dataset_name=of_set,
            metric_type="accuracy",
            metric_name="top-1",
            metric_value=round(scores["student_top1"], 4),
        )
        for of_set, scores in document["sets"].items()
        if "student_top1" in scores
    ]
    data = ModelCardData(
        license=document["license"],
        library_name=library,
        pipeline_tag=_TASK if document["text"] else "image-feature-extraction",
        tags=["clip", "distillation", "dimefm", document["format"]],
        model_name=name,
        eval_results=results or None,
    )
    parts = [
        [f"# {name}", "", *_what(document)],
        ["## How to load it", "", "Run in this folder; nothing of dimefm is needed.", "", *_code(document["usage"])],
        _bullets(document["notes"]),
        ["## Scores", "", *_scores(document)],
        ["## Against the student before export", "", *_proof(document)],
        ["## Size and latency", "", *_latency(document)],
        [] if certificate is None else ["## Drop-in certificate", "", *_certificate(certificate)],
        ["## How it was made", "", *_recipe(document)],
        ["## Licence", "", *_licence(document)],
    ]
    body = "\n\n".join("\n".join(lines) for lines in parts if lines)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _what(document: Mapping[str, Any]) -> list[str]:
    run, teacher = document["run"], document["teacher"]
    text = {None: "no text tower", "teacher": "the teacher's text tower", "student": "a text tower of its own"}
    words = text[document["text"]["owner"] if document["text"] else None]
    return [
        f"An image tower `{run['model']}` at {run['image_size']} px with {words}, distilled from the CLIP teacher "
        f"`{teacher['model']}`" + (f" (`{teacher['pretrained']}`)" if teacher.get("pretrained") else "") + " with "
        f"[dimefm](https://arxiv.org/abs/2303.18232). Format {document['format']}, precision {document['precision']}, "
        f"{document['bytes'] / 1e6:,.1f} MB, {run['parameters']:,} parameters in the image tower.",
    ]


def _code(lines: Iterable[str]) -> list[str]:
    return ["```python", *lines, "```"]


def _bullets(notes: Sequence[str]) -> list[str]:
    return [f"- {note}" for note in notes]


def _scores(document: Mapping[str, Any]) -> list[str]:
    level = "95 %"
    rows = [
        [
            name,
            f"{scores['n']:,}",
            _share(scores, "student_top1"),
            _share(scores, "student_top5"),
            _share(scores, "teacher_top1"),
            _share(scores, "retention"),
            _percent(scores["agreement"]),
        ]
        for name, scores in document["sets"].items()
        if "student_top1" in scores
    ]
    missing = [f"- {name}: not measured, {of['missing']}" for name, of in document["sets"].items() if "missing" in of]
    if not rows:
        return missing or ["The run has no labelled set."]
    titles = ["set", "images", f"top-1 ({level})", "top-5", "teacher top-1", "retention", "agreement with the teacher"]
    lines = [*_table(titles, rows), "", "Of these files, in per cent; intervals by bootstrap over the images."]
    chosen = [name for name, scores in document["sets"].items() if scores.get("chosen_on")]
    if chosen:
        lines += [f"Optimistic on {', '.join(chosen)}: the step was chosen there."]
    if document["transductive"]:
        lines += [f"Class names of {', '.join(document['transductive'])} were among the training sentences."]
    return lines + missing


def _proof(document: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            _share(scores["unexported"], "top1", intervals=False),
            _share(scores["unexported"], "agreement"),
            _number(scores["unexported"], "cosine"),
        ]
        for name, scores in document["sets"].items()
        if "unexported" in scores
    ]
    lines = [*_table(["set", "student top-1", "same class as the student", "cosine with the student"], rows), ""]
    lines = lines if rows else []
    rest = document["unlabelled"]
    if "missing" in rest:
        return [*lines, f"Unlabelled rows: not measured, {rest['missing']}."]
    lines += [
        f"On {rest['rows']:,} unlabelled images of the cache: cosine with the student "
        f"{_number(rest, 'cosine_with_student')}, with the teacher {_number(rest, 'cosine_with_teacher')} (the "
        f"student: {_number(rest, 'student_cosine_with_teacher')}). Of {rest['sentences']:,} sentences the "
        f"nearest one is the student's for {_share(rest, 'agreement_with_student')} % of them and the teacher's for "
        f"{_share(rest, 'agreement_with_teacher')} % (the student: {_share(rest, 'student_agreement_with_teacher')} %)."
    ]
    if "proof" in (document["text"] or {}):
        text = document["text"]["proof"]
        lines += [
            f"On {text['sentences']:,} sentences the text tower has a cosine of {_number(text, 'cosine_with_tower')} "
            f"with itself in float32, and of {_number(text, 'cosine_with_teacher')} with what the teacher had said."
        ]
    return lines


def _latency(document: Mapping[str, Any]) -> list[str]:
    found = document["latency"]
    rows = [
        [
            name,
            size,
            f"{of['median_ms']:.2f} ({of['quartiles_ms'][0]:.2f} to {of['quartiles_ms'][1]:.2f})",
            str(of["runs"]),
        ]
        for name, batches in found["batches"].items()
        for size, of in batches.items()
    ]
    instructions = ", ".join(found["int8_instructions"]) or "none that the system names"
    lines = [*_table(["image tower", "batch", "ms, median (quartiles)", "runs"], rows), ""]
    lines += [
        f"{found['cpu']}, {found['threads']} threads; int8 instructions: {instructions}. Files: "
        + ", ".join(f"{name} {size / 1e6:,.2f} MB" for name, size in document["files"].items())
        + "."
    ]
    return lines


def _certificate(certificate: Mapping[str, Any]) -> list[str]:
    ks = [str(k) for k in certificate["k"]]
    rows = []
    for name, found in certificate["comparisons"].items():
        for who, title in _TITLES.items():
            cells = [_share(found[who].get(k, {}), "kept", "interval") for k in ks]
            rows.append([name, f"{found['rows']:,}", title, *cells])
        rows.append([name, f"{found['rows']:,}", "chance", *(_percent(found["chance"].get(k)) for k in ks)])
    return [
        "Of the results that the teacher's own query has in the top k, the share that is kept, in per cent:",
        "",
        *_table(["query and database", "rows", "who", *(f"k = {k}" for k in ks)], rows),
    ]


def _recipe(document: Mapping[str, Any]) -> list[str]:
    run, data = document["run"], document["data"]
    losses = ", ".join(f"{name} {weight:g}" for name, weight in run["losses"].items())
    return _bullets(
        [
            f"Data: {data['images']:,} unlabelled images and {data['sentences']:,} sentences that belong to none of "
            f"them; cache identity `{document['cache']}`.",
            f"Teacher: `{document['teacher']['model']}`, weights digest `{document['teacher'].get('weights')}`, logit "
            f"scale {document['logit_scale']:g}.",
            f"Recipe: losses {losses}; step {run['step']:,} of {run['total_steps']:,} ({run['checkpoint']}, weights "
            f"`{run['weights']}`); batches of {run['batch_images']} images; learning rate {run['lr']:g}; seed "
            f"{run['seed']}.",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in document["versions"].items()) + ".",
        ]
    )


def _licence(document: Mapping[str, Any]) -> list[str]:
    if document["license"] != "unknown":
        return [f"{document['license']}, as the person who exported it says."]
    return [
        "Unknown: it follows from the licences of the teacher's weights and of the images and sentences, which dimefm "
        "does not know. Whoever passes this on has to name it (`dimefm export … --license`)."
    ]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


def _share(scores: Mapping[str, Any], key: str, interval: str | None = None, *, intervals: bool = True) -> str:
    bounds = scores.get(interval or f"{key}_interval") if intervals else None
    text = _percent(scores.get(key))
    return text if not bounds else f"{text} ({_percent(bounds[0])} to {_percent(bounds[1])})"


def _number(scores: Mapping[str, Any], key: str) -> str:
    value = scores.get(key)
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
