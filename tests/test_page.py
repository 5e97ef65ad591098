"""The report page in a real browser: no error, no request, its controls work, and its numbers are those of the CSV."""

import csv
import re
import statistics

import pytest

from hetfl_jax.results.reading import TABLE
from hetfl_jax.results.scores import is_share
from hetfl_jax.run.cli import main
from tests import browser
from tests.sweeps import grid, invented

RATES, MIXES, SEEDS = [0.03, 0.1, 0.3], ["a1", "a1-b1"], [0, 1, 2]
OVER = {"train.learning_rate": RATES, "family.mix": MIXES, "run.seed": SEEDS}
COSTS = ("down_bytes", "up_bytes", "client_macs", "simulated_time")
LEVELS = ("a", "b", "c", "d", "e")
needs_browser = pytest.mark.skipif(browser.find() is None, reason=f"none of {', '.join(browser.NAMES)} is installed")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return invented(tmp_path_factory.mktemp("page") / "sweep", OVER, rounds=12, every=2, lists=True)


@pytest.fixture(scope="module")
def page(sweep):
    assert main(["report", str(sweep), "-o", str(sweep / "report.html")]) == 0
    return sweep / "report.html"


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture
def opened(chromium, page):
    chromium.size(1280)
    chromium.media()
    chromium.open(page)
    return chromium


@pytest.fixture(scope="module")
def numbers(sweep):
    """(point, level, metric) -> {round: value} of the CSV."""
    found = {}
    with (sweep / TABLE).open() as file:
        for row in csv.DictReader(file):
            key = row["point"], row["level"], row["metric"]
            found.setdefault(key, {})[int(row["round"])] = float(row["value"])
    return found


def done(rate, mix):
    """Finished points of a cell; the first of the sweep has failed."""
    names = [name for name, v in grid(OVER) if v["train.learning_rate"] == rate and v["family.mix"] == mix]
    return [name for name in names if name != next(grid(OVER))[0]]


def last(numbers, name, level, metric):
    values = numbers[name, level, metric]
    return values[max(values)]


TABLE_OF = """(id) => [...document.querySelectorAll(`#${id} tbody tr`)].map((row) => [...row.children].map(
    (cell) => [cell.textContent, cell.dataset.value === undefined ? null : Number(cell.dataset.value)]))"""


def cells(page, table="points"):
    return page.value(f"({TABLE_OF})({table!r})")


def heads(page):
    return page.value("[...document.querySelectorAll('#points thead th')].map((h) => h.textContent)")


def press(page, selector):
    page.value(f"document.querySelector({selector!r}).click()")


def choose(page, selector, value):
    page.value(
        f"{{const s = document.querySelector({selector!r}); s.value = {value!r};"
        "s.dispatchEvent(new Event('change')); s.dispatchEvent(new Event('input')); 0}"
    )


def shown(values, share=True):
    """Mean and deviation as the page writes them."""
    write = (lambda v: f"{100 * v:.2f}") if share else (lambda v: f"{v:.4g}")
    text = write(statistics.fmean(values))
    spread = statistics.stdev(values) if len(values) > 1 else 0
    unit = "%" if share else ""
    return f"{text} \u00b1 {write(spread)}{unit}" if spread else f"{text}{unit}"


def same_text(text, values):
    """The page's text is within a unit of its last digit of what the values give."""
    found = [float(part) for part in re.findall(r"[\d.]+", text)]
    expected = [float(part) for part in re.findall(r"[\d.]+", shown(values))]
    return len(found) == len(expected) and all(abs(a - b) < 0.0101 for a, b in zip(found, expected))


@needs_browser
def test_the_page_has_no_error_and_asks_for_nothing(opened):
    for level in ("b", " all", "a"):
        press(opened, f'[data-level="{level}"]')
    choose(opened, "#metric", "train_loss")
    choose(opened, "#metric", "accuracy")
    assert opened.messages() == []
    assert opened.requests() == []
    assert opened.value("document.querySelectorAll('#curves svg').length") == 4
    assert opened.value("document.querySelectorAll('#curves svg g[data-name]').length") == 4 * len(RATES) * len(MIXES)


