"""The documentation as a site: whatever works on GitHub works there, and nothing is fetched."""

import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import LINK, prose
from tests.helpers import ROOT

FETCHED = re.compile(
    r"""<(?:link|script|img|iframe|source)\b[^>]*\b(?:href|src)=["']?(?:https?:)?//[^"'> ]+"""
    r"""|url\(["']?(?:https?:)?//[^)]+\)"""
)
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of a site that was built strictly: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def place(page):
    """Return where a page lies on the site."""
    relative = page.relative_to(ROOT / "docs").with_suffix("")
    folder = relative.parent if relative.name in ("index", "README") else relative
    return folder / "index.html"


def test_every_page_is_on_the_site(site):
    assert [page for page in PAGES if not (site / place(page)).is_file()] == []
    assert not list(site.rglob("*.py"))


def test_nothing_is_fetched_from_elsewhere(site):
    texts = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(texts) > len(PAGES)
    found = {match for text in texts for match in FETCHED.findall(text.read_text(encoding="utf-8"))}
    assert {text for text in found if "<link" not in text or "canonical" not in text} == set()


def test_no_page_links_out_of_the_site():
    """Beside docs/ there is the repository, which a site doesn't have."""
    for page in PAGES:
        for link in LINK.findall(prose(page)):
            if not link.startswith(("http:", "https:", "mailto:", "#")):
                target = (page.parent / link.partition("#")[0]).resolve()
                assert target.is_relative_to(ROOT / "docs"), f"{page}: {link}"
