"""`modelparallel explain <job folder>`: one story of what the ranks of a failed job wrote down.

It reads `events/rank<rank>.jsonl` (what each rank did last and waited for; see training/event_files.py) and `status/`
(who started, ended or failed, also outside the steps). A rank may have left nothing: a killed one cannot write. What
cannot be read (files that are cut off or changed) is left out and counted, and nothing that stands in a file reaches a
terminal as a command.

Of a job on several hosts each has a part of that, in one folder that they share or in one of each; told are all parts
together, with times by the clock of node 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelparallel.errors import LaunchError
from modelparallel.errors.foreign_text import one_line, parse_json, printable
from modelparallel.launch.attempts import read_attempts
from modelparallel.launch.folder import JobFolder

# What an error is that only passes on the failure of another rank.
_PASSED_ON = re.compile(
    r"the connection is gone|since the step of pp_rank|connection failed|closed by peer|reset by peer"
)
# The lines in the text of a DivergenceError: "took train.py:31 (event 5: ...)", or of waits "(train.py:31)".
_TAKEN = re.compile(r"took (\S+\.py:\d+[^()]*) \(event|\(([^()]*\S+\.py:\d+)\)")
_STANDS = re.compile(r"\S+\.py:\d+")
_NUM_EVENTS = 6
#: What is more than this in a file is not of a job.
_MOST_BYTES, _MOST_TEXT, _MOST_RANKS = 64 << 20, 100_000, 100_000
_RANK_FILE = re.compile(r"rank_?(\d+)\.")


@dataclass
class RankStory:
    """What is known of one rank. ``records`` are those of its event file, by kind."""

    global_rank: int
    has_started: bool = False
    has_finished: bool = False
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    status_error: dict[str, Any] | None = None
    num_unreadable: int = 0
    host: str = ""
    clock_ahead: float = 0.0

    @property
    def head(self) -> Mapping[str, Any]:
        """Its record of itself; empty if it wrote none."""
        return self.records.get("rank", [{}])[0]

    @property
    def error(self) -> dict[str, Any] | None:
        """Its failure: type, text, line, time."""
        if "error" in self.records:
            error = self.records["error"][0]
            return {**error, "time": error["time"] - self.clock_ahead}
        if self.status_error is None or self.status_error.get("is_interrupt"):
            return None
        kind, _, text = self.status_error["summary"].partition(": ")
        lines = re.findall(r'File "([^"]+)", line (\d+)', self.status_error["traceback"])
        line = f"{Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else "unknown line"
        return {"type": kind, "text": text, "line": line, "time": self.status_error["time"] - self.clock_ahead}

    @property
    def is_silent(self) -> bool:
        """Whether it began and then left no word of how it ended."""
        return self.error is None and not self.has_finished

    def __str__(self) -> str:
        pp_rank = self.head.get("pp_rank")
        more = [*([] if pp_rank is None else [f"pp_rank {pp_rank}"]), *([self.host] if self.host else [])]
        return f"rank {self.global_rank}" + (f" ({', '.join(more)})" if more else "")


def explain(*folders: JobFolder) -> str:
    """The story of the job in ``folders``, one or, if its hosts share no files, that of each; of its latest attempt, if
    it was started again.

    Raises LaunchError if there is no job, or parts of several.
    """
    return printable("\n".join([_explain_attempt(folders), *_earlier_attempts(folders)]))


def _earlier_attempts(folders: Sequence[JobFolder]) -> list[str]:
    attempts = next(filter(None, map(read_attempts, folders)), ())
    told = []
    for attempt in attempts:
        roots = [str(root) for folder in folders if (root := folder.attempt(attempt.number).root).exists()]
        if roots:
            told.append(f"  {attempt}; more: modelparallel explain {' '.join(roots)}")
    return ["", "it was started again after:", *told] if told else []


def _explain_attempt(folders: Sequence[JobFolder]) -> str:
    parts = [part for folder in folders for part in folder.of_nodes()]
    places = ", ".join(str(folder.root) for folder in folders)
    stories = _read(parts, places)
    errors = {rank: story.error for rank, story in stories.items() if story.error is not None}
    unreadable = [f"  {story}: {story.num_unreadable}" for story in stories.values() if story.num_unreadable]
    if unreadable:
        unreadable = ["", "records that cannot be read, and are left out:", *unreadable]
    if not errors and not any(story.is_silent for story in stories.values()):
        lines = [f"job in {places}: no rank has written down a failure", *_said_by_launcher(parts)]
        return "\n".join([*lines, *unreadable])
    lines = [f"job in {places}: {len(stories)} ranks, {len(errors)} of them with an error", *_said_by_launcher(parts)]
    first = _first(stories)
    lines += ["", *_what_was_first(stories, first)]
    lines += ["", "what the ranks waited for:", *_waits(stories)]
    lines += ["", "errors, in the order of time:", *_errors(stories)]
    if first is not None:
        lines += _last_events(stories[first])
    return "\n".join([*lines, *unreadable])


def _said_by_launcher(parts: Sequence[JobFolder]) -> list[str]:
    """The first line of what the launchers of several hosts agreed on: that a host was lost is in no rank's file."""
    if len(parts) < 2:
        return []
    texts = [_text_of(JobFolder(part.root).failure_file) for part in parts]
    said = next((text for text in texts if text and text.strip()), "")
    return [f"the launchers said: {one_line(said.strip().splitlines()[0])}"] if said else []


