"""The HTML pages: read back with a parser, held against the files and models they describe, and opened in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from compare import read
from compare_report import comparisons
from compare_report import report as compared
from conftest import make_tokenizer, start_no_process, tiny
from matplotlib.figure import Figure
from typer.testing import CliRunner

import basis_select as bs
from basis_select.cli import app
from basis_select.evaluation import figures, html, spectra
from basis_select.evaluation.report import HEAD, cells
from basis_select.layers.group import groups, table_of
from basis_select.run import pipeline
from basis_select.run import recipe as recipes
from basis_select.run.report import SECTIONS_OF_A_RUN, report
from basis_select.selection import Rule, of_groups
from basis_select.sizes import layer_table
from basis_select.target import target

REPO = Path(__file__).parents[1]
ODD = 'plain <i>&"$x_1$'  # a name that HTML and TeX would take for their own
VOID = {"meta", "wbr", "br"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """Tags with their attributes and the text under them; raises AssertionError on a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.tables = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def text(self):
        return "".join(self.texts)

    def headings(self):
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


def checked(text):
    """The page, if it is well-formed, needs nothing from elsewhere, and can be followed by who does not see it."""
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "img", "iframe")
        for key, value in attrs.items():
            assert not key.startswith("on")
            assert not re.search(r"\w+://", value or "") or key in ("title", "aria-label")
            if key == "href":
                assert value[1:] in ids
            for reference in re.findall(r"url\(#([^)]+)\)", value or ""):
                assert reference in ids
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    drawn = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawn)
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    assert [tag for tag, _ in page.tags].count("caption") == len(page.tables)
    assert len(text) < 2e6
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of all stages on a tiny model, with a row of an odd name, and prompts that look like HTML."""
    folder = tmp_path_factory.mktemp("report")
    bs.save(tiny(tied=True), make_tokenizer(), folder / "model")
    lines = [{"prompt": f"<b>{a}&amp;{b}</b>=", "response": str(a)} for a in range(12) for b in range(6)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "model": str(folder / "model"),
        "task": str(folder / "data.jsonl"),
        "data": {"test": 12, "validation": 8},
        "tune": {"steps": 30, "batch_size": 16, "lr": 5e-3},
        "decompose": {"examples": 8, "embedding": True},
        "learn": {"steps": 6, "batch_size": 8, "rounds": 3, "lr": 0.3},
        "prune": {"keep": 0.4, "keep_embedding": 0.5, "multiple_of": 2},
        "extend": {"rank": 2},
        "heal": {"steps": 2, "batch_size": 8},
        "compare": {ODD: {"decompose.metric": "plain", "learn.steps": 0, "prune.score": "magnitude"}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    with pytest.MonkeyPatch.context() as patch:
        start_no_process(patch)
        pipeline.run(recipes.read(folder / "tiny.yaml"), folder / "run")
    return folder / "run"


def stages(run, row):
    history = json.loads((run / "results.json").read_text())[row]["stages"]
    return {s["stage"].rpartition("-")[0]: run / "stages" / s["stage"] for s in history}


@pytest.mark.slow
def test_a_run_leaves_a_page_with_every_section_and_the_numbers_of_its_results(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    page, results = checked(text), json.loads((run / "results.json").read_text())
    assert page.headings() == [re.sub(r"\W+", "-", heading.lower()) for heading in SECTIONS_OF_A_RUN]
    rows = next(table for table in page.tables if table[0] == list(HEAD))
    assert rows[1:] == [cells(name, row) for name, row in results.items()]
    measures = {line[0]: line[1:] for line in page.tables[0]}
    for key, form in (("accuracy", "{:.1%}"), ("nll", "{:.3f}")):
        shown = measures["response NLL" if key == "nll" else key]
        for name, cell in zip(("parent", "result"), shown, strict=False):
            x = results[name][key]
            assert cell == "{} ({} to {})".format(*(form.format(x[k]) for k in ("value", "low", "high")))
    sizes = {name: results[name]["sizes"] for name in ("parent", "result")}
    assert measures["bases"][:2] == [f"{s['bases']:,}" for s in sizes.values()]
    assert measures["bases"][2] == f"{sizes['parent']['bases'] / sizes['result']['bases']:.2f}x fewer"
    for hash_ in (row["weights_sha256"] for row in results.values()):
        assert hash_ in page.text()


@pytest.mark.slow
def test_names_and_prompts_are_text_not_html(run):
    page = checked((run / "report.html").read_text(encoding="utf-8"))
    assert not {"b", "i"} & {tag for tag, attrs in page.tags if not attrs} - {"b"}
    assert page.text().count(ODD) >= 5  # in tables and in figures
    items = html.items("3 lost", [{"prompt": "<b>1&amp;2</b>", "expected": "x" * 3000}] * 3, limit=2, clip=100)
    page = Page(items)
    assert "<b>1&amp;2</b>" in page.text()
    assert "and 1 more" in page.text()
    assert "x" * 100 in page.text()
    assert "x" * 101 not in page.text()


@pytest.mark.parametrize(
    "block",
    [
        lambda x: html.table([x, "b"], [[x, f"({x})"]], "lr", x),
        lambda x: html.bars([x, "b"], [(x, x, 1.0, 0.5, 2.0)], x),
        lambda x: html.heat([{"name": f"a.0.{x}", "rank": 1, "full": 2, "leader": x}], [], x),
        lambda x: html.heat([], [{"name": x, "rank": None, "full": 2, "leader": None}], x),
        lambda x: html.items(x, [{x: x}]),
        lambda x: html.details(x, x),
        lambda x: html.figures((x, x)),
        lambda x: html.code(x),
        lambda x: html.facts([(x, x)]),
        lambda x: html.paragraph(x),
        lambda x: html.page(x, x, x, [(x, x, [x])], [(x, x)]),
    ],
)
def test_no_text_becomes_a_tag_or_an_attribute(block):
    odd = "<hr onclick='x'>&amp;\" onload=\"x"
    page = Page(block(odd))
    assert "hr" not in {tag for tag, _ in page.tags}
    assert not {"onclick", "onload"} & {name for _, attrs in page.tags for name in attrs}
    shown = re.sub(r"\s+", " ", page.text()) + "".join(
        value or "" for _, attrs in page.tags for value in attrs.values()
    )
    assert odd in shown


def test_a_name_looks_alike_on_all_axes_of_a_figure():
    axes, point = Figure().subplots(1, 2), [(1e6, 1.0, 0.9, 1.1)]
    names = ["parent", "int4", "default"]
    figures.quality(axes[0], dict.fromkeys(names, point), "NLL", names=names)
    figures.quality(axes[1], dict.fromkeys(["default", "parent"], point), "NLL", names=names)
    first, second = (
        {
            name: (bar[0].get_color(), bar[0].get_marker())
            for bar, name in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        for ax in axes
    )
    assert len(set(first.values())) == 3
    assert second == {name: first[name] for name in ("default", "parent")}


@pytest.mark.slow
def test_gained_and_lost_items_are_those_of_the_paired_comparison(run):
    results = json.loads((run / "results.json").read_text())
    page = checked((run / "report.html").read_text(encoding="utf-8"))
    moved = {n: row["paired"] for n, row in results.items() if row["paired"]}
    for name, paired in moved.items():
        for kind in ("gained", "lost"):
            assert (f"{name}: {paired[kind]} {kind}" in page.texts) == (paired[kind] > 0)
    assert page.texts.count("expected") == sum(paired["gained"] + paired["lost"] for paired in moved.values())


@pytest.mark.slow
def test_the_recipe_shown_repeats_the_run(run, tmp_path):
    page = checked((run / "report.html").read_text(encoding="utf-8"))
    short, full = (t for t in page.texts if t.startswith("model:"))
    for text in (short, full):
        (tmp_path / "recipe.yaml").write_text(text)
        assert recipes.read(tmp_path / "recipe.yaml") == recipes.read(run.parent / "tiny.yaml")
    assert len(short.splitlines()) < len(full.splitlines()) / 2


@pytest.mark.slow
@pytest.mark.parametrize("row", ["result", ODD])
def test_the_map_has_the_ranks_of_the_model(run, row):
    model = bs.load(stages(run, row)["save"] / "model")[0]
    found = stages(run, row)
    modules, extra = spectra.layers(spectra.bases_of(found["decompose"]), spectra.bases_of(found["save"]))
    expected = {r["name"]: r for r in layer_table(model)}
    assert expected.pop("lm_head")["rank"] == extra[0]["rank"] == table_of(model).rank
    assert {m["name"]: m["rank"] for m in modules} == {name: r["rank"] for name, r in expected.items()}
    shared = {m["name"]: None if m["leader"] == m["name"] else m["leader"] for m in modules if m["rank"]}
    assert shared == {name: r["shares"] for name, r in expected.items() if r["rank"]}
    table = Page(html.heat(modules, extra, "x")).tables[0]
    q = next(m for m in modules if m["name"] == "model.layers.1.self_attn.q_proj")
    column = 1 + table[1].index("q_proj")
    assert table[3][0] == "1"
    assert table[3][column] == ("dense" if q["rank"] is None else str(q["rank"]))


def test_an_embedding_that_stays_whole_is_drawn_as_dense():
    full = {"ranks": {"q": 8}, "groups": [], "embedding": {"name": "embed_tokens", "rank": 64, "tied": True}}
    _, extra = spectra.layers(full, {"ranks": {"q": 4}, "groups": [], "embedding": None})
    assert extra == [{"name": "embed_tokens", "rank": None, "full": 64, "leader": None}]
    assert ">dense<" in html.heat([], extra, "x")


@pytest.mark.slow
@pytest.mark.parametrize("row", ["result", ODD])
def test_the_bases_marked_as_kept_are_those_that_prune_chose(run, row):
    """With weights that learning has moved and without; the embedding, which has a budget of its own, too."""
    found, learned = stages(run, row), "learn" in stages(run, row)
    weighted = found["learn" if learned else "decompose"]
    model, weights = bs.load(weighted / "model")[0], spectra.weights(weighted)
    for group in groups(model):
        assert weights[group.name][0] == pytest.approx(group.s.tolist())
    options = json.loads((found["prune"] / "stage.json").read_text())["options"]
    rule = Rule(**{k: options[k] for k in ("budget", "score", "multiple_of", "reserve")})
    of = of_groups(groups(model), target(keep=options["keep"]), rule, options["keep"])
    chosen = {group.name: index for group, index in of}
    ranks = spectra.kept_ranks(found["decompose"], found["prune"])
    marked = spectra.kept(weights, ranks)
    for name, index in chosen.items():
        if index is None:
            assert name not in marked
        else:
            assert sorted(index.tolist()) == [i for i, stays in enumerate(marked[name]) if stays]
    table = set(marked) - set(chosen)
    s = table_of(model).s
    best = set(s.argsort(descending=True, stable=True)[: ranks[min(table)]].tolist())
    assert best == {i for i, stays in enumerate(marked[min(table)]) if stays}


@pytest.mark.slow
def test_what_is_missing_is_left_out_with_a_reason(run, tmp_path):
    results = json.loads((run / "results.json").read_text())
    for row in results.values():
        row["accuracy"] = row["paired"] = None
    del results[ODD]
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = checked(report(tmp_path).read_text(encoding="utf-8"))
    assert page.headings() == ["quality-against-bytes", "rows", "time-and-memory", "left-out"]
    for reason in ("no recipe.yaml", "no manifest.json", "does not score answers", "decompose and save are not there"):
        assert reason in page.text()
    assert "has a negative log-likelihood of" in page.text()
    assert [line[0] for line in page.tables[0]] == [
        "measure", "response NLL", "bases", "targeted parameters", "all parameters", "weight bytes"
    ]  # fmt: skip

    shutil.copytree(run, tmp_path / "thinned")
    for folder in (tmp_path / "thinned" / "stages").glob("learn-*"):
        shutil.rmtree(folder)
    page = checked(report(tmp_path / "thinned").read_text(encoding="utf-8"))
    assert "learn and prune are not there" in page.text()


@pytest.mark.slow
def test_the_command_line_writes_it_again(run, tmp_path):
    before = (run / "report.html").read_text(encoding="utf-8")
    (run / "report.html").unlink()
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0, done.output
    assert str(run / "report.html") in done.output
    assert (run / "report.html").read_text(encoding="utf-8") == before  # the same bytes every time
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert f"error: {tmp_path} holds no results.json: name the folder of a finished run" in done.output


def test_letters_and_lines_stand_out_from_what_is_behind_them():
    def contrast(a, b):
        low, high = sorted((html.luminance(a), html.luminance(b)))
        return (high + 0.05) / (low + 0.05)

    style = Path(html.__file__).with_name("report.css").read_text()
    schemes = [dict(re.findall(r"--(\w+): #(\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(schemes) == 2
    for scheme in schemes:
        rgb = {name: bytes.fromhex(value) for name, value in scheme.items()}
        assert all(contrast(rgb["paper"], rgb[n]) >= 4.5 for n in ("ink", "soft", "link", "better", "worse"))
        assert contrast(rgb["paper"], rgb["bar"]) >= 3
        assert all(contrast(rgb["paper"], bytes.fromhex(c[1:])) >= 3 for c in figures.COLOURS)
    for i in range(101):
        module = {"name": "m", "rank": i, "full": 100, "leader": None}
        cell = html.heat([], [module], "")
        back, letters = re.search(r"<td[^>]*rgb\((.*?)\);color:#(\w)", cell).groups()
        back = tuple(map(int, back.split(",")))
        assert contrast(back, (255, 255, 255) if letters == "f" else (0, 0, 0)) >= 4.5


@pytest.mark.slow
def test_a_comparison_gets_a_page_of_the_same_kind():
    results = read(REPO / "eval" / "results" / "short.jsonl")
    page = checked(compared(results, "short"))
    titles = [re.sub(r"\W+", "-", title) for title in comparisons(results)]
    assert page.headings() == [*titles, "how-to-read-it"]
    markdown = (REPO / "eval" / "results" / "short.md").read_text(encoding="utf-8")
    lines = [re.sub(r"\*(\w+)\*", r"\1", line) for line in markdown.splitlines() if line.startswith("| ")]
    shown = [" ".join(f"| {' | '.join(line)} |".split()) for table in page.tables for line in table]
    assert shown == [" ".join(line.split()) for line in lines]
    assert sum(tag == "svg" for tag, _ in page.tags) == len(titles)


def opened(page, folder, *options, size="1280,2000"):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome to open the page in")
def test_a_browser_shows_it_on_a_desk_on_a_phone_and_in_the_dark(run, tmp_path):
    from PIL import Image

    dom = opened(run / "report.html", tmp_path, "--dump-dom")
    headings = [re.sub(r"\W+", "-", heading.lower()) for heading in SECTIONS_OF_A_RUN]
    assert re.findall(r'<section id="(.*?)">', dom) == headings
    assert dom.count("<svg") == (run / "report.html").read_text(encoding="utf-8").count("<svg") > 8

    for size, scheme, dark in (("1280,2000", 1, False), ("390,1400", 1, False), ("1280,2000", 0, True)):
        shot = tmp_path / f"{size}-{scheme}.png"
        scheme = f"--blink-settings=preferredColorScheme={scheme}"
        opened(run / "report.html", tmp_path, f"--screenshot={shot}", scheme, size=size)
        image = Image.open(shot).convert("RGB")
        assert f"{image.width},{image.height}" == size
        assert len(image.getcolors(2**24)) > 100  # letters, lines and the map: a blank page has one colour
        assert (html.luminance(image.getpixel((2, 2))) < 0.1) == dark

    # What the page alone says of its width, measured by a script that only this copy has.
    measuring = tmp_path / "measuring.html"
    script = "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script>"
    measuring.write_text((run / "report.html").read_text(encoding="utf-8").replace("</body>", f"{script}</body>"))
    dom = opened(measuring, tmp_path, "--dump-dom", size="390,1400")
    needed, width = map(int, re.search(r"<title>(\d+) of (\d+)", dom).groups())
    assert needed <= width
