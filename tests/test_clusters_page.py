"""docs/clusters.md shows what is submitted today."""

from scripts import load_script

rendering = load_script("docs/render_clusters.py")


def test_the_page_shows_what_the_launch_files_become():
    page = rendering.PAGE.read_text(encoding="utf-8")
    assert rendering.updated(page) == page, "what is submitted has changed: run python docs/render_clusters.py"
    for title, *_ in rendering.CLUSTERS:
        assert f"### {title}" in page