@needs_browser
@pytest.mark.parametrize("level", LEVELS)
def test_every_number_of_the_table_is_the_csvs(opened, numbers, level):
    press(opened, f'[data-level="{level}"]')
    head, rows = heads(opened), cells(opened)
    assert len(rows) == len(RATES) * len(MIXES)
    for row in rows:
        names = done(float(row[0][0]), row[1][0])
        assert int(row[2][0]) == len(names)
        for metric, column in (("accuracy", f"accuracy {level}, last"), ("accuracy", "best round's")):
            values = [last(numbers, name, level, metric) for name in names]
            text, value = row[head.index(column)]
            assert value == pytest.approx(statistics.fmean(values), rel=1e-8)
            assert same_text(text, values), (text, values)
        sent = [sum(last(numbers, n, "", way) for way in ("down_bytes", "up_bytes")) for n in names]
        assert row[head.index("MB sent")] == [f"{sent[0] / 1e6:.2f}", statistics.fmean(sent)]
        work = [last(numbers, n, "", "client_macs") for n in names]
        assert row[head.index("GMACs")] == [f"{work[0] / 1e9:#.4g}", statistics.fmean(work)]


@needs_browser
def test_every_point_and_every_metric_is_the_csvs(opened, numbers):
    press(opened, "#each")
    press(opened, '[data-level=" all"]')
    metrics = opened.value("[...document.querySelectorAll('#metric option')].map((o) => o.value)")
    assert {"accuracy", "loss", "validation_accuracy", "local_accuracy", "train_loss", "recovery"} <= set(metrics)
    for metric in metrics:
        choose(opened, "#metric", metric)
        head, rows = heads(opened), cells(opened)
        assert len(rows) == len(list(grid(OVER)))
        columns = [n for n, name in enumerate(head) if name.endswith(", last")]
        assert len(columns) == (len(LEVELS) if any(key[2] == metric and key[1] for key in numbers) else 1)
        for row in rows:
            for n in columns:
                level = head[n].removesuffix(", last").removeprefix(metric.replace("_", " ")).strip()
                text, value = row[n]
                evaluated = max(numbers[row[0][0], "a", "accuracy"])
                expected = numbers.get((row[0][0], level, metric), {}).get(evaluated)
                if expected is None:  # the point that failed has trained and was never evaluated again
                    assert (row[0][0], text, value) == (next(grid(OVER))[0], "-", None)
                    continue
                assert value == pytest.approx(expected, rel=1e-8), (row[0], metric)
                factor, unit = (100, 0.0051) if is_share(metric) else (1, 6e-5 * max(1, abs(expected)))
                assert abs(float(text.rstrip("%")) - factor * expected) <= unit


@needs_browser
def test_every_point_of_the_curves_is_the_csvs(opened, numbers):
    """The markers' texts hold mean, and round or cost."""
    along = {
        "rounds": ("round",),
        "bytes": ("down_bytes", "up_bytes"),
        "macs": ("client_macs",),
        "simulated_time": ("simulated_time",),
    }
    for number, (name, costs) in enumerate(along.items()):
        told = opened.value(
            f"[...document.querySelectorAll('#curves figure')[{number}].querySelectorAll('g[data-name]')].map((g) => "
            "[g.dataset.name, [...g.querySelectorAll('circle title')].map((t) => t.textContent)])"
        )
        assert len(told) == len(RATES) * len(MIXES), name
        for line, titles in told:
            rate, mix = re.fullmatch(r"learning_rate (\S+), mix (\S+)", line).groups()
            names = done(float(rate), mix)
            rounds = sorted(numbers[names[0], "a", "accuracy"])
            assert len(titles) == len(rounds) == 7
            for round, title in zip(rounds, titles):
                at = sum(numbers[names[0], "", c].get(round, 0) for c in costs) if name != "rounds" else round
                at /= {"bytes": 1e6, "macs": 1e9}.get(name, 1)
                value, place = re.search(r": ([\d.]+)% at .* ([\d.e+-]+)$", title).groups()
                mean = statistics.fmean(numbers[n, "a", "accuracy"][round] for n in names)
                assert abs(float(value) - 100 * mean) < 0.0051
                assert float(place) == pytest.approx(at, rel=6e-4)


