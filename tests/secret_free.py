"""That nothing a cluster makes of a job holds a secret: what every kind of cluster is tested with.

planted = planted_secrets(monkeypatch, tmp_path)
assert_renders_no_secret(cluster, planted.added_to(job), planted)
"""

from __future__ import annotations

import base64
import json
import re
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from modelparallel.launch.clusters.cluster import Cluster, Rendered
from modelparallel.launch.clusters.description import ClusterJob, node_description

#: What a value may have in it; none of it may come out in another spelling.
ODD = "a'b\"c$d\\e&<f>é\n=#%+/"


@dataclass(frozen=True)
class Planted:
    """Secrets that are there to be read on this machine: name -> value, and name -> reference."""

    values: dict[str, str]
    references: dict[str, str]

    def added_to(self, job: ClusterJob) -> ClusterJob:
        """The job, with these secrets."""
        return replace(job, secrets={**job.secrets, **self.references})


def planted_secrets(monkeypatch: pytest.MonkeyPatch, folder: Path, core: str = "hf_5e11ae0fbad1dea9") -> Planted:
    """One secret in a variable and one in a file."""
    values = {"PLANTED_VARIABLE": f"{core}{ODD}variable", "PLANTED_FILE": f"{core}{ODD}file"}
    monkeypatch.setenv("OUTER_PLANTED", values["PLANTED_VARIABLE"])
    path = folder / "planted"
    path.write_text(values["PLANTED_FILE"] + "\n", encoding="utf-8")
    return Planted(values, {"PLANTED_VARIABLE": "env:OUTER_PLANTED", "PLANTED_FILE": f"file:{path}"})


def spellings(value: str) -> set[bytes]:
    """The forms in which a value, or most of it, may lie in a text."""
    raw = value.encode()
    forms = {raw, json.dumps(value)[1:-1].encode(), json.dumps(value, ensure_ascii=False)[1:-1].encode()}
    forms |= {
        quote(value, safe="").encode(),
        shlex.quote(value).encode(),
        repr(value)[1:-1].encode(),
        raw.hex().encode(),
    }
    # The part that no quoting changes, and base64 at each of the three places where it can begin.
    core = max(re.findall(r"\w+", value), key=len).encode()
    for text in (raw, core):
        for shift in range(3):
            encoded = base64.b64encode(b"\0" * shift + text).rstrip(b"=")
            forms.add(encoded[4 if shift else 0 : -1])
    return forms | {core}


def assert_no_secret(text: str | bytes, values: dict[str, str], what: str = "the text") -> None:
    """Fail if any spelling of any value is in the text."""
    content = text if isinstance(text, bytes) else text.encode(errors="surrogateescape")
    for name, value in values.items():
        for form in spellings(value):
            assert form not in content, f"{what} holds the value of {name} as {form!r}"


def everything_of(rendered: Rendered) -> str:
    """All that a rendering holds, also what `text` leaves out."""
    return "\n".join([rendered.text(), repr(rendered), json.dumps(asdict(rendered), default=str)])


def assert_renders_no_secret(cluster: Cluster, job: ClusterJob, planted: Planted, *records: Any) -> None:
    """Fail if the rendering of the job, its description, or one of the records holds a value of a secret."""
    assert set(planted.references) <= set(job.secrets), "the job does not have the secrets that are looked for"
    assert_no_secret(everything_of(cluster.render(job)), planted.values, f"what {cluster.kind} renders")
    assert_no_secret(node_description(job), planted.values, "job.json")
    for record in records:
        assert_no_secret(json.dumps(asdict(record), default=str), planted.values, "the record")
