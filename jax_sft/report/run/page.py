"""The page of a training run, and that of two runs beside each other: one file that loads nothing.

In: `RunRecord`s. Out: HTML, made of run.html, run.js and the style sheets of the data page and run.css. What comes from
files is escaped, and a policy in the page lets no script run but its own, by its hash. No part of the data stands in
a script: the numbers of the plots are attributes.
"""

import string
from collections.abc import Iterable, Sequence

from jax_sft.report.frame import framed, part
from jax_sft.report.plots import escape
from jax_sft.report.run import facts
from jax_sft.report.run.changes import (
    Change,
    Interval,
    Side,
    before_and_after,
    metric_changes,
    part_changes,
    probe_changes,
    rule_changes,
)
from jax_sft.report.run.curves import Plot, behaviour_plots, forgetting_plots, overlaid, training_plots
from jax_sft.report.run.draw import figure
from jax_sft.report.run.pairs import Pair, first_and_last, last_of_both, shown
from jax_sft.report.run.record import Answer, RunRecord, mapping

_NAME, _PLACE = 120, 300  # characters of names and values of the run: nobody promised that they are short
_PROMPT, _ANSWER = 2000, 4000  # characters of a prompt and of an answer
_REASONS = 20  # for which conversations were dropped
_FORGETTING = (
    ("loss", "loss per token", "base_loss"),
    ("loss_per_byte", "loss per byte", "base_loss_per_byte"),
    ("kl", "KL from the base, general text", None),
    ("agreement", "agreement with the base, general text", None),
    ("task_kl", "KL from the base, the task", None),
    ("task_agreement", "agreement with the base, the task", None),
)
Section = tuple[str, str, str]  # id, heading, HTML; one without HTML is left out


def run_page(record: RunRecord) -> str:
    """The page of one run, in the order of a story: what came out, how it went, what it says, what it cost."""
    one, two = before_and_after(record)
    about = f"{facts.method(record)} of {facts.model_name(record)} on {facts.data_name(record)}"
    sections = [
        ("result", "What came of it", _result(record)),
        ("curves", "Curves", _charts(training_plots(record))),
        ("behaviour", "Behaviour", _scores(one, two, ("before", "after")) + _charts(behaviour_plots(record))),
        ("answers", "Answers", _answers(first_and_last(record), ("before, step 0", "after"))),
        ("forgetting", "Forgetting", _forgetting(record)),
        ("data", "What it was trained on", _data(record)),
        ("cost", "Cost", _cost(record)),
        ("again", "How to do it again", _again(record)),
    ]
    return _page(f"Training run: {record.name}", record.name, about, sections)


def comparison_page(a: RunRecord, b: RunRecord) -> str:
    """The page of two runs: where their configs differ, their curves, scores and answers, and what they cost."""
    names = run_names(a, b)
    plots = overlaid(a, b, ("A", "B"))
    sections = [
        ("result", "What came of them", _both_results(a, b, names)),
        ("config", "Where the configs differ", _differences(a, b)),
        ("curves", "Curves", f'<p class="quiet">A is drawn solid, B dashed.</p>{_charts(plots)}' if plots else ""),
        ("behaviour", "Behaviour", _scores(Side(a), Side(b), ("A", "B"))),
        ("answers", "Answers of the two final models", _answers(last_of_both(a, b), ("A", "B"))),
        ("forgetting", "Forgetting", _both_forgetting(a, b)),
        ("cost", "Cost", _beside(facts.cost(a), facts.cost(b))),
    ]
    about = f"A: {names[0]}. B: {names[1]}. Differences are B less A."
    return _page(f"Two runs: {names[0]} and {names[1]}", f"{names[0]} and {names[1]}", about, sections)


def run_names(a: RunRecord, b: RunRecord) -> tuple[str, str]:
    """The folders' names, or their paths where the names are the same."""
    return (a.name, b.name) if a.name != b.name else (str(a.workdir), str(b.workdir))