@needs_browser
def test_the_heat_map_and_the_clients_are_the_csvs(opened, numbers):
    press(opened, '[data-level="c"]')
    rows = opened.value(
        "[...document.querySelectorAll('.heat tbody tr')].map((r) => [...r.children].map((c) => c.textContent))"
    )
    assert [float(row[0]) for row in rows] == RATES
    for row in rows:
        for mix, text in zip(MIXES, row[1:], strict=True):
            assert same_text(text, [last(numbers, n, "c", "accuracy") for n in done(float(row[0]), mix)])
    for row in cells(opened, "spread"):
        rate, mix = re.fullmatch(r"learning_rate (\S+), mix (\S+)", row[0][0]).groups()
        for (text, value), what in zip(row[1:], ("mean", "deviation", "worst_tenth", "best_tenth"), strict=True):
            values = [last(numbers, n, "", f"client_accuracy/{what}") for n in done(float(rate), mix)]
            assert value == pytest.approx(statistics.fmean(values), rel=1e-8)
            assert same_text(text, values)


@needs_browser
@pytest.mark.parametrize("target", [40, 62.5, 99])
def test_the_cost_of_a_target_is_the_csvs(opened, numbers, target):
    press(opened, '[data-level="b"]')
    choose(opened, "#target", str(target))
    rows = cells(opened, "costs")
    assert len(rows) == len(RATES) * len(MIXES)
    for row in rows:
        rate, mix = re.fullmatch(r"learning_rate (\S+), mix (\S+)", row[0][0]).groups()
        reached = []
        for name in done(float(rate), mix):
            scores = numbers[name, "b", "accuracy"]
            if first := [round for round in sorted(scores) if scores[round] >= target / 100]:
                cost = [numbers[name, "", c].get(first[0], 0) for c in COSTS]
                reached.append((first[0], cost[0] + cost[1], *cost[2:]))
        assert row[1][0] == f"{len(reached)} of {len(done(float(rate), mix))}"
        for (text, value), costs in zip(row[2:], zip(*reached) if reached else [()] * 4, strict=True):
            assert value == (pytest.approx(statistics.fmean(costs)) if reached else None)
            assert (text == "-") == (not reached)


@needs_browser
def test_sorting_filters_and_search(opened):
    first = "#points thead th:nth-child(4) button"
    rows = lambda n: [row[n][1] for row in cells(opened)]  # noqa: E731
    press(opened, first)
    assert rows(3) == sorted(rows(3))
    assert (
        opened.value("document.querySelector('#points thead th:nth-child(4)').getAttribute('aria-sort')") == "ascending"
    )
    press(opened, first)
    assert rows(3) == sorted(rows(3), reverse=True)
    press(opened, "#points thead th:nth-child(1) button")
    assert rows(0) == sorted(RATES * len(MIXES))
    choose(opened, "#filter-0", "0.1")
    assert rows(0) == [0.1, 0.1]
    assert opened.value("document.querySelectorAll('#curves figure')[0].querySelectorAll('g[data-name]').length") == 2
    assert "filter until two remain" in opened.value("document.querySelector('#heat').textContent")
    choose(opened, "#filter-0", "")
    choose(opened, "#search", "seed=1 a1-b1")
    assert [row[1][0] for row in cells(opened)] == ["a1-b1"] * len(RATES)
    assert "3 of 18 points" in opened.value("document.querySelector('#count').textContent")
    choose(opened, "#search", "no such point")
    assert cells(opened) == []
    assert opened.messages() == []


@needs_browser
def test_the_latex_is_the_table(opened):
    press(opened, "#copy")
    text = opened.value("new Promise((r) => setTimeout(() => r(document.querySelector('#latex').value), 200))")
    assert opened.value("document.querySelector('#copied').textContent") in (
        "copied",
        "selected: copy it with the keyboard",
    )
    lines = text.splitlines()
    assert lines[0].startswith("\\begin{tabular}{")
    body = lines[lines.index("\\midrule") + 1 : lines.index("\\bottomrule")]
    plain = [line.replace("$\\pm$", "\u00b1").replace("\\", "").strip().split(" & ") for line in body]
    assert plain == [[text for text, _ in row[:-1]] for row in cells(opened)]
    assert "learning\\_rate" in text
    assert "%" not in text.replace("\\%", "")


