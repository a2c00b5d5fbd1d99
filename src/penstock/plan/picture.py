"""A plan as one HTML page: layers by colour of their split, routes with their bytes, memory over
the step, and the timeline of a pipeline. It needs nothing but a browser: drawings are SVG.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from penstock.plan.layout import read_layout
from penstock.plan.step import Layer, Memory, Route, Stages, StepPlan, Times
from penstock.plan.words import in_bytes, in_time

COLOURS = {
    "copied": "#9aa0a6",
    "batch": "#4285f4",
    "features": "#ef8e19",
    "both": "#34a069",
    "sums": "#b15bc4",
}
"""Of a layer, by how its heaviest operator is split."""
MEANINGS = {
    "batch": "split by batch",
    "features": "weights split",
    "both": "batch and weights split",
    "sums": "weights split, parts of a sum",
    "copied": "copied",
}
WIDTH = 960
ROW = 26
_STYLE = """
:root { color-scheme: light dark; --ink: #202124; --faint: #5f6368; --line: #dadce0; --paper: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --faint: #9aa0a6; --line: #3c4043; --paper: #202124 } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1000px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em; margin: 0 } h2 { font-size: 1.05em; margin: 2em 0 .4em }
table { border-collapse: collapse; width: 100% } td, th { padding: .2em .6em; text-align: right;
       border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left } th { font-weight: 600; color: var(--faint) }
p.note { color: var(--faint); margin: .3em 0 } .key { margin-right: 1.2em; white-space: nowrap }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--ink); font-size: 12px }
svg .faint { fill: var(--faint) } svg .rule { stroke: var(--line) }
"""


def picture(plan: StepPlan) -> str:
    """The page."""
    parts = [_head(plan), _times(plan), _layers(plan)]
    if plan.memory is not None:
        parts.append(_memory(plan.memory))
    if plan.stages is not None:
        parts.append(_stages(plan.stages, plan.times.step_s))
    title = escape(f"Plan of {plan.network}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def kind_of(layer: Layer) -> str:
    """How a layer is split, by its heaviest operator: a key of `COLOURS`."""
    inputs, _, outputs = layer.splits.partition("->")
    given, made = [_placements(side) for side in inputs.split(" x ")], _placements(outputs)
    batch = any("S0" in side for side in given[:1])
    weights = any(word.startswith("S") for side in given[1:] for word in side)
    if batch and weights:
        return "both"
    if weights:
        return "sums" if "P" in made else "features"
    return "batch" if batch else "copied"


def _placements(words: str) -> list[str]:
    try:
        return [repr(placement) for placement in read_layout(words.strip())]
    except ValueError:
        return []


def _head(plan: StepPlan) -> str:
    mesh = " x ".join(map(str, plan.assignment.sizes))
    if plan.stages is not None:
        mesh += " in each stage"
    cluster = plan.cluster
    where = (
        f"{_number(cluster.hosts, 'host')} of {_number(cluster.devices, 'device')} "
        f"({escape(cluster.device.name)})"
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in plan.notes)
    return (
        f"<h1>{escape(plan.network)}</h1><p>{plan.batch:,} examples a step on {where}, "
        f"mesh {mesh}; plan {plan.fingerprint}</p>{notes}"
    )


def _times(plan: StepPlan) -> str:
    rows = [("this plan", plan.times), *plan.beside.items()]
    body = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td>"
        + "".join(f"<td>{cell}</td>" for cell in _cells(times))
        + f"<td>{times.step_s / plan.times.step_s:.2f}</td></tr>"
        for name, times in rows
    )
    heads = ("", "step", "compute", "exchange, waited for", "exchange, not hidden", "memory",
             "times this")  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<h2>Predicted</h2><table><tr>{head}</tr>{body}</table>"


def _cells(times: Times) -> list[str]:
    peak = "" if times.peak_bytes is None else in_bytes(times.peak_bytes)
    seconds = (times.step_s, times.compute_s, times.exchange_s, times.exposed_s)
    return [*map(in_time, seconds), peak]


def _layers(plan: StepPlan) -> str:
    layers, routes, staged = plan.layers, plan.routes, plan.stages is not None
    alone = max(plan.assignment.sizes, default=1) == 1
    longest = max([layer.compute_s + layer.exchange_s for layer in layers], default=1.0) or 1.0
    into: dict[str, list[Route]] = {}
    for route in routes:
        into.setdefault(route.module, []).append(route)
    left, right = 250, 330
    scale = (WIDTH - left - right) / longest
    drawn = []
    for number, layer in enumerate(layers):
        y = number * ROW
        wide, more = layer.compute_s * scale, layer.exchange_s * scale
        colour = COLOURS["copied" if alone else kind_of(layer)]
        splits = "" if alone else layer.splits
        name = layer.module or "(loss, and what is in no module)"
        routed = "; ".join(_route(route) for route in into.get(layer.module, ())[:3])
        words = f"{in_time(layer.compute_s)} of compute; {routed or 'no routes'}"
        words = f"{splits}; {words}" if splits else words
        said = in_bytes(layer.exchange_bytes) if layer.exchange_bytes else ""
        drawn.append(
            f"<g><title>{escape(words)}</title>"
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(_short(name))}</text>'
            f'<rect x="{left}" y="{y + 5}" width="{max(wide, 1):.1f}" height="16" rx="2" '
            f'fill="{colour}"/>'
            f'<rect x="{left + wide:.1f}" y="{y + 9}" width="{more:.1f}" height="8" '
            f'fill="{colour}" opacity=".45"/>'
            f'<text x="{left + wide + more + 8:.1f}" y="{y + 17}" class="faint">'
            f"{escape(splits)} {said}</text></g>"
        )
    used = {kind: MEANINGS[kind] for kind in map(kind_of, layers)}
    if alone:
        used = {"copied": "whole on a rank of its stage" if staged else "whole on the one rank"}
    keys = "".join(
        f'<span class="key"><i style="background:{COLOURS[kind]}"></i>{meaning}</span>'
        for kind, meaning in used.items()
    )
    height = len(layers) * ROW + 6
    return (
        f"<h2>Layers</h2><p>{keys}<span class='key'>pale: exchange that computing waits for</span>"
        f"</p>{_svg(height, drawn)}" + _table_of(routes, " inside a stage" * staged)
    )


def _route(route: Route) -> str:
    return f"{route.tensor} {route.source} to {route.target}, {in_bytes(route.num_bytes)}"


def _short(name: str, most: int = 36) -> str:
    return name if len(name) <= most else "..." + name[3 - most :]


def _table_of(routes: Sequence[Route], where: str, most: int = 20) -> str:
    if not routes:
        return f"<p>Nothing is exchanged{where}.</p>"
    largest = sorted(routes, key=lambda route: -route.seconds)[:most]
    body = "".join(
        f"<tr><td>{escape(_short(route.tensor, 48))}</td><td>{escape(route.source)}</td>"
        f"<td>{escape(route.target)}</td><td>{in_bytes(route.num_bytes)}</td>"
        f"<td>{in_time(route.seconds)}</td>"
        f"<td>{'updates, the next step' if route.late else 'computing'}</td></tr>"
        for route in largest
    )
    heads = ("tensor", "from", "to", "a rank sends", "takes", "what waits for it")
    head = "".join(f"<th>{name}</th>" for name in heads)
    rest = len(routes) - len(largest)
    more = f'<p class="note">and {rest} smaller routes</p>' if rest else ""
    return f"<h2>Routes{where}</h2><table><tr>{head}</tr>{body}</table>{more}"


def _memory(memory: Memory) -> str:
    height, line = 180, memory.timeline
    top = max(memory.limit_bytes if memory.limit_bytes < 3 * memory.peak_bytes else 0,
              memory.peak_bytes, 1) * 1.05  # fmt: skip
    across = WIDTH / max(len(line) - 1, 1)

    def y(count: float) -> float:
        return height - height * count / top

    def area(counts: Iterable[int], opacity: str) -> str:
        points = " ".join(f"{n * across:.1f},{y(count):.1f}" for n, count in enumerate(counts))
        return (
            f'<polygon points="0,{height} {points} {WIDTH},{height}" fill="#4285f4" '
            f'opacity="{opacity}"/>'
        )

    drawn = [
        area(line, ".35"),
        # A batch is freed when it has been read: there may be less than what was there at first.
        area((min(count, memory.resident_bytes) for count in line), ".45"),
        f'<text x="6" y="{y(memory.resident_bytes) - 4:.1f}" class="faint">parameters, state, '
        f"batch: {in_bytes(memory.resident_bytes)}</text>",
        f'<text x="{WIDTH - 6}" y="14" text-anchor="end">peak {in_bytes(memory.peak_bytes)}; '
        f"device {in_bytes(memory.limit_bytes)}</text>",
    ]
    if memory.limit_bytes <= top:
        limit = y(memory.limit_bytes)
        drawn.append(
            f'<line x1="0" x2="{WIDTH}" y1="{limit:.1f}" y2="{limit:.1f}" stroke="#d93025" '
            'stroke-dasharray="6 4"/>'
        )
    largest = "; ".join(memory.largest[:6])
    return (
        f"<h2>Memory over the step, of the rank with most</h2>{_svg(height, drawn)}"
        f'<p class="note">at the peak: {escape(largest)}</p>'
    )


def _stages(stages: Stages, step_s: float) -> str:
    last = max((end for stage in stages.timeline for *_, end in stage), default=1.0)
    scale, left = (WIDTH - 80) / last, 80
    drawn = []
    for number, stage in enumerate(stages.timeline):
        y = number * ROW
        drawn.append(f'<text x="0" y="{y + 17}">stage {number}</text>')
        for micro_batch, what, start, end in stage:
            colour = COLOURS["batch" if what == "forward" else "features"]
            x, wide = left + start * scale, (end - start) * scale
            drawn.append(
                f'<rect x="{x:.1f}" y="{y + 4}" width="{max(wide - 1, 0.5):.1f}" height="18" '
                f'fill="{colour}"><title>{what} of micro-batch {micro_batch}, '
                f"{in_time(end - start)}</title></rect>"
            )
            if wide > 14:
                drawn.append(f'<text x="{x + 3:.1f}" y="{y + 17}">{micro_batch}</text>')
    words = (
        f"{_number(stages.number, 'stage')} of {_number(stages.chunks, 'chunk')}, "
        f"{stages.micro_batches} micro-batches; a rank waits {stages.bubble:.0%} of a step"
    )
    keys = "".join(
        f'<span class="key"><i style="background:{COLOURS[colour]}"></i>{what}</span>'
        for colour, what in (("batch", "forward"), ("features", "backward"))
    )
    height = len(stages.timeline) * ROW + 20
    drawn.append(f'<text x="{left}" y="{height - 4}" class="faint">0</text>')
    drawn.append(
        f'<text x="{WIDTH}" y="{height - 4}" class="faint" text-anchor="end">{in_time(last)} of '
        f"a step of {in_time(step_s)}; the rest is once a step, as updates are</text>"
    )
    return f"<h2>Pipeline</h2><p>{words}</p><p>{keys}</p>{_svg(height, drawn)}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _svg(height: float, drawn: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(drawn)}</svg>'
    )
