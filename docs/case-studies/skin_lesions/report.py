"""What was found, in words and tables: every number and every verdict is read off the results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the tables are written as the benchmarks write theirs

from folder_study import FolderStudy
from generated import BIASED, FREE, REVERSED, SAME, TELLS, Cell, Study
from heads import ABLATED, CLASSIFIER, HEADS, KEYED, PROMPTS, RANDOM, REFITTED
from measures import Accuracy, Measured

from benchmarks.page import table


def change(difference: Measured) -> str:
    """A difference in points with its interval, and what the interval allows to say.

    Example:
        >>> import numpy as np
        >>> change(Measured(-0.1, np.array([-0.1, -0.1])))
        'falls by 10.0 points (10.0 to 10.0)'
    """
    value, (low, high) = 100 * difference.value, (100 * end for end in difference.interval)
    if low > 0:
        return f"rises by {value:.1f} points ({low:.1f} to {high:.1f})"
    if high < 0:
        return f"falls by {-value:.1f} points ({-high:.1f} to {-low:.1f})"
    return f"does not change beyond chance ({value:+.1f} points, {low:+.1f} to {high:+.1f})"


def standing(difference: Measured, other: str) -> str:
    """Whether one head is above another on the same pictures, from the difference of the two."""
    low, high = (100 * end for end in difference.interval)
    points = f"{100 * difference.value:+.1f} points, {low:+.1f} to {high:+.1f}"
    if low > 0:
        return f"above {other} ({points})"
    return f"below {other} ({points})" if high < 0 else f"not to be told from {other} ({points})"


def strong_agreement(agreements: Sequence[float]) -> float:
    """The strongest bias that leaves pictures on which the shortcut is wrong; what verdicts and figures are about."""
    return max((one for one in agreements if one < 1), default=max(agreements))


def study_section(study: Study, command: str, machine: str) -> str:
    """The section of README.md: the tables and, for the strongest bias that is not total, the verdicts."""
    settings, q = study.settings, study.check.quality
    strong = strong_agreement(settings.agreements)
    header = ["shortcut", "agreement", "suspects", "of them carry it", "latents that carry it", "greatest excess"]
    parts = [
        f"`{command}` ({machine})",
        _prose(
            f"{settings.n_train} training and {settings.n_test} test lesions, each with and without the shortcut; seed",
            f"{settings.seed}. The SAE ({settings.d_sae} latents, k = {settings.k}, class token at",
            f"`{settings.hook_name}`): {study.check.verdict}, explained variance {q.explained_variance:.3f}, L0",
            f"{q.l0:.1f}, {100 * q.dead_latents:.0f}% of the latents never fire.",
        ),
        "### Accuracy",
        "Balanced accuracy with 95% intervals over the test lesions.",
        table(["shortcut", "agreement", "test pictures", *HEADS], _accuracy_rows(study)),
        "### Suspects",
        _prose(
            "Suspects are found without the answer key. By the key a latent *carries* the shortcut if its activation",
            f"tells a lesion with it from the same lesion without it: area under the ROC curve at least {TELLS}, or at",
            f"most {1 - TELLS:.1f} where the latent is active when the shortcut is missing. Last column: the latent,",
            "its share under the classifier and under the prompts, and its area.",
        ),
        table(header, [_suspect_row(cell) for cell in study.cells]),
        f"### What the intervals say, at an agreement of {strong:g}",
        "\n".join(_verdict(study.cell(name, strong)) for name in settings.shortcuts),
    ]
    if study.control:
        parts += ["### A CLIP whose pretraining was biased", _control(study)]
    return "\n\n".join(parts)


def _prose(*parts: str) -> str:
    return " ".join(parts)


def _short(measured: Measured) -> str:
    low, high = measured.interval
    return f"{measured.value:.2f} ({low:.2f} to {high:.2f})"


def _accuracy_rows(study: Study) -> list[list[str]]:
    rows = []
    for cell in study.cells:
        for pictures in (SAME, FREE, REVERSED):
            found = cell.accuracy[pictures]
            first = [cell.shortcut, f"{cell.agreement:g}"] if pictures == SAME else ["", ""]
            rows.append([*first, pictures, *(_short(found[head].balanced) if head in found else "" for head in HEADS)])
    return rows


def _suspect_row(cell: Cell) -> list[str]:
    suspects = cell.suspects
    told = [cell.shortcut, f"{cell.agreement:g}", str(len(suspects.latents))]
    told += [str(_carrying(cell)), str(len(cell.keyed))]
    if not suspects.latents:
        return [*told, ""]
    shares = f"{100 * suspects.share_probe[0]:.0f}%, {100 * suspects.share_text[0]:.0f}%"
    return [*told, f"{suspects.latents[0]}: {shares}; {_short(cell.key[0])}"]


def _carrying(cell: Cell) -> int:
    return len(set(cell.suspects.latents) & set(cell.keyed))


def _gain(cell: Cell, pictures: str, head: str) -> str:
    """What a head is beyond the classifier on some pictures."""
    by = cell.accuracy[pictures]
    return change((by[head] - by[CLASSIFIER]).balanced)


def _verdict(cell: Cell) -> str:
    by = cell.accuracy
    falls = {head: change((by[REVERSED][head] - by[SAME][head]).balanced) for head in (CLASSIFIER, PROMPTS)}
    first = _prose(
        f"- **{cell.shortcut}**. From pictures that are biased like the training set to reversed ones the classifier's",
        f"accuracy {falls[CLASSIFIER]}, that of the prompts {falls[PROMPTS]}. On pictures without the shortcut the",
        f"classifier is {standing((by[FREE][CLASSIFIER] - by[FREE][PROMPTS]).balanced, 'the prompts')}.",
    )
    if ABLATED not in by[FREE]:
        return f"{first} No suspect was found."
    return _prose(
        first,
        f"{_carrying(cell)} of {len(cell.suspects.latents)} suspects carry it. With the suspects at zero the",
        f"classifier's accuracy on reversed pictures {_gain(cell, REVERSED, ABLATED)}, with random latents of like",
        f"activation at zero it {_gain(cell, REVERSED, RANDOM)}; on pictures without the shortcut, suspects at",
        f"zero, it {_gain(cell, FREE, ABLATED)}, random ones at zero, it {_gain(cell, FREE, RANDOM)}. Fitted anew with",
        f"the suspects at zero it {_gain(cell, FREE, REFITTED)} on pictures without the shortcut and",
        f"{_gain(cell, REVERSED, REFITTED)} on reversed ones.",
        *([_of_the_key(cell)] if KEYED in by[REVERSED] else []),
    )


def _of_the_key(cell: Cell) -> str:
    named = f"With the {len(cell.keyed)} latents that the key names at zero the classifier's accuracy"
    return f"{named} {_gain(cell, REVERSED, KEYED)} on reversed pictures."


def _control(study: Study) -> str:
    rows = [
        [name, *(_short(by[pictures].balanced) for pictures in (SAME, FREE, REVERSED))]
        for name, by in study.control.items()
    ]
    by = study.control[next(iter(BIASED))]
    told = _prose(
        f"The same model, prompts and test lesions, but rulers agreed with melanoma on {100 * BIASED['ruler']:g}% of",
        "the pretraining pictures, and no caption mentioned a shortcut. From pictures that are biased likewise to",
        f"reversed ones the accuracy of the prompts {change((by[REVERSED] - by[SAME]).balanced)}.",
    )
    return f"{told}\n\n{table(['shortcut', SAME, FREE, REVERSED], rows)}"


def folder_section(study: FolderStudy, prompts: Sequence[str], model: str) -> str:
    """`report.md` of a user's folder."""
    train, test, suspects, q = study.train, study.test, study.suspects, study.check.quality
    fits = "fits" if study.check.verdict == "fits" else "is suspicious, so read what follows with doubt"
    shown = "; ".join(test.skipped[:5]) + ("; ..." if len(test.skipped) > 5 else "")
    columns = ["latent", "class", "share, classifier", "share, prompts", *(f"area for {name}" for name in study.key)]
    parts = [
        "# Which latents does the classifier rest on?",
        _prose(
            f"Model {model}; {len(train)} training and {len(test)} test pictures of {test.classes[0]!r} and",
            f"{test.classes[1]!r}; prompts {prompts[0]!r} and {prompts[1]!r}.",
            f"{len(test.skipped)} rows of the table were left out{': ' if shown else ''}{shown}.",
            f"The SAE {fits}: explained variance {q.explained_variance:.3f}, L0 {q.l0:.1f},",
            f"{100 * q.dead_latents:.0f}% of the latents never fire on {study.check.n_images} test pictures.",
        ),
        "## Accuracy",
        "Balanced accuracy; area under the ROC curve; 95% intervals over the test pictures.",
        table(["head", *study.accuracy], _head_rows(study.accuracy)),
    ]
    if study.not_measured:
        parts.append(f"Not measured, for want of pictures: {'; '.join(study.not_measured)}.")
    parts += [
        "## Suspects",
        "Latents with a greater share of the attribution under the classifier than under the prompts.",
    ]
    parts.append(table(columns, _folder_suspects(study)) if suspects.latents else "None was found.")
    if not study.key:
        parts.append("Without annotations nothing says what they carry: look at their pictures in `suspects.png`.")
    if study.agreement:
        shares = ", ".join(f"{name} on {100 * share:.0f}%" for name, share in study.agreement.items())
        parts.append(f"In training the annotations agree with the label, one way round or the other: {shares}.")
    for name, by in study.accuracy.items():
        if ABLATED in by:
            gains = {head: change((by[head] - by[CLASSIFIER]).balanced) for head in (ABLATED, RANDOM, REFITTED)}
            parts.append(
                f"*{name.capitalize()}*: with the suspects at zero the balanced accuracy {gains[ABLATED]}, with "
                f"random latents of like activation at zero it {gains[RANDOM]}; fitted anew with the suspects at "
                f"zero it {gains[REFITTED]}."
            )
    return "\n\n".join(parts)


def _head_rows(accuracy: dict[str, dict[str, Accuracy]]) -> list[list[str]]:
    heads = next(iter(accuracy.values()))
    return [
        [head, *(f"{_short(by[head].balanced)}; {_short(by[head].auroc)}" for by in accuracy.values())]
        for head in heads
    ]


def _folder_suspects(study: FolderStudy) -> list[list[str]]:
    suspects = study.suspects
    return [
        [
            str(latent),
            suspects.of_class[place],
            f"{100 * suspects.share_probe[place]:.0f}%",
            f"{100 * suspects.share_text[place]:.0f}%",
            *(_short(areas[place]) for areas in study.key.values()),
        ]
        for place, latent in enumerate(suspects.latents)
    ]