def _read(parts: Sequence[JobFolder], places: str) -> dict[int, RankStory]:
    homes: dict[int, _Home] = {}
    for part in parts:
        home = _Home(part)
        for rank in home.ranks:
            if rank in homes and len(parts) > 1:
                raise LaunchError(f"rank {rank} is in {homes[rank].folder.root} and in {part.root}: these are two jobs")
            homes[rank] = home
    ranks = set(homes)
    if not ranks:
        raise LaunchError(
            f"{places} holds no job: name the folder that `modelparallel run` printed as 'folder ...' (--job-dir)"
        )
    stories: dict[int, RankStory] = {}
    while missing := ranks - stories.keys():
        for rank in missing:
            stories[rank] = _read_rank(homes.get(rank, _Home(parts[0])), rank)
            ranks.update(stories[rank].head.get("pipeline", ()))
    return dict(sorted(stories.items()))


class _Home:
    """Where the files of some ranks are: of those of a host, or of all."""

    def __init__(self, folder: JobFolder) -> None:
        self.folder = folder
        said = _parsed(_text_of(folder.description))
        said = said if isinstance(said, dict) else {}
        num_devices = said.get("num_devices")
        first = said.get("first_rank", 0)
        is_known = _is_rank(num_devices) and _is_rank(first)
        self.ranks = set(range(first, first + num_devices)) if is_known else set()
        for directory, pattern in ((folder.events, "rank*.jsonl"), (folder.status, "rank_*.json")):
            for path in directory.glob(pattern) if directory.is_dir() else ():
                match = _RANK_FILE.match(path.name)
                if match is not None and _is_rank(int(match[1])):
                    self.ranks.add(int(match[1]))
        host, ahead = said.get("host", ""), said.get("clock_ahead", 0.0)
        self.host = one_line(host) if _is_text(host) else ""
        self.clock_ahead = float(ahead) if _is_time(ahead) else 0.0


def _read_rank(home: _Home, rank: int) -> RankStory:
    folder = home.folder
    story = RankStory(rank, host=home.host, clock_ahead=home.clock_ahead)
    story.has_started = folder.started_file(rank).exists()
    story.has_finished = folder.finished_file(rank).exists()
    if (text := _text_of(folder.error_file(rank))) is not None:
        story.status_error = _cleaned(_parsed(text), _STATUS)
        story.num_unreadable += story.status_error is None
    lines = (_text_of(folder.event_file(rank)) or "").splitlines()
    for line in lines:
        record = _parsed(line)
        kind = record.get("kind") if isinstance(record, dict) else None
        cleaned = _cleaned(record, _RECORDS[kind]) if isinstance(kind, str) and kind in _RECORDS else None
        if cleaned is None:
            story.num_unreadable += 1
        else:
            story.records.setdefault(str(kind), []).append(cleaned)
    if not lines and folder.event_file(rank).exists():
        story.num_unreadable += 1
    _drop_strangers(story)
    return story


def _drop_strangers(story: RankStory) -> None:
    """Leave out waits for stages that the rank's pipeline does not have, which a damaged file may name."""
    pipeline = story.head.get("pipeline", ())
    waits = story.records.pop("wait", [])
    kept = [wait for wait in waits if wait["source"] < len(pipeline)]
    story.num_unreadable += len(waits) - len(kept)
    if kept:
        story.records["wait"] = kept