def warnings(a: RunRecord, b: RunRecord) -> list[str]:
    """What must be known before two runs are compared."""
    found = []
    if facts.measures_same(a, b) is False:
        found.append("The validation sets differ, so the validation losses cannot be compared.")
    if facts.measures_same(a, b) is None:
        found.append("One run has no fingerprint of a validation set, so nobody knows whether their losses compare.")
    if facts.model_name(a) != facts.model_name(b):
        found.append("The base models differ: losses per token compare only where the tokenizers are the same.")
    return found


def _page(title: str, heading: str, about: str, sections: Sequence[Section]) -> str:
    there = [section for section in sections if section[2]]
    body = string.Template(part("run/run.html")).substitute(
        heading=escape(heading, limit=_PLACE),
        about=escape(about, limit=1000),
        nav="".join(f'<a href="#{id}">{escape(name)}</a>' for id, name, _ in there),
        sections="\n".join(f'<section id="{id}"><h2>{escape(name)}</h2>\n{body}</section>' for id, name, body in there),
    )
    return framed(
        escape(title, limit=_PLACE),
        body,
        styles=("page.css", "run/run.css"),
        scripts=("filter.js", "run/run.js"),
        more_policy="; base-uri 'none'; form-action 'none'",
    )


def _alarm(text: str, *, is_stop: bool = False) -> str:
    return f'<p class="alarm{" stop" if is_stop else ""}" role="note">{escape(text, limit=1000)}</p>'


def _alarms(record: RunRecord, who: str = "") -> str:
    out = [
        _alarm(
            f"{who}{alarm.level or 'alarm'}, {alarm.kind}, step {alarm.step:,}: {alarm.text}",
            is_stop=alarm.level == "stop",
        )
        for alarm in record.alarms
    ]  # fmt: skip
    if not facts.is_finished(record):
        out.append(_alarm(f"{who}The run is not finished: {facts.progress(record)} are logged."))
    return "".join(out + [_alarm(f"{who}{note}.") for note in record.notes])


def _result(record: RunRecord) -> str:
    shown = [
        ("model", facts.model_name(record)),
        ("data", facts.data_name(record)),
        ("trained by", facts.method(record)),
        ("length", facts.progress(record)),
    ]
    tiles = [
        (name, record.before(key), record.after(key), form)
        for name, key, form in (
            ("validation loss", "validation/loss", "{:.4f}"),
            ("validation accuracy", "validation/accuracy", "{:.1%}"),
            ("probes answered", "probes/answers", "{:.1%}"),
            ("instructions followed", "rules/instruction_strict", "{:.1%}"),
        )
    ]
    shown += [
        (name, f"{_form(form, before)} → {_form(form, after)}")
        for name, before, after, form in tiles
        if after is not None
    ]
    return (
        f'{_alarms(record)}<p class="lead">{escape(facts.what_changed(record))}</p>'
        f'<div class="card"><dl>{_facts(shown, strong=True)}</dl></div>'
    )  # fmt: skip


def _form(form: str, value: float | None) -> str:
    return "not measured" if value is None else form.format(value)


def _facts(rows: Iterable[tuple[str, str]], *, strong: bool = False) -> str:
    begin, end = ("<b>", "</b>") if strong else ("", "")
    return "".join(
        f"<div><dt>{escape(name, limit=_NAME)}</dt><dd>{begin}{escape(value, limit=_PLACE)}{end}</dd></div>"
        for name, value in rows
    )


def _charts(plots: Sequence[Plot]) -> str:
    return f'<div class="charts">{"".join(map(figure, plots))}</div>' if plots else ""


def _scores(one: Side, two: Side, heads: tuple[str, str]) -> str:
    """Probes, instruction following, metrics; each number of both sides with its difference."""
    probes, rules, metrics = probe_changes(one, two), rule_changes(one, two), metric_changes(one, two)
    if not (probes or rules or metrics):
        return ""
    said = "Intervals are 95 %. Those of differences are of a paired bootstrap over prompts; bold where 0 is outside."
    out = [f'<p class="quiet">{said}</p>']
    out += _table("Behaviour probes", probes, heads)
    out += _parts("Probes by kind and language", one, two, heads, "probes/kind=", "probes/language=")
    out += _table("Instruction following", rules, heads)
    out += _parts("Instructions by kind", one, two, heads, "rules/kind=")
    for name, changes in metrics.items():
        out += _table(f"Task metrics: {name}", changes, heads)
    return "".join(out)


