"""The report: whole, self-contained, safe from what it shows, and readable where it is read."""

import dataclasses
import functools
import math
import re
import shutil
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

import pyrogen as pg
from pyrogen.data import Data, LinearGaussian
from pyrogen.distributions import Bernoulli, Delta, Flow, Normal, NormalLikelihood, StandardNormal
from pyrogen.evaluation.diagnosis import Diagnosis, Finding
from pyrogen.experiment.report import write_report
from pyrogen.experiment.report_blocks import Block, fit_blocks, labels_of
from pyrogen.experiment.table import Comparison, printable, row_of
from pyrogen.inference import ELBO, GAN, AmortizedGuide, FitOptions, Run
from pyrogen.inference.programs import as_module, describe_example
from pyrogen.models import LatentVariableModel
from pyrogen.networks import MLP, Critic

HOSTILE = '<script>alert("1")</script> & | *$x$* `'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


class Page(HTMLParser):
    """What a page is made of: its tags in order, with attributes, and its text; open and closed tags must agree."""

    VOID = ("meta", "img", "br", "wbr", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def fitted(model: Any, family: Any, objective: Any, data: Any) -> Run:
    """A fit of one epoch."""
    x = data.train if isinstance(data, Data) else data
    guide = family and AmortizedGuide(model, MLP(x.shape[1:], 16, hidden=(16,)), family)
    return pg.fit(model, guide, objective, data, epochs=1, batch_size=32, progress=False)


def table_of(runs: dict[str, Run]) -> Comparison:
    """Figures made up for so many fits, in two sections."""
    rows = [
        {
            "log_likelihood": -20.0 - 2 * place,
            "log_likelihood_error": 0.5,
            "elbo": -21.5 - place / 1000,
            "observations": 24,
            "particles": 8,
            "marginal_kl": math.nan if run.guide is None else 1.5,
        }
        for place, run in enumerate(runs.values())
    ]
    return Comparison.of([row_of(run, row) for run, row in zip(runs.values(), rows, strict=True)], runs, "test rows")


@pytest.fixture(scope="module")
def table(digits):
    torch.manual_seed(1)

    def model():
        return LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, digits.event_shape, hidden=(16,))))

    runs = {
        HOSTILE: fitted(model(), Normal, ELBO(), digits),
        "flow": fitted(model(), functools.partial(Flow, layers=1, hidden=(8,)), ELBO(), digits),
        "gan": fitted(model(), None, GAN(critic=functools.partial(Critic, hidden=(8,))), digits),
    }
    return table_of(runs)


@pytest.fixture(scope="module")
def folder(table, digits, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("report") / "out"
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    more = {"flow": [Block("Findings", "All that was found.", None, ("nothing <b>", "found"))]}
    more[""] = [Block("More of all", "A line.", figure)]
    assert write_report(place, table, (digits.test,), digits, blocks=more) == place / "report.html"
    return place


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_page_is_whole_and_needs_nothing_else(page, folder):
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "action", "data"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:image/png;base64,")), (tag, address[:80])
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in (folder / "report.html").read_text(encoding="utf-8")


def test_hostile_names_are_shown_and_do_nothing(page, folder):
    assert page.text.count(HOSTILE) >= 3
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,})yaml\n.*?^\1$", "", markdown, flags=re.M | re.S)
    assert "<script" not in outside and r"&lt;script&gt;alert(" in outside
    assert r"\| \*\$x\$\* \`" in outside


def mark(kind: str) -> str:
    """A name that would be a tag, an attribute, an end of either, mathematics, Markdown, markup and orders at once."""
    return f"<b onclick=x()>'\"{kind}</b>{{{{7*7}}}}[/{kind}]($\\frac{{`|*_ javascript:x() \x1b[31m"


