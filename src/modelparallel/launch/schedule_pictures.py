"""Pictures of a schedule on its timeline: a grid of text for a terminal, and a drawing in SVG."""

from __future__ import annotations

from html import escape

from modelparallel.pipeline.schedule.timeline import Timeline
from modelparallel.plan.schedule import ActionKind, Schedule

_MAX_COLUMNS = 2000
_IDLE = "."
_COLOURS = {ActionKind.F: "#8ecae6", ActionKind.B: "#f4a261", ActionKind.I: "#ffd166", ActionKind.W: "#95d5b2"}
_MEANINGS = {
    ActionKind.F: "F forward",
    ActionKind.B: "B backward",
    ActionKind.I: "I gradients of inputs",
    ActionKind.W: "W gradients of weights",
}


def figures_text(timeline: Timeline) -> str:
    """One line: bubble share, length, and the most live microbatches and visits of every stage."""
    line = f"bubble {timeline.bubble_share:.1%}, makespan {timeline.makespan:g}, peak live microbatches per stage "
    line += " ".join(map(str, timeline.peak_microbatches))
    if timeline.peak_visits != timeline.peak_microbatches:
        line += f", peak live visits {' '.join(map(str, timeline.peak_visits))}"
    return line


def grid_text(schedule: Schedule, timeline: Timeline, width: int = 120) -> str:
    """The schedule over time, a line per stage: `F0`, `B0---` over the columns that it takes, `.` where a stage waits.

    A column is as long as the shortest action that takes time. Actions that take none, or too little for a column, are
    left out and counted below.

    Args:
        schedule: what runs.
        timeline: from `simulate`, for this schedule.
        width: the most characters per line, but one column at least; a longer grid continues in another block.
    """
    unit, num_columns = _columns(timeline)
    spelled = [schedule.spelled(stage) for stage in range(schedule.num_stages)]
    cell = 1 + max((len(name) for names in spelled for name in names), default=1)
    head = len(f"stage {schedule.num_stages - 1}") + 2
    rows = []
    num_hidden = 0
    for stage, names in enumerate(spelled):
        row = [_IDLE.ljust(cell)] * num_columns
        for name, start, end in zip(names, timeline.start[stage], timeline.end[stage], strict=True):
            first, last = round(start / unit), round(end / unit)
            if first == last:
                num_hidden += 1
                continue
            text = name.ljust(cell * (last - first) - 1, "-") + " "
            for column in range(first, last):
                row[column] = text[cell * (column - first) : cell * (column - first + 1)]
        rows.append(row)
    per_block = max(1, (width - head) // cell)
    blocks = []
    for begin in range(0, num_columns, per_block):
        columns = range(begin, min(begin + per_block, num_columns))
        times = "".join((f"{column * unit:g}" if column % 5 == 0 else "").ljust(cell) for column in columns)
        lines = ["time".ljust(head) + times]
        for stage, row in enumerate(rows):
            lines.append(f"stage {stage}".ljust(head) + "".join(row[columns.start : columns.stop]))
        blocks.append("\n".join(line.rstrip() for line in lines))
    if num_hidden:
        blocks.append(f"({num_hidden} actions are too short for a column)")
    return "\n\n".join(blocks) + "\n"


def _columns(timeline: Timeline) -> tuple[float, int]:
    """The time of one column, and how many there are."""
    lengths = [
        end - start
        for starts, ends in zip(timeline.start, timeline.end, strict=True)
        for start, end in zip(starts, ends, strict=True)
        if end - start > 1e-9 * timeline.makespan
    ]
    if not lengths:
        return 1.0, 1
    unit = max(min(lengths), timeline.makespan / _MAX_COLUMNS)
    return unit, round(timeline.makespan / unit)


def grid_svg(schedule: Schedule, timeline: Timeline, width: int = 1200) -> str:
    """The schedule over time as one SVG that needs no other file.

    A row per stage, a box per action with its microbatch, coloured by kind; the boxes of a stage's later visits are
    fainter. Pointing at a box shows the action and its times.

    Args:
        schedule: what runs.
        timeline: from `simulate`, for this schedule.
        width: of the drawing, in pixels.
    """
    left, top, height, gap = 70, 34, 26, 6
    scale = (width - left - 16) / (timeline.makespan or 1.0)
    bottom = top + schedule.num_stages * (height + gap)
    total = bottom + 62
    title = f"{schedule.kind}, {schedule.num_stages} stages, {schedule.num_microbatches} microbatches"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}" viewBox="0 0 {width} {total}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{total}" fill="#ffffff"/>',
        f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for stage, actions in enumerate(schedule.actions):
        y = top + stage * (height + gap)
        parts.append(f'<text x="8" y="{y + 17}">stage {stage}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width - left - 16}" height="{height}" fill="#eeeeee"/>')
        num_visits = 1 + max((action.visit for action in actions), default=0)
        times = zip(timeline.start[stage], timeline.end[stage], strict=True)
        for action, name, (start, end) in zip(actions, schedule.spelled(stage), times, strict=True):
            x, length = left + start * scale, (end - start) * scale
            opacity = 1 - 0.6 * action.visit / num_visits
            parts.append(
                f'<g><title>{name}: {start:g} to {end:g}</title><rect x="{x:.2f}" y="{y}" width="{length:.2f}" '
                f'height="{height}" fill="{_COLOURS[action.kind]}" fill-opacity="{opacity:.2f}" stroke="#555555" '
                'stroke-width="0.5"/>'
            )
            label = str(action.microbatch)
            if length > 7 * len(label) + 2:
                parts.append(f'<text x="{x + length / 2:.2f}" y="{y + 17}" text-anchor="middle">{label}</text>')
            parts.append("</g>")
    x = float(left)
    for kind, meaning in _MEANINGS.items():
        if any(action.kind is kind for actions in schedule.actions for action in actions):
            parts.append(f'<rect x="{x}" y="{bottom + 8}" width="14" height="14" fill="{_COLOURS[kind]}"/>')
            parts.append(f'<text x="{x + 20}" y="{bottom + 20}">{meaning}</text>')
            x += 40 + 7 * len(meaning)
    parts.append(f'<text x="{left}" y="{bottom + 44}">{escape(figures_text(timeline))}</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"
