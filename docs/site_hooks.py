"""What the documentation site needs beside mkdocs: pages from the root, links, citations, a last check of all links.

The pages of docs/ are written to be read in the repository. Here links to files that are no page of the site become
plain text, "smp-api section 5" becomes a link to that section, and every link of the built site is followed.
"""

import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import griffe
from citations import CITATION, NUMBER, PAGES
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Pages of the site that lie outside of docs/: their place in the site, and in the repository.
ROOT_PAGES = {"index.md": "README.md", **{name: name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}}
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository's root."""
    for place, path in ROOT_PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between files of the repository become links between pages; those to other files, plain text."""
    place = page.file.src_uri
    source = ROOT_PAGES.get(place, f"docs/{place}")
    pages = {ROOT_PAGES.get(file.src_uri, f"docs/{file.src_uri}"): file.src_uri for file in files}

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        parts = urlsplit(target)
        if parts.scheme or not parts.path:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), parts.path))
        if path not in pages:
            if not (ROOT / path).exists():
                raise PluginError(f"{source}: the link to {target} leads nowhere")
            return text
        anchor = f"#{parts.fragment}" if parts.fragment else ""
        return f"[{text}]({posixpath.relpath(pages[path], posixpath.dirname(place) or '.')}{anchor})"

    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in _fences(markdown))


def _fences(markdown: str) -> list[str]:
    """The text in pieces; blocks of code are pieces that begin with their fence."""
    return re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Citations of the specification, and pages that are named, become links in the reference."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    up = posixpath.relpath(".", page.url.rstrip("/") or ".")

    def link(match: re.Match[str]) -> str:
        where, form = PAGES[match[1]]
        first, *rest = re.split(r"(?<=\d)(?=, | and )", match[0])
        parts = []
        for part in (first, *rest):
            number = re.search(rf"{NUMBER}$", part)
            assert number is not None, part
            anchor = form.format(number[0].replace(".", "-"))
            before = re.match(r"(?:, and |, | and )?", part)
            assert before is not None
            parts.append(f'{before[0]}<a href="{up}/specification/{where}/#{anchor}">{part[before.end() :]}</a>')
        return "".join(parts)

    html = re.sub(r"\bdocs/(\w+)\.md\b", rf'<a href="{up}/\1/">docs/\1.md</a>', html)
    return CITATION.sub(link, html)


class PlainDocstrings(griffe.Extension):
    """Docstrings without the roles of Sphinx, which name something that is code."""

    def on_instance(self, *, node: Any, obj: griffe.Object, agent: Any, **kwargs: Any) -> None:
        """Of each object that has a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":\w+:`~?([\w.()]+)`", r"`\1`", obj.docstring.value).replace("``", "`")


class _Links(HTMLParser):
    """The links of a page, and what can be linked to in it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        for name, value in attrs:
            if value and (name == "id" or (tag == "a" and name == "name")):
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.links.append(value)


def on_post_build(config: Any) -> None:
    """Follow every link inside the site, those in docstrings and citations, too."""
    dead = list(_dead_links(Path(config.site_dir)))
    if dead:
        raise PluginError("dead links:\n" + "\n".join(dead))


def _dead_links(site: Path) -> Iterator[str]:
    pages: dict[Path, _Links] = {}
    for path in site.rglob("*.html"):
        pages[path] = _Links()
        pages[path].feed(path.read_text())
    for path, found in pages.items():
        if path.name == "404.html":
            continue  # its links are absolute, since it is shown at any address
        for target in found.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or target.startswith(("/", "data:")):
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            is_missing = not place.exists() or (
                bool(parts.fragment) and place in pages and unquote(parts.fragment) not in pages[place].anchors
            )
            if is_missing and not parts.fragment.startswith("__"):
                yield f"{path.relative_to(site)}: {target}"