def _table(title: str, changes: Sequence[Change], heads: tuple[str, str]) -> list[str]:
    return (
        [f"<h3>{escape(title, limit=_NAME)}</h3>", f'<div class="card">{_numbers(changes, heads)}</div>']
        if changes
        else []
    )


def _parts(title: str, one: Side, two: Side, heads: tuple[str, str], *prefixes: str) -> list[str]:
    changes = [change for prefix in prefixes for change in part_changes(one, two, prefix)]
    if not changes:
        return []
    return [f'<details><summary class="plain">{escape(title)}</summary>{_numbers(changes, heads)}</details>']


def _numbers(changes: Sequence[Change], heads: tuple[str, str]) -> str:
    lines = "".join(
        f'<tr><td class="name">{escape(_spaced(change.name), limit=_NAME)}{_small(change.note)}'
        f'<td class="n of">{"" if change.count is None else f"{change.count:,}"}'
        f'<td class="n">{_value(change.before, change.scale)}{_small(_between(change.before_interval, change.scale))}'
        f'<td class="n">{_value(change.after, change.scale)}{_small(_between(change.after_interval, change.scale))}'
        f'<td class="n">{_moved(change)}'
        for change in changes
    )
    named = '<th class="n of" scope="col">of' + "".join(
        f'<th class="n" scope="col">{escape(head)}' for head in (*heads, "difference")
    )
    head = f'<tr><th scope="col"><span></span>{named}'
    return f'<div class="scroll" tabindex="0"><table class="numbers">{head}{lines}</table></div>'


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _small(text: str) -> str:
    return f"<small>{escape(text, limit=_PLACE)}</small>" if text else ""


def _value(value: float | None, scale: int) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if scale == 1 and 0 <= value <= 1 else f"{value:,.2f}"


def _between(interval: Interval | None, scale: int) -> str:
    return "" if interval is None else f"{_value(interval[0], scale)} to {_value(interval[1], scale)}"


def _moved(change: Change) -> str:
    if change.difference is None:
        return "–"
    size, unit = (100, " pp") if change.scale == 1 else (1, "")  # percentage points
    text = f"{size * change.difference:+.1f}{unit}"
    css = ("up" if change.difference > 0 else "down") if change.is_sure else ""
    low, high = change.interval or (0.0, 0.0)
    under = f"{size * low:+.1f} to {size * high:+.1f}" if change.interval else ""
    return (f'<span class="{css}">{text}</span>' if css else text) + _small(under)


def _answers(pairs: Sequence[Pair], heads: tuple[str, str]) -> str:
    if not pairs:
        return ""
    kept, missing = shown(list(pairs))
    left = f'<p class="quiet">{missing:,} more are not on this page; they are in the workdir.</p>' if missing else ""
    choices = "".join(
        f'<label>{name} <select name="{name.lower()}"><option value="">all</option></select></label>'
        for name in ("Kind", "Change")
    )
    return (
        f'<div class="tools"><form id="filter" hidden>{choices}<label>Text <input type="search" autocomplete="off" '
        f'placeholder="find in these"></label><output class="quiet"></output></form></div>{left}'
        + "".join(_pair(pair, heads) for pair in kept)
    )  # fmt: skip


def _pair(pair: Pair, heads: tuple[str, str]) -> str:
    change = pair.change
    reference = (
        '<details><summary class="plain">Reference</summary><p class="text" dir="auto">'
        f"{escape(pair.reference, limit=_ANSWER)}</p></details>"
        if pair.reference
        else ""
    )
    id = "" if pair.kind == "samples" else f'<bdi class="id">{escape(pair.id, limit=_NAME)}</bdi>'
    return (
        f'<article class="pair" data-kind="{escape(pair.kind, limit=_NAME)}" data-change="{change}"><h3>'
        f'<span class="tag">{escape(pair.kind, limit=_NAME)}</span>{id}<span class="tag {change}">{change}</span></h3>'
        f'<div class="prompt text" dir="auto">{escape(pair.prompt, limit=_PROMPT)}</div>'
        f'<div class="two">{_side(pair.one, heads[0])}{_side(pair.two, heads[1])}</div>{reference}</article>'
    )


