"""One HTML file that opens without a network: sortable table, bars of time and memory, Pareto plot, the schedule.

It knows a search's result and draws it; it computes nothing but pixels. Script and style are in the file.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from fms_parallel.planner.api import Estimate, Result
from fms_parallel.planner.simulate import Event, makespan

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000", "#e69f00", "#999933")
WIDTH = 640

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;width:100%;font-size:13px}th{cursor:pointer;background:#eef;text-align:right}
td,th{padding:.25em .6em;border-bottom:1px solid #ddd;text-align:right}td:last-child,th:last-child{text-align:left}
tr.best{background:#efe}svg{max-width:100%;height:auto}.legend span{display:inline-block;margin-right:1em}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.3em}code{background:#f4f4f4;padding:.2em .4em}
td:last-child{min-width:12em}td code{overflow-wrap:anywhere}
pre{background:#f4f4f4;padding:.8em;white-space:pre-wrap;overflow-wrap:anywhere}
"""

SCRIPT = """
document.querySelectorAll('th').forEach(function(head, column){
  var down = false;
  head.addEventListener('click', function(){
    down = !down;
    var body = head.closest('table').querySelector('tbody');
    var value = function(row){ return row.children[column].dataset.value; };
    Array.from(body.children).sort(function(a, b){
      var x = value(a), y = value(b), n = parseFloat(x) - parseFloat(y);
      return (isNaN(n) ? x.localeCompare(y) : n) * (down ? 1 : -1);
    }).forEach(function(row){ body.appendChild(row); });
  });
});
"""


def as_html(result: Result, launch: str, events: Sequence[Event] = ()) -> str:
    """The whole page. `events`: of the best layout's pipeline, if it has one."""
    title = f"{result.model.name} on {result.cluster}"
    workload = f"{result.workload.global_batch} sequences of {result.workload.sequence} tokens per step"
    parts = [
        f"<h1>{html.escape(title)}</h1><p>{workload}, {result.workload.precision}. {result.considered} layouts "
        f"looked at, {result.feasible} would run ({result.seconds:.3f} s).</p>",
        "<h2>The best layouts</h2><p>Click a heading to sort.</p>" + _table(result.results),
        "<h2>Where a step's time goes</h2>" + _bars(result.results, "breakdown", "s"),
        "<h2>What fills the memory</h2>" + _bars(result.results, "memory_breakdown", "GiB"),
        "<h2>Time against memory</h2>" + _pareto(result.results),
    ]
    if events:
        parts.append("<h2>The first layout's pipeline</h2>" + _schedule(events, result.results[0].micro_batches))
    parts.append("<h2>Why others were rejected</h2>" + _rejected(result.rejected))
    parts.append(f"<h2>To run the first one</h2><pre>{html.escape(launch)}</pre>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}<script>{SCRIPT}</script></body></html>"
    )


def _table(estimates: Sequence[Estimate]) -> str:
    header = ("rank", "step s", "tokens/s/GPU", "MFU", "GiB", "free", "$ per 1000 steps", "micro-batch", "layout")
    rows = []
    for rank, e in enumerate(estimates, 1):
        cost = e.dollars_per_hour * e.step_time_s / 3.6
        cells = (
            (rank, str(rank)),
            (e.step_time_s, f"{e.step_time_s:.3f}"),
            (e.tokens_per_s_per_gpu, f"{e.tokens_per_s_per_gpu:.0f}"),
            (e.mfu, f"{e.mfu:.1%}"),
            (e.memory_gb, f"{e.memory_gb:.1f}"),
            (e.margin, f"{e.margin:.0%}"),
            (cost, f"{cost:.2f}"),
            (e.micro_batch, f"{e.micro_batch} x {e.micro_batches}"),
            (str(e.layout), f"<code>{html.escape(str(e.layout) or 'one process').replace(',', ',<wbr>')}</code>"),
        )
        columns = "".join(f'<td data-value="{html.escape(str(value))}">{text}</td>' for value, text in cells)
        rows.append(f"<tr{' class=best' if rank == 1 else ''}>{columns}</tr>")
    heads = "".join(f"<th>{name}</th>" for name in header)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _bars(estimates: Sequence[Estimate], attribute: str, unit: str) -> str:
    """One stacked bar per layout."""
    names = [name for name in getattr(estimates[0], attribute) if any(getattr(e, attribute)[name] for e in estimates)]
    colours = dict(zip(names, COLOURS * 2, strict=False))
    longest = max(sum(getattr(e, attribute).values()) for e in estimates)
    shapes = []
    for row, estimate in enumerate(estimates):
        x, y = 40.0, 4 + 22 * row
        shapes.append(f'<text x="0" y="{y + 13}" font-size="12">{row + 1}</text>')
        for name in names:
            value = getattr(estimate, attribute)[name]
            width = value / longest * (WIDTH - 120)
            tip = f"<title>{name}: {value:.3f} {unit}</title>"
            shapes.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="17" fill="{colours[name]}">{tip}</rect>'
            )
            x += width
        shapes.append(
            f'<text x="{x + 5:.1f}" y="{y + 13}" font-size="12">{sum(getattr(estimate, attribute).values()):.2f}</text>'
        )
    legend = "".join(f'<span><i style="background:{colours[name]}"></i>{name}</span>' for name in names)
    return f'<p class="legend">{legend}</p>' + _svg(shapes, 8 + 22 * len(estimates))


