"""The whole page: complete, alone, the same each time, readable for all, never an error."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.errors import OutputError
from qtool.report.page import bit_map, render
from qtool.report.page.drawing import COLORS
from qtool.report.page.evidence import Evidence
from qtool.report.page.parts import PageSection, Picture
from qtool.report.page.reading import read_evidence
from qtool.report.page.side_by_side import side_by_side_section

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = {"meta", "br", "wbr", "link", "img", "hr"}


class Tree(HTMLParser):
    """Elements of a page in order: (tag, attributes, tags above it)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, *tags: str):
        return [(attributes, above) for tag, attributes, above in self.elements if tag in tags]


@pytest.fixture(scope="module")
def evidence(whole) -> Evidence:
    return read_evidence(whole)


@pytest.fixture(scope="module", params=[1, 3])
def text(request, evidence) -> str:
    return render.page([evidence] * request.param).decode()


def test_a_run_with_everything_has_every_section(evidence):
    found = render.page([evidence]).decode()
    assert "Not in this report" not in found
    links = [attributes["href"] for attributes, _ in Tree(found).all("a")]
    assert links == [f"#run1-{name}" for name in render.BUILDERS]


def test_page_is_alone_and_small(text):
    assert len(text.encode()) < 2_000_000
    tree = Tree(text)
    assert not tree.all("script", "link", "iframe", "object", "embed", "img")
    for tag, attributes, _ in tree.elements:
        for name, value in attributes.items():
            assert not re.search(r"(https?:)?//", value or ""), (tag, name)
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src") or name.endswith(":href"):
                assert (value or "").startswith("#"), (tag, value)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_page_of_many_experts_is_small_too(evidence):
    kinds = [f"mlp.experts.{expert}.up_proj" for expert in range(128)]
    names = [f"model.layers.{block}.{kind}" for block in range(60) for kind in kinds]
    layer = evidence.layers[0]
    report = {**evidence.report, "layers": [{**layer, "name": name} for name in names]}
    entry = next(iter(evidence.manifest.layers.values()))
    manifest = replace(evidence.manifest, layers=dict.fromkeys(names, entry))
    curves = {name: [(step, 1.0) for step in range(1000)] for name in names[:60]}
    many = replace(evidence, report=report, manifest=manifest, curves=curves)
    assert len(render.page([many])) < 1_500_000


def test_same_runs_give_the_same_bytes(evidence):
    assert render.page([evidence, evidence]) == render.page([evidence, evidence])


def test_names_are_unique_and_point_somewhere(text):
    elements = Tree(text).elements
    ids = [attributes["id"] for _, attributes, _ in elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    for _, attributes, _ in elements:
        for name in ("aria-labelledby", "aria-describedby"):
            wanted |= set((attributes.get(name) or "").split())
    assert wanted <= set(ids)


def test_headings_go_down_by_one_and_there_is_one_title(text):
    levels = [int(tag[1]) for tag, _, _ in Tree(text).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_tables_and_drawings_say_what_they_are(text):
    tree = Tree(text)
    assert all(attributes.get("scope") in ("row", "col") for attributes, _ in tree.all("th"))
    assert len(tree.all("caption")) == len(tree.all("table")) > 10
    drawings = tree.all("svg")
    assert len(drawings) >= 6
    for attributes, above in drawings:
        assert attributes["role"] == "img"
        assert attributes["aria-labelledby"]
        assert "figure" in above
    scrolling = [attributes for attributes, _ in tree.all("div") if "tabindex" in attributes]
    assert all(attributes["aria-label"] for attributes in scrolling)
    assert 'lang="en"' in text


def test_drawings_take_all_their_colours_from_the_page(text):
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing))
        assert colours <= {*COLORS.values(), "none"}, colours
        assert "font-family" not in drawing


UNITS = re.compile(
    r"number|, (s|MB|%|tokens|GB/s|nats per token|share of .*|% of .*|MB)$|per (weight|token)|"
    r"unit|steps|bits|task|share"
)


