"""The page of running demos in a real browser; their metrics in a real Prometheus, asked as Grafana asks."""

import json
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from playwright.sync_api import Browser, Page, expect

from tests.browser.chromium import Watched
from tests.browser.chromium import watched as watched_page
from tests.browser.conftest import Report
from tests.browser.demo import Demo, demo
from tests.browser.prometheus import DOCKER, EXECUTABLE, Prometheus, prometheus

TABS = 8
MEASURED_S = 20.0
VISITS = 5
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "tailstream.json").read_text())
# As Grafana would fill them in for a scrape a second and the last minutes.
GRAFANA = {"$__rate_interval": "15s", "$__range": "5m"}

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Demos:
    numbers: Demo
    classes: Demo


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Demos]:
    """One of each task, still learning while the tests look; broken records are among the flights."""
    flights = ("--rows", "60000", "--rate", "300", "--inject-bad", "600")
    rodents = ("--task", "classification", "--rows", "20000", "--rate", "60")
    folders = [tmp_path_factory.mktemp(name) for name in ("flights", "rodents")]
    with demo(folders[0], *flights) as numbers, demo(folders[1], *rodents) as classes:
        yield Demos(numbers, classes)


@pytest.fixture(scope="module")
def scraped(demos: Demos, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if EXECUTABLE is None:
        pytest.skip("there is no prometheus (Debian's package of that name)")
    both = (demos.numbers, demos.classes)
    targets = {
        "trainer": [f"127.0.0.1:{found.metrics_port}" for found in both],
        "service": [found.url.removeprefix("http://") for found in both],
    }
    with prometheus(tmp_path_factory.mktemp("prometheus"), targets) as running:
        yield running


def number_in(page: Page, selector: str) -> float:
    return float(page.locator(selector).inner_text().replace(",", ""))


def drawn(page: Page, place: str) -> str:
    """What a chart shows, to tell whether it has changed."""
    return str(page.locator(f"#{place} canvas").evaluate("canvas => canvas.toDataURL()"))


def moves(page: Page, selector: str) -> None:
    before = page.locator(selector).inner_text()
    expect(page.locator(selector)).not_to_have_text(before)


def test_numbers_move_and_charts_are_drawn(demos: Demos, watched: Watched) -> None:
    page = watched.page
    page.goto(demos.numbers.url)
    expect(page.locator("#status")).to_have_text("live")
    expect(page).to_have_title("arr_delay · Tailstream")
    samples = number_in(page, "#samples")
    history = drawn(page, "history")
    moves(page, "#samples")
    moves(page, "#version")
    assert number_in(page, "#samples") > samples
    assert drawn(page, "history") != history
    for place in ("regions", "scatter", "density", "spark-lag_records", "spark-train_loss"):
        blank = page.locator(f"#{place} canvas").evaluate(
            "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.every((v) => !v)"
        )
        assert not blank, place
    cells = page.locator("#errors td").all_inner_texts()
    assert len(cells) == 15
    assert all(re.fullmatch(r"(✓ )?[\d.]+", cell) for cell in cells[:3]), cells
    expect(page.locator("#error-verdict")).to_contain_text("running median")
    page.get_by_text("regions alike", exact=True).first.click()
    expect(page.locator("#history")).to_have_attribute("aria-label", re.compile(r"prior [\d.]+, balanced [\d.]+"))
    page.locator("#regions").hover()
    expect(page.locator("#regions-labels")).to_have_text(re.compile(r"^[\d,]+$"))
    assert watched.console_errors == []


def test_the_slider_and_the_form_change_the_prediction_by_keyboard(demos: Demos, watched: Watched) -> None:
    page = watched.page
    page.goto(demos.numbers.url)
    answer, hint = page.locator("#answer .point"), page.locator("#answer .hint")
    expect(hint).to_contain_text("balance 0.5")
    page.get_by_label("dep_delay", exact=True).focus()
    page.keyboard.type("180")
    expect(answer).to_have_text(re.compile(r"≈ 1\d\d"))
    late = drawn(page, "density")
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("Home")
    expect(hint).to_contain_text("balance 0 ·")
    natural = answer.inner_text(), hint.inner_text()
    page.keyboard.press("End")
    expect(hint).to_contain_text("balance 1 ·")
    assert answer.inner_text() != natural[0], "the prediction moves"
    assert hint.inner_text().split("·")[0] != natural[1].split("·")[0], "and so does its interval"
    assert drawn(page, "density") != late
    page.get_by_label("Interval").select_option("0.5")
    expect(hint).to_contain_text("50 % between")
    page.get_by_label("dep_delay", exact=True).fill("")
    page.keyboard.press("Enter")
    expect(answer).to_have_text(re.compile(r"≈ .?\d\d?(\.|$)"))
    assert watched.console_errors == []


def test_a_version_is_rolled_back_to_while_the_trainer_goes_on(demos: Demos, watched: Watched) -> None:
    page = watched.page
    page.goto(demos.numbers.url)
    page.get_by_role("button", name=re.compile("Roll back")).first.click()
    expect(page.locator("#status")).to_have_text("pinned")
    pinned = httpx.get(f"{demos.numbers.url}/model").json()
    assert pinned["version"] == pinned["pinned"]
    page.get_by_role("button", name="Follow the newest").click()
    expect(page.locator("#status")).to_have_text("live")
    moves(page, "#version")
    assert watched.console_errors == []


def test_classes_have_shares_instead_of_densities(demos: Demos, watched: Watched) -> None:
    page = watched.page
    page.goto(demos.classes.url)
    expect(page.locator("#shares li")).to_have_count(8)
    expect(page.locator("#error-title")).to_have_text("Share answered right")
    moves(page, "#samples")
    shares = page.locator("#shares").inner_text()
    page.get_by_role("slider").fill("1")
    expect(page.locator("#answer .hint")).to_contain_text("balance 1 ·")
    assert page.locator("#shares").inner_text() != shares
    expect(page.locator("#newest li").first).to_be_visible()
    expect(page.locator("#regions-card")).to_be_hidden()
    assert watched.console_errors == []


def test_every_panel_of_grafana_has_data(demos: Demos, scraped: Prometheus, report: Report) -> None:
    for scrapes in range(3, 9):  # a rate needs requests between scrapes
        scraped.until_scraped(scrapes)
        for found in (demos.numbers, demos.classes):
            assert httpx.post(f"{found.url}/predict", json={}).status_code == 200
    scraped.until_scraped(10)
    empty = []
    for panel in DASHBOARD["panels"]:
        counts = []
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in GRAFANA.items():
                query = query.replace(name, value)
            assert "$" not in query, f"{panel['title']}: {query}"
            counts.append(scraped.series(query))
            empty += [] if counts[-1] else [query]
        if counts:
            report.panels.append({"title": panel["title"], "series": sum(counts)})
    assert empty == []
    for annotation in DASHBOARD["annotations"]["list"]:
        scraped.series(annotation["expr"])  # none yet, but a query that can be asked


def test_promtool_finds_no_fault_in_what_running_programs_say(demos: Demos) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool (Debian's package prometheus)")
    for found in (demos.numbers, demos.classes):
        for url in (f"{found.url}/metrics", f"http://127.0.0.1:{found.metrics_port}/metrics"):
            text = httpx.get(url).content
            done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
            assert (done.returncode, done.stdout + done.stderr) == (0, b""), url
            names = set(re.findall(rb"^# TYPE (\S+)", text, flags=re.MULTILINE))
            assert names == set(re.findall(rb"^# HELP (\S+) \S", text, flags=re.MULTILINE)), url
            assert b" # {" not in text, "no exemplars"


def test_prometheus_takes_the_alerts_and_none_fires_while_all_is_well(scraped: Prometheus) -> None:
    scraped.until_scraped(8)
    rules = [rule for group in scraped.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == set(shipped_alerts())
    assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
    # Rejected records are there on purpose, and a stream of a few minutes may drift.
    assert {rule["name"] for rule in rules if rule["state"] == "firing"} <= {"DeadLetters", "Drift"}


def test_every_alert_is_seen_to_fire_by_promtool(report: Report) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool (Debian's package prometheus)")
    tests = Path(__file__).parents[1] / "docker" / "alerts.test.yml"
    done = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # What is expected to fire, not what is only named: promtool holds exactly that against what does.
    for case in yaml.safe_load(tests.read_text())["tests"]:
        for expected in case.get("alert_rule_test", ()):
            report.alerts_tested += [expected["alertname"]] if expected["exp_alerts"] else []
        for expected in case.get("promql_expr_test", ()):
            labels = [sample["labels"] for sample in expected["exp_samples"]]
            report.alerts_tested += [name for text in labels for name in re.findall(r'alertname="(\w+)"', text)]
    report.alerts_tested = sorted(set(report.alerts_tested))
    assert report.alerts_tested == sorted(shipped_alerts())


def shipped_alerts() -> list[str]:
    return re.findall(r"- alert: (\w+)", (DOCKER / "alerts.yml").read_text())


def test_what_a_tab_costs(demos: Demos, browser: Browser, report: Report, report_file: Path | None) -> None:
    if report_file is None:
        pytest.skip("measured by `make test-browser JSON=FILE`, never judged")
    paints = []
    for _ in range(VISITS):
        with watched_page(browser) as found:
            found.page.goto(demos.numbers.url)
            found.page.locator("#live").wait_for()
            [paint] = found.page.evaluate(
                "performance.getEntriesByName('first-contentful-paint').map((e) => e.startTime)"
            )
            paints.append(paint)
    report.first_paint_ms = round(statistics.median(paints), 1)
    service = demos.numbers.part("serve")
    alone = _busy_share(service)
    tabs = [watched_page(browser) for _ in range(TABS)]
    pages = [tab.__enter__().page for tab in tabs]
    for page in pages:
        page.goto(demos.numbers.url)
        page.locator("#live").wait_for()
    watched_share = _busy_share(service)
    for tab in tabs:
        tab.__exit__(None, None, None)
    report.cpu_percent = round(100 * (watched_share - alone) / TABS, 3)


def _busy_share(process: psutil.Process) -> float:
    """Share of one core that a process takes, over some seconds."""

    def used_s() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    began, used = time.monotonic(), used_s()
    time.sleep(MEASURED_S)
    return (used_s() - used) / (time.monotonic() - began)