@needs_browser
def test_keyboard_and_screen_reader_find_everything(opened):
    find = "[...document.querySelectorAll('{}')].filter((e) => !({})).map((e) => e.outerHTML.slice(0, 120))"
    named = (
        "e.getAttribute('aria-label') || (e.getAttribute('aria-labelledby') || '').split(' ').some("
        "(i) => document.getElementById(i)?.textContent.trim())"
    )
    assert opened.value(find.format('svg[role="img"]', named)) == []
    assert opened.value(find.format("svg", "e.getAttribute('role') === 'img' || e.getAttribute('aria-hidden')")) == []
    assert opened.value(find.format("table", "e.caption && e.querySelector('thead th[scope=col]')")) == []
    assert opened.value(find.format("tbody tr", "e.querySelector('th[scope=row]')")) == []
    labelled = "e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length"
    assert opened.value(find.format("button, input, select, textarea", labelled)) == []
    assert opened.value("document.documentElement.lang") == "en"
    # With the keyboard alone: focus a level's button, press it; focus a column's, sort by it.
    opened.value("document.querySelector('[data-level=\"d\"]').focus()")
    opened.key("Enter", "Enter", 13)
    assert opened.value("document.querySelector('[data-level=\"d\"]').getAttribute('aria-pressed')") == "true"
    assert "accuracy d, last" in heads(opened)
    opened.value("document.querySelector('#points thead th:nth-child(4) button').focus()")
    opened.key("Enter", "Enter", 13)
    values = [row[3][1] for row in cells(opened)]
    assert values == sorted(values)
    assert opened.value("document.activeElement.textContent") == "accuracy d, last"
    opened.key("Tab", "Tab", 9)
    assert opened.value("document.activeElement.textContent") == "best round's"


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.size(width)
    assert opened.value("document.documentElement.scrollWidth") <= width
    narrow = opened.value(
        "Math.min(...[...document.querySelectorAll('figure svg')].map("
        "(s) => s.getBoundingClientRect().width / s.viewBox.baseVal.width))"
    )
    assert narrow > 0.95  # texts of the figures keep their size


@needs_browser
def test_text_and_lines_stand_out_in_light_and_dark(opened):
    for scheme, least in (("light", 4.5), ("dark", 4.5)):
        opened.media(prefers_color_scheme=scheme)
        assert opened.value(CONTRAST.format("--ink")) >= 7
        for name in ("--quiet", "--mark", "--warn"):
            assert opened.value(CONTRAST.format(name)) >= least, (scheme, name)
        assert [opened.value(CONTRAST.format(f"--c{n}")) >= 2.2 for n in range(8)] == [True] * 8, scheme
    opened.media(type="print", prefers_color_scheme="dark")
    assert opened.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.value("getComputedStyle(document.querySelector('#controls')).display") == "none"


CONTRAST = """(() => {{
  const light = (name) => {{
    const probe = document.createElement("i");
    probe.style.color = `var(${{name}})`;
    document.body.append(probe);
    const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
    probe.remove();
    const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }};
  const [a, b] = [light("{}"), light("--paper")].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}})()"""


@needs_browser
def test_links_lead_to_the_folders_and_each_point_is_shown(opened, sweep, page):
    press(opened, "#each")
    links = opened.value(
        "[...document.querySelectorAll('#points tbody a')].map((a) => decodeURIComponent(new URL(a.href).pathname))"
    )
    assert links == [f"{sweep.resolve()}/{name}/" for name, _ in grid(OVER)]
    choose(opened, "#one", "4")
    text = opened.value("document.querySelector('#detail').textContent")
    assert "run.seed = 1" in text
    assert "clusters over rounds" in text
    assert "Examples by client and class" in text
    how = opened.value("document.querySelector('.how').textContent")
    assert all(
        part in how
        for part in (
            "hetfl sweep --config=heterofl_digits",
            "hetfl_jax 0.1.0",
            "2 x cpu (cpu)",
            "12.5 s",
            "17 of 18 done",
        )
    )
