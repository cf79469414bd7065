"""The documentation site: every page and every public name is in it (what mkdocs does not look at)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
REFERENCE = "\n".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))
SHOWN = re.findall(r"^::: modelparallel\.([\w.]+)$", REFERENCE, re.M)
COMPATIBILITY = (DOCS / "compatibility.md").read_text()
# Modules whose names have entries of their own; names that are only another name.
MODULES = {"amp", "model", "nn", "optimizers", "patches", "huggingface"}
IN_TEXT = {"WORLD", "MP_GROUP", "DP_GROUP", "TP_GROUP", "PP_GROUP", "RDP_GROUP", "EXIT_PREEMPTED", "__version__"}


def exported(package):
    """``__all__`` of a package, without importing it."""
    tree = ast.parse((ROOT / "src" / "modelparallel" / package / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{package} has no __all__")


@pytest.mark.parametrize("package", ["", "nn", "launch"])
def test_every_public_name_is_in_the_reference(package):
    prefix = f"{package}." if package else ""
    missing = {f"{prefix}{name}" for name in exported(package) if name not in MODULES | IN_TEXT} - set(SHOWN)
    assert not missing
    assert all(name in REFERENCE for name in IN_TEXT)
    assert len(SHOWN) == len(set(SHOWN))


@pytest.mark.parametrize(("page", "prefix"), [("models", "model"), ("optimizers", "optimizer")])
def test_methods_of_the_promised_api_are_in_the_reference(page, prefix):
    members = re.search(r"members: \[(.*?)\]", (DOCS / "reference" / f"{page}.md").read_text(), re.S).group(1)
    rows = re.findall(rf"^\| `{prefix}\.([a-z]\w*)[(`].*?\| (?:same|differs) \|", COMPATIBILITY, re.M)
    assert len(rows) > 15
    assert set(rows) - {"module"} <= set(re.split(r",\s*", members))


def test_files_that_pages_name_exist():
    """From the root of the repository, or from the package; patterns may stand for several."""
    missing = []
    for page in (*ROOT.glob("*.md"), *DOCS.rglob("*.md")):
        text = page.read_text()
        named = re.findall(r"`((?:src|tests|docs|bench|examples)/[\w./-]*)`", text)
        named += re.findall(r"`((?!transformers/)[\w.*-]+/[\w./*-]*\.py)`", text)
        found = [any([*ROOT.glob(path), *(ROOT / "src" / "modelparallel").glob(path)]) for path in named]
        missing += [f"{page.name}: {path}" for path, is_there in zip(named, found, strict=True) if not is_there]
        for module in re.findall(r"python -m (modelparallel[\w.]*)", text):
            path = ROOT / "src" / module.replace(".", "/")
            missing += [] if path.is_dir() or path.with_suffix(".py").exists() else [f"{page.name}: {module}"]
    assert not missing


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[-1]
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert {page for page in pages if page not in navigation} == set()


def test_the_readme_names_every_page():
    readme = (ROOT / "README.md").read_text()
    pages = {path.name for path in DOCS.glob("*.md")}
    assert {page for page in pages if f"docs/{page}" not in readme} == set()


def test_versions_of_the_site_are_pinned():
    extra = re.search(r"^docs = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S).group(1)
    packages = re.findall(r'"([^"]+)"', extra)
    assert packages and all(re.fullmatch(r"[\w-]+(\[\w+\])?==[\d.]+", package) for package in packages)