def _text_of(path: Path) -> str | None:
    """What is in the file, as far as it is text; None where there is no file that can be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode(errors="backslashreplace")
    except OSError:
        return None


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else parse_json(text)
    except ValueError:
        return None


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_RANKS


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e12 < value < 1e12


def _is_pipeline(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MOST_RANKS and all(map(_is_rank, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


# The fields that a story needs, and what each has to be. A record that lacks one is not told.
_Fields = Mapping[str, Callable[[Any], bool]]
_STATUS: _Fields = {"time": _is_time, "summary": _is_text, "traceback": _is_text}
_RECORDS: Mapping[str, _Fields] = {
    "rank": {"global_rank": _is_rank, "pp_rank": _is_rank, "pipeline": _is_pipeline, "call": _is_number},
    "event": {"microbatch": _is_number, "number": _is_number, "text": _is_text, "line": _is_text, "time": _is_time},
    "wait": {
        "source": _is_rank, "microbatch": _is_number, "what": _is_text, "line": _is_text, "seconds": _is_time,
    },
    "peer": {"pp_rank": _is_rank, "text": _is_text},
    "error": {"type": _is_text, "text": _is_text, "line": _is_text, "time": _is_time},
}  # fmt: skip
#: Texts of several lines; the lines of all others are told as one.
_OF_LINES = frozenset({"text", "summary", "traceback"})


def _cleaned(record: Any, wanted: _Fields) -> dict[str, Any] | None:
    """The record with texts that can be shown; None if a field is missing or is not what it has to be."""
    if not isinstance(record, dict) or not all(name in record and fits(record[name]) for name, fits in wanted.items()):
        return None
    return {
        name: (printable(value[:_MOST_TEXT]) if name in _OF_LINES else one_line(value))
        if isinstance(value, str)
        else value
        for name, value in record.items()
    }


def _first(stories: Mapping[int, RankStory]) -> int | None:
    """The rank that the failure came from: one that died without a word and that others miss, else the first error that
    does not only pass on another's.
    """
    own: list[tuple[bool, float, int]] = []
    missed = _missed(stories)
    for rank, story in stories.items():
        error = story.error
        if error is None:
            continue
        own.append((_is_passed_on(error), error["time"], rank))
    if own and not min(own)[0]:
        return min(own)[2]
    silent = [rank for rank in missed if stories[rank].is_silent]
    if silent:
        return silent[0]
    return min(own)[2] if own else None


def _is_passed_on(error: Mapping[str, Any]) -> bool:
    return bool(_PASSED_ON.search(_head(error["text"])))


def _missed(stories: Mapping[int, RankStory]) -> list[int]:
    """Global ranks that others waited for, most wanted first."""
    counts: dict[int, int] = {}
    for story in stories.values():
        for wait in story.records.get("wait", []):
            source = story.head["pipeline"][wait["source"]]
            counts[source] = counts.get(source, 0) + 1
    return sorted(counts, key=lambda rank: -counts[rank])


def _what_was_first(stories: Mapping[int, RankStory], first: int | None) -> list[str]:
    if first is None:
        silent = ", ".join(str(story) for story in stories.values() if story.is_silent)
        return [f"left no word: {silent}; they were killed, or still run"]
    story, error = stories[first], stories[first].error
    if error is None:
        return [
            f"first: {story} ended without a word: it was killed (by hand, or because memory ran out) or crashed; it "
            "has no event file. The others missed it. Look at its log and at the system's (dmesg)."
        ]
    lines = [f"first: {story} failed{_in_call(story)} at {error['line']}: {error['type']}: {_head(error['text'])}"]
    named = list(dict.fromkeys(one or two for one, two in _TAKEN.findall(_head(error["text"]))))
    if error["type"] == "DivergenceError" and named:
        lines.append(f"look at {' and at '.join(named)}: the ranks went different ways there")
    elif error["type"] == "WaitTimeoutError" and (slow := _where_awaited_stood(story)):
        lines.append(f"look at {slow}")
    else:
        lines.append(f"look at {error['line']}")
    return lines


def _where_awaited_stood(story: RankStory) -> str:
    """The line that the stage was at that the rank waited for."""
    sources = {wait["source"] for wait in story.records.get("wait", [])}
    for record in story.records.get("peer", []):
        line = _STANDS.search(record["text"])
        if record["pp_rank"] in sources and line is not None:
            return f"{line.group().lstrip('(')}, where pp_rank {record['pp_rank']} was"
    return ""


def _in_call(story: RankStory) -> str:
    return f" in call {story.head['call']} of a step function," if "call" in story.head else ""


def _waits(stories: Mapping[int, RankStory]) -> list[str]:
    lines = []
    for story in stories.values():
        if not story.records:
            state = "it finished" if story.has_finished else "a killed rank cannot write one"
            lines.append(f"  {story}: no event file" + (f" ({state})" if story.error is None else ""))
            continue
        waits = story.records.get("wait", [])
        if not waits:
            lines.append(f"  {story}: for nothing")
        for wait in waits[:1]:
            source = story.head["pipeline"][wait["source"]]
            more = f", or for {len(waits) - 1} other messages" if len(waits) > 1 else ""
            lines.append(
                f"  {story}{_in_call(story)} microbatch {wait['microbatch']}: {wait['seconds']:.1f} s for "
                f"{wait['what']} from {stories[source]} ({wait['line']}){more}"
            )
    return lines


def _errors(stories: Mapping[int, RankStory]) -> list[str]:
    failed = [(story.error["time"], story, story.error) for story in stories.values() if story.error is not None]
    if not failed:
        return ["  none was written down"]
    failed.sort(key=lambda item: item[0])
    start = failed[0][0]
    return [
        f"  +{moment - start:.3f} s {story}: {error['type']}: {_head(error['text'])}"
        + (" [passes on another rank's failure]" if _is_passed_on(error) else "")
        for moment, story, error in failed
    ]


def _last_events(story: RankStory) -> list[str]:
    events: Sequence[Mapping[str, Any]] = sorted(story.records.get("event", []), key=lambda event: event["time"])
    if not events:
        return []
    lines = ["", f"the last events of {story}:"]
    for event in events[-_NUM_EVENTS:]:
        lines.append(f"  microbatch {event['microbatch']}, event {event['number']}: {event['text']} ({event['line']})")
    return lines


def _head(text: str) -> str:
    """The message without the list of events that follows it."""
    text = re.split(r"\s*\nlast events of|\s*\nno events yet in this step", text)[0]
    return re.sub(r"\n\s*", "; ", re.sub(r":\n\s*", ": ", text))