def test_every_axis_has_a_unit(evidence):
    import matplotlib.figure

    seen = []
    built = [build(evidence) for build in render.BUILDERS.values()]
    built.append(side_by_side_section([evidence] * 2))
    for section in built:
        assert isinstance(section, PageSection), section
        for part in section.parts:
            if isinstance(part, Picture):
                axes = matplotlib.figure.Figure().add_subplot()
                part.paint(axes)
                for label in (axes.get_xlabel(), axes.get_ylabel()):
                    assert UNITS.search(label), (part.title, label)
                assert part.title
                assert part.description.endswith(".")
                seen.append(part.title)
    assert len(set(seen)) >= 9


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_in_both_themes():
    css = (Path(render.__file__).parent / "page.css").read_text()
    sets = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in css.split(":root")[1:]]
    assert len(sets) == 3  # light, dark, print
    for colours in sets:
        for back in ("page", "card"):
            for front in ("ink", "soft", "link"):
                assert contrast(colours[front], colours[back]) >= 4.5, (front, back)
        series = [colours[f"s{number}"] for number in range(1, 8)]
        assert all(contrast(one, colours["page"]) >= 4.5 for one in series)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_cells_of_the_map_can_be_read(bits):
    cell = bit_map._cell((bits,))
    assert cell.text == str(bits)
    assert contrast(cell.background, cell.ink) >= 4.5


def only_painted(_key, _title, paint) -> str:
    """Stand for a drawing: what takes a second is to write it."""
    import matplotlib.figure

    paint(matplotlib.figure.Figure().add_subplot())
    return "<svg></svg>"


FILES = ("config.json", "quantization_report.json", "tuning.jsonl", "tasks.json", "kernels.json")


@pytest.mark.parametrize("name", [*FILES, *(f"run/{n}.json" for n in ("run", "text", "bench"))])
@pytest.mark.parametrize("damage", [None, b"", b"{", b"[]", b'{"of": 1}\n', b"\xff\xfe", b"null"])
def test_what_is_missing_or_damaged_is_left_out_with_a_sentence(
    whole, tmp_path, monkeypatch, name, damage
):
    monkeypatch.setattr(render, "draw", only_painted)
    shutil.copytree(whole, tmp_path / "out")
    if damage is None:
        (tmp_path / "out" / name).unlink()
    else:
        (tmp_path / "out" / name).write_bytes(damage)
    found = render.page([read_evidence(tmp_path / "out")]).decode()
    Tree(found)
    if name in ("config.json", "quantization_report.json"):
        assert "Not in this report" in found


def nodes(value, path=()):
    yield path
    held = dict(enumerate(value)) if isinstance(value, list) else value
    for key, child in held.items() if isinstance(held, dict) else ():
        yield from nodes(child, (*path, key))


ODD = st.sampled_from([None, "text", "$x$ <b>", -1, 0, 1e308, 7, [], {}, [1], {"a": None}, True])


def changed(data: st.DataObject, evidence: Evidence) -> Evidence:
    """Return evidence with up to three odd values in one of its files."""
    field = data.draw(st.sampled_from(["report", "texts", "tasks", "kernels", "speeds", "verdict"]))
    values = json.loads(json.dumps(getattr(evidence, field)))
    places = [path for path in nodes(values) if path]
    for path in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        try:
            inner = values
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = data.draw(ODD)
        except (KeyError, TypeError, IndexError):  # an earlier change has cut it off
            continue
    return replace(evidence, **{field: values})


@given(data=st.data())
def test_no_content_of_a_file_ends_in_an_error(evidence, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "draw", only_painted)
        Tree(render.page([changed(data, evidence), Evidence(name="other")]).decode())


@settings(max_examples=5)
@given(data=st.data())
def test_no_number_ends_a_drawing_in_an_error(evidence, data):
    Tree(render.page([changed(data, evidence)]).decode())


def test_names_are_text_and_never_markup(evidence):
    name = '<script>alert("1")</script> $\\frac{'
    curves = {name: [(0, 1.0), (1, 0.5)]}
    found = render.page([replace(evidence, name=name, curves=curves)] * 2).decode()
    assert "<script" not in found
    Tree(found)


def test_directory_with_nothing_of_ours_is_refused(tmp_path):
    with pytest.raises(OutputError, match="nothing of a run"):
        read_evidence(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "notes.json").write_text('{"figures": 3, "rows": {}}')
    with pytest.raises(OutputError, match="nothing of a run"):
        read_evidence(tmp_path)
    with pytest.raises(OutputError, match="No directory"):
        read_evidence(tmp_path / "none")