def _side(answer: Answer | None, head: str) -> str:
    if answer is None:
        return f'<div class="none"><h4>{escape(head)}</h4><div class="text">not asked</div></div>'
    said = [f"{answer.tokens:,} tokens"] if answer.tokens is not None else []
    said += ["cut at the limit"] if answer.stopped is False else []
    said += [f"{_spaced(name)} {value:.3g}" for name, value in answer.scores.items()]
    css, text = ("", escape(answer.answer, limit=_ANSWER)) if answer.answer else (' class="none"', "nothing")
    under = f'<p class="quiet">{escape(", ".join(said), limit=_PLACE)}</p>' if said else ""
    return f'<div{css}><h4>{escape(head)}</h4><div class="text" dir="auto">{text}</div>{under}</div>'


def _forgetting(record: RunRecord) -> str:
    rows = [
        (name, *(_form("{:.4f}", of(f"forgetting/{key}")) for of in (record.before, record.after)), _base(record, base))
        for key, name, base in _FORGETTING
        if record.columns.get(f"forgetting/{key}")
    ]  # fmt: skip
    if not rows:
        return ""
    table = _plain(("", "before", "after", "base"), rows, numbers=True)
    return f'<div class="card">{table}</div>{_charts(forgetting_plots(record))}'


def _base(record: RunRecord, key: str | None) -> str:
    if key is None:
        return ""
    found = record.after(f"forgetting/{key}") or record.before(f"forgetting/{key}")
    return "–" if found is None else f"{found:.4f}"


def _both_forgetting(a: RunRecord, b: RunRecord) -> str:
    rows = []
    for key, name, _ in _FORGETTING:
        one, two = (record.after(f"forgetting/{key}") for record in (a, b))
        if one is not None or two is not None:
            moved = "–" if one is None or two is None else f"{two - one:+.4f}"
            rows.append((name, _form("{:.4f}", one), _form("{:.4f}", two), moved))
    return f'<div class="card">{_plain(("", "A", "B", "difference"), rows, numbers=True)}</div>' if rows else ""


def _plain(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False, css: str = "") -> str:
    """A table of texts; all columns but the first are numbers where `numbers` says so."""
    n = ' class="n"' if numbers else ""
    head = "".join(f'<th scope="col"{n if i else ""}>{escape(name) or "<span></span>"}' for i, name in enumerate(heads))
    lines = "".join(
        "<tr>" + "".join(f"<td{n if i else ' class=name'}>{escape(cell, limit=_PLACE)}" for i, cell in enumerate(row))
        for row in rows
    )
    return f'<div class="scroll" tabindex="0"><table class="{css or "numbers"}"><tr>{head}{lines}</table></div>'


def _data(record: RunRecord) -> str:
    out, sizes = [], facts.sizes(record)
    found = facts.accounts(record)
    if found:
        rows = []
        for name, counts, _ in found:
            size = [mapping(sizes.get(name)).get(key) for key in ("sequences", "tokens", "trained_tokens")]
            said = [f"{n:,}" if isinstance(n, int) else "not written down" for n in size]
            rows.append((name, *(f"{counts[key]:,}" for key in ("read", "kept", "held_out", "dropped")), *said))
        heads = ("set", "conversations", "kept", "held out", "dropped", "sequences", "tokens", "trained tokens")
        out.append(f'<div class="card">{_plain(heads, rows, numbers=True)}</div>')
    for name, _, reasons in found:
        if reasons:
            lost = sorted(reasons.items(), key=lambda one: -one[1])
            lines = _plain(
                ("reason", "conversations"), [(reason, f"{n:,}") for reason, n in lost[:_REASONS]], numbers=True
            )
            out.append(
                f'<details><summary class="plain">Why {escape(name)} lost conversations</summary>{lines}</details>'
            )
    shares = facts.source_shares(record)
    if shares:
        lines = "".join(
            f'<tr><td class="name"><bdi>{escape(name, limit=_NAME)}</bdi><td class="share">'
            f'<span style="--share:{min(max(share, 0.0), 1.0):.4f}">{share:.1%}</span>'
            for name, share in shares
        )
        out.append(
            '<div class="card scroll" tabindex="0"><table><tr><th scope="col">source'
            f'<th scope="col" class="share">share of the loss{lines}</table></div>'
        )
    card = facts.data_card(record)
    if card:
        out.append(f'<p><a href="{card}">Data card</a></p>')
    return "".join(out)