def _svg(shapes: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}">{"".join(shapes)}</svg>'


def _pareto(estimates: Sequence[Estimate]) -> str:
    """Step time against memory; filled: no other layout is better in both. Layouts of one point share it."""
    points: dict[tuple[float, float], list[int]] = {}
    for rank, e in enumerate(estimates, 1):
        points.setdefault((float(f"{e.step_time_s:.5g}"), float(f"{e.memory_gb:.4g}")), []).append(rank)
    times, sizes = ([point[i] for point in points] for i in (0, 1))
    x0, x1, y0, y1 = min(sizes) * 0.95, max(sizes) * 1.05, min(times) * 0.98, max(times) * 1.02
    shapes = [f'<rect x="50" y="10" width="{WIDTH - 70}" height="240" fill="none" stroke="#999"/>']
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = 50 + part * (WIDTH - 70), 250 - part * 240
        shapes.append(_label(x, 264, f"{x0 + part * (x1 - x0):.3g}", "middle"))
        shapes.append(_label(46, y + 4, f"{y0 + part * (y1 - y0):.3g}", "end"))
    for (t, m), ranks in points.items():
        x, y = 50 + (m - x0) / (x1 - x0) * (WIDTH - 70), 250 - (t - y0) / (y1 - y0) * 240
        alone = not any(a <= t and b <= m and (a, b) != (t, m) for a, b in points)
        words = ", ".join(map(str, ranks))
        tip = f"<title>{words}: {t:g} s, {m:g} GiB</title>"
        fill = "#228833" if alone else "#fff"
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="#228833">{tip}</circle>')
        shapes.append(_label(x + 7, y + 4, words))
    shapes.append(_label(WIDTH / 2, 280, "GiB of the fullest rank", "middle"))
    shapes.append('<text x="12" y="150" font-size="12" transform="rotate(-90 12 150)">seconds of a step</text>')
    return "<p>Filled: none of the others is better in both.</p>" + _svg(shapes, 290)


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="{anchor}">{text}</text>'


def _schedule(events: Sequence[Event], micros: int) -> str:
    """The timeline, of as many of the `micros` micro-batches as there are events of."""
    colours = {"F": "#4477aa", "B": "#66ccee", "W": "#ccbb44"}
    end = makespan(events)
    ranks = max(event.rank for event in events) + 1
    shapes = [_label(0, 15 + 18 * rank, f"rank {rank}") for rank in range(ranks)]
    for event in events:
        x, width = 60 + event.start / end * (WIDTH - 70), (event.end - event.start) / end * (WIDTH - 70)
        tip = f"<title>{event.work.kind} stage {event.work.stage} micro-batch {event.work.micro}</title>"
        place = f'x="{x:.1f}" y="{3 + 18 * event.rank}" width="{max(width, 0.3):.1f}" height="15"'
        shapes.append(f'<rect {place} fill="{colours[event.work.kind]}" stroke="#fff" stroke-width=".3">{tip}</rect>')
    words = {"F": "forward", "B": "backward", "W": "weight gradients"}
    there = {event.work.kind for event in events}
    legend = "".join(f'<span><i style="background:{colours[k]}"></i>{words[k]}</span>' for k in words if k in there)
    shown = max(event.work.micro for event in events) + 1
    part = f"with {shown} of its {micros} micro-batches" if shown < micros else f"{micros} micro-batches"
    return f'<p class="legend">{legend}{part}: {end:.3f} s</p>' + _svg(shapes, 10 + 18 * ranks)


def _rejected(rejected: Mapping[str, int]) -> str:
    lines = sorted(rejected.items(), key=lambda item: -item[1])
    return "<ul>" + "".join(f"<li>{count}: {html.escape(reason)}</li>" for reason, count in lines) + "</ul>"