def test_whatever_is_named_by_the_user_is_shown_and_does_nothing(digits, tmp_path):
    """Data, classes, fits, programs, reasons, and blocks of others; sites, in pictures."""

    class Hostile(LatentVariableModel):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample(mark("site"), dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", self.likelihood(z), obs=x)

    Hostile.__name__ = Hostile.__qualname__ = mark("model")
    named = dataclasses.replace(
        digits, name=mark("data"), classes=(*(mark(f"class{n}") for n in range(9)), "x" * 10_000)
    )
    model = Hostile(StandardNormal(2), Bernoulli(MLP(2, digits.event_shape, hidden=(16,))))
    run = fitted(model, Normal, ELBO(), named)
    row = {
        "elbo": -20.0,
        "log_likelihood": -19.0,
        "log_likelihood_error": 0.1,
        "reasons": {mark("part"): mark("reason")},
        "compared_in": mark("space"),
    }
    table = Comparison.of([row], {mark("fit"): run}, mark("rows"), {mark("left"): mark("why")})
    table.failed = {mark("failed"): mark("error")}
    blocks = {mark("fit"): [Block(mark("title"), mark("caption"), Figure((1, 1)), (mark("line"),))]}
    write_report(tmp_path / mark("folder").replace("/", ""), table, (named.test,), named, blocks=blocks)
    (path,) = tmp_path.rglob("report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.all("b") and not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = ("data", "fit", "model", "part", "reason", "space", "left", "why", "failed", "error")
    for kind in (*shown, "title", "caption", "line"):
        assert " ".join(printable(mark(kind)).split()) in " ".join(page.text.split()), kind
    markdown = re.sub(
        r"^(`{3,})yaml\n.*?^\1$", "", path.with_suffix(".md").read_text(encoding="utf-8"), flags=re.M | re.S
    )
    assert "<b" not in markdown and "\x1b" not in page.text + markdown and not re.search(r"(?<!\\)\]\(\$", markdown)
    assert {each.parent.name for each in path.parent.rglob("*.png")} <= {
        "all-fits",
        "fit-b-onclick-x-fit-b-7-7-fit-frac-javascript-x-31m",
    }
    notebook = Page(table._repr_html_())
    assert not notebook.all("b") and mark("fit") in notebook.text


def test_every_anchor_is_there_once(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "")[1:] for a in page.all("a")}
    assert targets <= {*ids} and len(targets) == 2 + 3


def test_table_has_figures_with_errors_and_marks(page, table, digits):
    assert len(page.all("table")) == 2 and "latent space" in page.text
    assert "−20.00 ± 0.50" in page.text
    # One log-likelihood, for the next is 2 away and 2 √(0.5² + 0.5²) = 1.4; all ELBOs, which are shown as the same.
    assert len([a for a in page.all("td") if a.get("class") == "best"]) == 1 + 3 + 2
    assert "on 24 test rows" in page.text and "no more than two standard errors" in page.text


def test_every_picture_says_what_it_shows_and_is_small(page, folder):
    pictures = page.all("img")
    assert all(len(a["alt"] or "") > 20 and a["width"] and a["height"] for a in pictures)
    assert len(pictures) > 15
    assert (folder / "report.html").stat().st_size < 6e6 * 3 / 7


def titles(blocks: list[Block]) -> list[str]:
    return [block.title for block in blocks if block.figure is not None]


def test_fits_have_the_pictures_that_they_allow(table, digits):
    whole = ["Samples", "Reconstructions", "Nearest training rows", "Interpolations", "Latent traversals", "Latents"]
    whole += ["Calibration", "Coverage"]
    blocks = {name: fit_blocks(run, (digits.test,), digits) for name, run in table.runs.items()}
    assert all(found[0].title == "Diagnosis" and found[0].lines for found in blocks.values())
    assert titles(blocks[HOSTILE]) == [*whole, "Training"]
    assert titles(blocks["flow"]) == [*whole, "Training"]
    assert titles(blocks["gan"]) == [
        *("Samples", "Nearest training rows", "Interpolations", "Latent traversals", "Training", "Critics")
    ]
    captions = {block.title: block.caption for block in blocks[HOSTILE]}
    assert "20 rows" in captions["Reconstructions"] and "of 64 training rows" in captions["Nearest training rows"]
    assert "p(z), its density" in captions["Latents"] and "colours are labels" in captions["Latents"]
    assert "great circles" in next(block.caption for block in blocks["gan"] if block.title == "Interpolations")
    assert "straight lines" in captions["Interpolations"]


def test_diagnosis_in_lines(table, digits, monkeypatch):
    module: Any = pg.experiment.report_blocks
    fit = module._Fit(table.runs["flow"], (digits.test,), digits, 0)
    findings = Diagnosis((Finding("posterior collapse", "0 of 2", "less of it"),), {"prior hole": "no guide"})
    monkeypatch.setattr(module, "diagnose", lambda *_, **__: findings)
    assert module._diagnosis(fit).lines == (
        "posterior collapse: 0 of 2. Try less of it.",
        "Not looked for: prior hole (no guide).",
    )
    monkeypatch.setattr(module, "diagnose", lambda *_, **__: Diagnosis())
    assert module._diagnosis(fit).lines == ("Nothing found.",)


def test_blocks_of_others_are_shown(page, folder):
    assert "All that was found." in page.text and "nothing <b>" in page.text and "More of all" in page.text
    assert (folder / "figures" / "all-fits" / "more-of-all.png").is_file()


def test_markdown_leads_to_its_pictures_and_has_the_same_table(folder, table):
    text = (folder / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(links) > 15 and len(set(links)) == len(links)
    assert all((folder / link).read_bytes().startswith(b"\x89PNG") for link in links)
    likelihood, latents = re.findall(r"(?:^\|.*\n)+", text, re.M)
    for found, columns in ((likelihood, 5), (latents, 2)):
        cells = [re.sub(r"\\\|", "", line).strip("|").split("|") for line in found.splitlines()]
        assert [len(line) for line in cells] == [columns] * 5
    assert "| log p(x) | ELBO | train s | parameters |" in likelihood and "**−20.00 ± 0.50**" in likelihood
    assert "| marginal KL |" in latents and "**1.50**" in latents
    assert "\n\n\n\n" not in text


def test_configuration_is_there(page):
    assert page.text.count("class_path: pyrogen.models.LatentVariableModel") == 3
    assert len(page.all("details")) == 1 + 3


def test_two_names_with_the_same_letters_have_their_own_places(table, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(pg.experiment.report, "fit_blocks", lambda *_: [Block("A", "", Figure((1, 1)))])
    run = table.runs["gan"]
    twice = type(table).of([{"elbo": -1.0}, {"elbo": -2.0}], {"a b": run, "a-b": run}, "test rows")
    write_report(tmp_path, twice, (digits.test,), digits)
    assert {"fit-a-b", "fit-a-b-2"} <= {path.name for path in (tmp_path / "figures").iterdir()}


def test_the_same_fit_makes_the_same_pictures(table, digits, folder):
    blocks = [block for block in fit_blocks(table.runs["gan"], (digits.test,), digits) if block.figure is not None]
    assert [pg.experiment.report._png(block.figure) for block in blocks] == [
        path.read_bytes()
        for block in blocks
        for path in (folder / "figures" / "fit-gan").glob(f"{block.title.lower().replace(' ', '-')}.png")
    ]


def test_nothing_is_replaced_when_drawing_fails(table, digits, tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("before")

    def fail(*_, **__):
        raise RuntimeError("no canvas")

    monkeypatch.setattr(pg.experiment.report, "fit_blocks", fail)
    with pytest.raises(RuntimeError, match="no canvas"):
        write_report(tmp_path, table, (digits.test,), digits)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "before"


@pytest.mark.parametrize("width", [1, 2, 5])
def test_vectors(width, tmp_path):
    x = torch.randn(60, width, generator=torch.Generator().manual_seed(0))
    model = LatentVariableModel(StandardNormal(1), NormalLikelihood(MLP(1, width, hidden=(8,)), scale="shared"))
    run = fitted(model, Normal, ELBO(), x[:40])
    blocks = fit_blocks(run, (x[40:],), x[:40])
    assert titles(blocks) == ["Samples", "Latents", "Calibration", "Coverage", "Training"]
    assert not any("Not shown" in block.caption for block in blocks)
    if width == 5:
        text = write_report(tmp_path, table_of({"a": run}), (x[40:],), x[:40]).read_text(encoding="utf-8")
        assert "evaluated on test rows" in text and "in the first two of 5 values" in text


def test_a_point_mass_and_a_single_row(digits):
    model = LatentVariableModel(StandardNormal(3), Bernoulli(MLP(3, digits.event_shape, hidden=(8,))))
    blocks = fit_blocks(fitted(model, Delta, ELBO(), digits), (digits.test[:1],), digits)
    assert titles(blocks) == [
        *("Samples", "Reconstructions", "Nearest training rows", "Latent traversals", "Latents", "Training")
    ]
    (calibration,) = [block.caption for block in blocks if block.title == "Calibration"]
    assert calibration.startswith("Not shown: ") and "point mass" in calibration


def test_what_fails_is_said(digits, table, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no mean in closed form")

    monkeypatch.setattr(pg.experiment.report_blocks, "sample", fail)
    (_, samples, *_) = fit_blocks(table.runs["gan"], (digits.test,), digits)
    assert samples == Block("Samples", "Not shown: no mean in closed form.")


def test_what_fails_for_another_reason_than_the_fit_is_no_picture_left_out(digits, table, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(pg.experiment.report_blocks, "sample", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_blocks(table.runs["gan"], (digits.test,), digits)


def test_calibration_is_that_of_the_evaluation():
    """An exact guide, whose p-values are any; those beside the plots are the table's of the same seed."""
    toy = LinearGaussian(observations=40)

    def exact(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", toy.posterior(x))

    programs = as_module(toy.model, toy.x), as_module(exact, toy.x)
    options, example = FitOptions(epochs=1), describe_example((toy.x[:2],))
    run = Run(*programs, objective=ELBO(), history=pd.DataFrame(), options=options, example=example)
    found = pg.evaluate(run, toy.x, parts=["calibration"], seed=3)
    captions = {block.title: block.caption for block in fit_blocks(run, (toy.x,), toy.x, 0, 3)}
    for title, name in (("Calibration", "sbc_p_value"), ("Coverage", "tarp_p_value")):
        p = getattr(found, name)
        assert 0.001 < p < 1 and f"p = {p:.3f}." in captions[title]
    assert "in 2 units and in log p(x|z)" in captions["Calibration"]


def test_calibration_has_the_seed_of_the_figures(digits, table, tmp_path, monkeypatch):
    asked = []

    def blocks(run, rows, data, *seeds):
        asked.append(seeds)
        return []

    monkeypatch.setattr(pg.experiment.report, "fit_blocks", blocks)
    rows = [{"elbo": -20.0, "seed": 3}, {"elbo": -20.0}, {"elbo": -20.0, "seed": 4}]
    write_report(tmp_path, Comparison.of(rows, table.runs, "test rows"), (digits.test,), digits, 7)
    write_report(tmp_path, table, (digits.test,), digits, 7)
    assert asked == [(7, 3), (7, 7), (7, 4), (7, 7), (7, 7), (7, 7)]


def test_calibration_is_by_all_the_rows_of_the_evaluation(digits, table, monkeypatch):
    asked = {}

    def check(model, guide, x, **options):
        asked.update(options, rows=len(x[0]))
        raise ValueError("enough")

    module: Any = pg.experiment.report_blocks
    monkeypatch.setattr(module, "simulation_based_calibration", check)
    monkeypatch.setattr(module, "CLOUD", 10)
    fit_blocks(table.runs["flow"], (digits.test,), digits, 0, 5)
    assert asked == {"seed": 5, "rows": 24}


def test_why_figures_are_not_defined_is_said_once_for_those_that_share_it(digits, table, tmp_path, monkeypatch):
    monkeypatch.setattr(pg.experiment.report, "fit_blocks", lambda *_: [])
    names = [*table.runs]
    whys = [{"bound": "no <density>"}, {"bound": "no <density>", "samples": "too few"}, None]
    rows = [{"elbo": -20.0, "reasons": why} for why in whys]
    write_report(tmp_path, Comparison.of(rows, table.runs, "test rows"), (digits.test,), digits)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"bound, {names[0]}, flow" in page and page.count("no <density>") == 1
    assert "samples, flow" in page and "\n- samples, flow: too few\n" in markdown
    assert "no &lt;density&gt;" in markdown and "\n\n\n" not in markdown.split("## All fits")[0]
    alone = {"flow": table.runs["flow"]}
    write_report(tmp_path, Comparison.of(rows[1:2], alone, "test rows"), (digits.test,), digits)
    assert "\n- samples: too few\n" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_nearest_rows_are_of_all_training_rows(monkeypatch):
    """In parts of seven of the hundred rows, the last of which is smaller."""
    module: Any = pg.experiment.report_blocks
    samples, training = torch.rand(5, 1, 2, 3), torch.rand(100, 1, 2, 3)
    training[99], training[98] = samples[0], samples[0]
    expected = torch.cdist(samples.flatten(1), training.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    for values in (7 * 6, 1, 10**6):
        monkeypatch.setattr(module, "VALUES", values)
        assert module._nearest(samples, training).equal(expected.argmin(1))


def test_rows_go_where_the_programs_are():
    """Rows of another precision, as those that are on another device, are no fault."""
    ahead, back = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double()

    def model(x, c):
        pyro.module("ahead", ahead)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ahead(c), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, c):
        pyro.module("back", back)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(back(x - c), 1.0).to_event(1))

    x, c = torch.randn(2, 80, 1)
    run = pg.fit(model, guide, ELBO(), (x.double(), c.double()), epochs=1, progress=False)
    blocks = fit_blocks(run, (x[40:], c[40:]), (x[:40], c[:40]))
    assert {"Calibration", "Coverage"} <= {*titles(blocks)}


def test_labels_are_those_of_the_rows(digits):
    labels, classes = labels_of(digits, digits.test[:5].float())
    assert labels.equal(digits.test_labels[:5]) and classes == digits.classes
    assert labels_of(digits, digits.test[1:6]) == (None, None)
    assert labels_of(digits.test, digits.test) == (None, None)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to show the page in")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives Chromium, is not there")
    with playwright.sync_playwright() as started, tempfile.TemporaryDirectory() as profile:
        options: dict[str, Any] = {"executable_path": CHROMIUM, "args": [*FLAGS], "headless": True}
        context = started.chromium.launch_persistent_context(profile, **options)
        yield context
        context.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(browser, folder, width):
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: complaints.extend([request.url] * request.url.startswith("http")))
    page.set_viewport_size({"width": width, "height": 844})
    page.goto((folder / "report.html").as_uri())
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.images.length") > 15
    # The table has more columns than a phone shows, and scrolls in its own box.
    box = "document.querySelector('.scroll')"
    if width == 390:
        assert page.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    # What is tapped is not too small, and the text is no smaller than can be read.
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, td, figcaption')].map(e => +getComputedStyle(e).fontSize.slice(0, -2))"
    )
    assert min(sizes) >= 13
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1] and not complaints
    page.close()


def test_in_print(browser, folder, tmp_path):
    page = browser.new_page()
    page.goto((folder / "report.html").as_uri())
    page.pdf(path=str(tmp_path / "report.pdf"), prefer_css_page_size=True)
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF-") and len(printed) > 50_000
    page.emulate_media(media="print")
    # Nothing on paper scrolls, and what is folded away on a screen is printed.
    page.set_viewport_size({"width": 720, "height": 1000})
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "[...document.querySelectorAll('details > pre')].every(e => e.getBoundingClientRect().height > 100)"
    )
    page.close()