def _cost(record: RunRecord) -> str:
    parts = facts.cost_parts(record)
    rows = [(name, facts.duration(seconds)) for name, seconds in parts]
    table = f'<div class="card">{_plain(("part", "time"), rows, numbers=True)}</div>' if rows else ""
    return f'<div class="card"><dl>{_facts(facts.cost(record))}</dl></div>{table}'


def _beside(one: facts.Facts, two: facts.Facts) -> str:
    """Facts of two runs in a table; a fact that one lacks is a dash."""
    a, b = dict(one), dict(two)
    rows = [(key, a.get(key, "–"), b.get(key, "–")) for key in {**a, **b}]
    return f'<div class="card">{_plain(("", "A", "B"), rows, css="beside")}</div>'


def _again(record: RunRecord) -> str:
    changed, rest = facts.config_rows(record)
    command = str(record.manifest.get("command") or "not written down")
    return (
        f'<div class="card"><h3>Command</h3><pre>{escape(command, limit=_ANSWER)}</pre></div>'
        + _folded(f"Config: {len(changed):,} keys that differ from their default", changed, is_open=True)
        + _folded(f"Config: {len(rest):,} keys at their default", rest)
        + _folded("Seed, commit and versions", facts.made_with(record))
    )


def _folded(title: str, rows: facts.Facts, *, is_open: bool = False) -> str:
    return f'<details{" open" if is_open else ""}><summary class="plain">{title}</summary>{_values(rows)}</details>'


def _values(rows: Iterable[tuple[str, ...]], heads: Sequence[str] = ()) -> str:
    head = "".join(f'<th scope="col">{name}' for name in heads)
    lines = "".join("<tr>" + "".join(f"<td><code>{escape(cell, limit=1000)}</code>" for cell in row) for row in rows)
    begin = f"<tr>{head}" if head else ""
    return f'<div class="scroll" tabindex="0"><table class="values">{begin}{lines}</table></div>'


def _both_results(a: RunRecord, b: RunRecord, names: tuple[str, str]) -> str:
    rows: list[tuple[str, ...]] = [("run", *names)]
    for name, of in (
        ("model", facts.model_name),
        ("data", facts.data_name),
        ("trained by", facts.method),
        ("length", facts.progress),
    ):
        rows.append((name, of(a), of(b)))
    for name, key in (("validation loss, before", 0), ("validation loss, after", 1)):
        found = [(record.after if key else record.before)("validation/loss") for record in (a, b)]
        rows.append((name, *(_form("{:.4f}", value) for value in found)))
    best = [record.best_step() for record in (a, b)]
    rows.append(("best step", *("–" if step is None else f"{step:,}" for step in best)))
    return (
        "".join(map(_alarm, warnings(a, b)))
        + _alarms(a, "A: ")
        + _alarms(b, "B: ")
        + f'<div class="card">{_plain(("", "A", "B"), rows, css="beside")}</div>'
    )


def _differences(a: RunRecord, b: RunRecord) -> str:
    rows = facts.config_differences(a, b)
    if not rows:
        return "<p>The configs are the same.</p>"
    return f'<div class="card">{_values(rows, ("key", "A", "B"))}</div>'
