"""The promised API (docs/specification): what docstrings cite is there."""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

from scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
SPECIFICATION = ROOT / "docs" / "specification"
citations_script = load_script("docs/citations.py")
PAGES = {name: (f"{page}.md", form) for name, (page, form) in citations_script.PAGES.items()}
NUMBER, CITATION = citations_script.NUMBER, citations_script.CITATION
# A source is said in these ways; no other sentence of ours begins with them.
ANNOUNCED = re.compile(r"\b(?:Source|Spec): *")
SOURCES = sorted(path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py"))


def prose(text):
    """The docstrings and comments of a Python file, each on one line."""
    tree = ast.parse(text)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, holders) and (docstring := ast.get_docstring(node)):
            yield " ".join(docstring.split())
    comments = [
        token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    ]
    block, last_line = "", -1
    for token in comments:
        line = token.start[0]
        joined = token.string.lstrip("#: ").strip()
        if line == last_line + 1:
            block += " " + joined
        else:
            yield block
            block = joined
        last_line = line
    yield block


@functools.cache
def texts():
    """(file, docstring or block of comments) for the files that name a page or a source at all."""
    named = re.compile(rf"\b(?:{'|'.join(PAGES)}|smp-semantics)\b|{ANNOUNCED.pattern}")
    sources = [(path, path.read_text()) for path in SOURCES if path != Path(__file__)]
    return [
        (path.relative_to(ROOT), text) for path, source in sources if named.search(source) for text in prose(source)
    ]


def citations(text):
    """(name of the page, anchor) for everything that ``text`` cites."""
    for name, numbers in CITATION.findall(text):
        for number in re.findall(NUMBER, numbers):
            yield name, PAGES[name][1].format(number.replace(".", "-"))


def anchors(page):
    return re.findall(r'<a id="([^"]+)">', (SPECIFICATION / page).read_text())


def test_every_citation_leads_to_an_anchor():
    known = {name: set(anchors(page)) for name, (page, _) in PAGES.items()}
    cited, missing = 0, []
    for path, text in texts():
        for name, anchor in citations(text):
            cited += 1
            if anchor not in known[name]:
                missing.append(f"{path}: {name} has no {anchor}: {text[:80]}")
    assert not missing, "\n".join(missing)
    assert cited > 150, "the search for citations finds too little"


def test_every_source_that_is_announced_is_a_citation():
    wrong = []
    for path, text in texts():
        for start in ANNOUNCED.finditer(text):
            if not CITATION.match(text, start.end()):
                wrong.append(f"{path}: {text[start.start() : start.end() + 60]}")
    assert not wrong, "\n".join(wrong)


def test_pages_named_without_a_section_are_none():
    """ "smp-api" alone, or with a word that the search does not understand, would lead nowhere."""
    wrong = []
    for path, text in texts():
        for start in re.finditer(r"\bsmp-(?:api|config|semantics)\b", text):
            if not CITATION.match(text, start.start()):
                wrong.append(f"{path}: {text[start.start() : start.start() + 60]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", sorted({page for page, _ in PAGES.values()}))
def test_anchors_are_there_once_and_stand_before_their_own_number(page):
    text = (SPECIFICATION / page).read_text()
    names = anchors(page)
    assert len(names) == len(set(names))
    for line, following in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        heading = re.fullmatch(r'<a id="section-([\d-]+)"></a>', line)
        if heading:
            assert re.match(rf"##+ {re.escape(heading[1].replace('-', '.'))}\.? ", following), (line, following)
        item = re.match(r'(\d+)\. <a id="check-(\d+)"></a>', line)
        if item:
            assert item[1] == item[2], line
    # A heading with a number that nobody can cite would be a section lost.
    numbered = re.findall(r"^##+ (\d+(?:\.\d+)*)\.? ", text, re.M)
    assert sorted(numbered) == sorted(
        name.removeprefix("section-").replace("-", ".") for name in names if "section" in name
    )


def test_the_search_for_citations():
    found = list(citations("(smp-api sections 6, 8 and 12), smp-config 5.7. Source: smp-semantics-checks 84."))
    assert found == [
        ("smp-api", "section-6"),
        ("smp-api", "section-8"),
        ("smp-api", "section-12"),
        ("smp-config", "section-5-7"),
        ("smp-semantics-checks", "check-84"),
    ]
    assert list(prose('"""Of a\n\nmodule."""\nx = 1  # one\n# two\n\n# three\n'))[-2:] == ["one two", "three"]
