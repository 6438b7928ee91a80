"""The report against `show --json` and what is stored; as a browser shows it: test_report_browser.py."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from folders import command, show
from places import Place
from report_page import Page, row_of
from report_runs import EVIL, LATENCY, NUM_LAYERS, SYNERGY, TRANSFER, Shape, write_report_run
from stored_runs import write_run

from tale_ray.results.report.data import gather
from tale_ray.results.report.page import render_page
from tale_ray.results.report.texts import excerpt, visible
from tale_ray.results.report.verdict import verdict
from tale_ray.results.statistics import wilson_interval
from tale_ray.store import RunReader, RunWriter

SCORE: dict[str, Any] = SYNERGY["regimes"][0]["seeds"][0]  # type: ignore[index]


@pytest.fixture(scope="module", name="run")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("report") / "run"
    write_report_run(run)
    return run


def report(run: Path | str, folder: Path, *more: Any) -> str:
    outcome = command("report", run, "-o", folder / "report.html", *more)
    assert outcome.code == 0, outcome.err
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module", name="page")
def page_fixture(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(report(run, tmp_path_factory.mktemp("page")))


def test_its_numbers_are_those_of_show(run: Path, page: Page) -> None:
    summary = show(run)
    for name, entry in summary["test"].items():
        row = row_of(page, name, str(entry["round"]))
        assert row[2] == (", ".join(map(str, entry["removed"])) or "none")
        assert row[3].startswith(
            f"{entry['correct']}/{entry['total']} = {100 * entry['correct'] / entry['total']:.1f}% ["
        )
        if name != "baseline":
            assert row[5:7] == [str(entry["wins"]), str(entry["losses"])]
            assert row[8] == (f"{entry['p_value_holm']:.3f}" if entry["p_value_holm"] >= 0.001 else "<0.001")
            assert float(row[9]) == pytest.approx(100 * summary["optimism"][name], abs=0.06)
    for entry in (summary["baseline"] | {"round": 0, "removed": []}, *summary["rounds"]):
        row = row_of(page, str(entry["round"]))
        low = wilson_interval(entry["correct"], entry["total"]).low
        assert row[2] == str(len(entry["removed"]))
        assert row[3].startswith(f"{entry['correct']}/{entry['total']} = ")
        assert f"[{100 * low:.1f}, " in row[3]
    for number in (summary["work"]["candidate_rows"], summary["work"]["layer_applications"]):
        assert f"{number:,}" in page.text


def test_every_cell_of_the_heat_map_is_a_stored_candidate(run: Path, page: Page) -> None:
    summary = show(run)
    rounds = [*summary["rounds"], summary["rejected_round"]]
    assert len(page.cells) == NUM_LAYERS * len(rounds)
    drawn = ElementTree.fromstring(re.search(r'<svg id="heat-map".*?</svg>', report_text(run), re.DOTALL)[0])  # type: ignore[index]
    titles = {title.text for title in drawn.iter("title")}
    gone: list[int] = []
    for entry in rounds:
        stored = {each["layer"]: each for each in entry["candidates"]}
        for layer in range(NUM_LAYERS):
            cell, where = page.cells[layer, entry["round"]].split(), f"round {entry['round']}, layer {layer}: "
            if layer in gone:
                assert cell == ["×"]
                assert f"{where}removed before" in titles
                continue
            counts = f"{stored[layer]['correct']}/{stored[layer]['seen']}"
            out = stored[layer]["status"] == "bounded_out"
            won = layer == entry["removed_layer"]
            assert cell == [counts, *(["out"] if out else []), *(["winner"] if won else [])]
            told = f"{where}{stored[layer]['correct']} of {stored[layer]['seen']} rows correct"
            assert f"{told}{', then bounded out' if out else ', the winner' if won else ''}" in titles
        gone.append(entry["removed_layer"])
    assert len([group for group in drawn if group.get("class", "").startswith("cell bounded_out")]) == sum(
        each["status"] == "bounded_out" for entry in rounds for each in entry["candidates"]
    )


def report_text(run: Path) -> str:
    return render_page(gather(RunReader(str(run))))


def test_nobody_who_writes_a_reply_writes_the_page(page: Page) -> None:
    assert not page.tags("script")
    assert not page.tags("img")
    assert len(page.tags("style")) == 1
    assert "<script>document.title='owned'</script>" in page.text, "it is shown as it was said"
    assert "{{ 7 * 7 }}{% raw %}␀␛[31mred␇\\u202eevil\n" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ufffe]", page.text)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_nothing_is_fetched(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "use", "image")
        assert not {"src", "srcset", "data", "xlink:href"} & attributes.keys()
        assert attributes.get("href", "#main") == "#main"
    policy = next(meta for meta in page.tags("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_long_replies_are_cut_and_it_is_said(run: Path, page: Page) -> None:
    assert "Cut: it has 100,000 characters." in page.text
    assert len(report_text(run)) < 1_000_000


def test_prompts_are_found_where_the_rows_are(page: Page) -> None:
    assert "Not stored in the run" not in page.text
    assert re.search(r"\b(True|False|not|and|or)\b.*\b(and|or|not)\b", page.text)


def test_prompts_that_are_not_there_are_said_to_be_missing(run: Path) -> None:
    assert "Not stored in the run; row digest" in report_text(run)


def test_every_figure_has_a_title_and_a_description(page: Page) -> None:
    figures = [each for each in page.tags("svg") if each.get("role") == "img"]
    assert {each["id"] for each in figures} >= {"layers", "trajectory", "heat-map", "information"}
    assert any(str(each["id"]).startswith("rows-") for each in figures)
    ids = {attributes.get("id") for _, attributes in page.elements}
    for each in figures:
        assert {f"{each['id']}-title", f"{each['id']}-description"} == set(str(each["aria-labelledby"]).split()) <= ids


def test_optional_sections(run: Path, page: Page, tmp_path: Path) -> None:
    name = "batch of 8, first token, seconds"
    assert row_of(page, name) == [name, "0.125 [0.12, 0.13]", "0.1 [0.09, 0.11]", "0.80"]
    assert row_of(page, "tokens per second") == ["tokens per second", "80", "100", "1.25"]
    assert "device: cpu; removed: 3, 7." in page.text
    bare = tmp_path / "run"
    write_report_run(bare, how="interrupted")
    assert "Latency" not in report(bare, tmp_path)
    with RunWriter.claim(str(bare)) as writer:
        writer.write_result("latency", {"base": "quick", "device": LATENCY["device"]})
    broken = command("report", bare, "-o", tmp_path / "x.html")
    assert broken.code == 2
    assert "latency.json" in broken.err
    assert not (tmp_path / "x.html").exists()


def test_the_matrix_of_transfer(page: Page) -> None:
    head = page.rows.index(["searched on", "a, 100 test rows", "b, 100 test rows"])
    assert page.rows[head + 1 : head + 4] == [
        ["full model", "50.0% [40.4, 59.6]", "50.0% [40.4, 59.6]"],
        ["awithout 7, 3", "60.0% [50.2, 69.1]+10.0 [+0.0, +20.0]p 0.200own task", SIGNIFICANT],
        ["bwithout none", "–", "50.0% [40.4, 59.6]+0.0 [-10.0, +10.0]p 1.000own task"],
    ]
    assert "corrected by Holm for 2 cells" in page.text
    assert "b: 1 test row that a run was searched on left out for all models." in page.text


SIGNIFICANT = "35.0% [26.4, 44.7]30 invalid-15.0 [-25.0, -5.0]p <0.001"


def test_the_matrix_is_a_table_for_everybody(run: Path) -> None:
    """Every number has heads on both sides; colour is for what is significant, and says nothing that numbers do not."""
    text = report_text(run).partition('<h2 id="transfer-heading">')[2].partition("</section>")[0]
    assert text.count('<th scope="col">') == 3
    assert text.count('<th scope="row">') == 3
    assert re.findall(r'<td class="h\d">[^<]*', text) == ['<td class="h2">35.0% [26.4, 44.7]']
    assert "Coloured where p is below 0.05, by the change in points:" in text


def test_a_matrix_of_counts_alone(tmp_path: Path) -> None:
    """As it may be written by hand: without p-values nothing is coloured, and nothing is said of tests."""
    write_report_run(tmp_path / "run", Shape(rounds=1))
    scores = [
        {
            **{name: score[name] for name in ("searched_on", "tested_on", "baseline")},
            "pruned": {"correct": score["pruned"]["correct"], "total": 100},
        }
        for score in TRANSFER["scores"]
    ]
    with RunWriter.claim(str(tmp_path / "run")) as writer:
        writer.write_result("transfer", {"scores": scores})
    told = Page(report(tmp_path / "run", tmp_path))
    assert row_of(told, "a") == ["a", "60.0% [50.2, 69.1]+10.0own task", "35.0% [26.4, 44.7]-15.0"]
    assert row_of(told, "b", "–") == ["b", "–", "50.0% [40.4, 59.6]+0.0own task"]
    assert "corrected by Holm for" not in told.text.partition("Searched on one task")[2].partition("Cost")[0]
    assert not any((found.get("class") or "").startswith("h") for found in told.tags("td"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pruned": {"correct": 101, "total": 100}}, "101 of 100 rows are no score"),
        ({"difference_interval": [0.1]}, "an interval of 1 numbers has no two ends"),
        ({"p_value_holm": "small"}, "p_value_holm is 'small'"),
    ],
)
def test_a_matrix_that_was_changed_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    write_report_run(tmp_path / "run", Shape(rounds=1))
    with RunWriter.claim(str(tmp_path / "run")) as writer:
        writer.write_result("transfer", {"scores": [{**TRANSFER["scores"][0], **change}]})
    broken = command("report", tmp_path / "run", "-o", tmp_path / "x.html")
    assert broken.code == 2
    assert words in broken.err
    assert "transfer.json" in broken.err


def test_information_is_shown_as_it_is_stored(run: Path, page: Page, tmp_path: Path) -> None:
    stored, start = RunReader(str(run)).result("information"), page.rows.index(row_of(page, "after", "full model"))
    assert stored is not None
    by_layer = {point["layer"]: point for point in stored["pruned"]}
    for row, point in zip(page.rows[start + 1 :], stored["full"], strict=False):
        low, high = point["interval"]
        assert row[0] == ("embedding" if point["layer"] is None else str(point["layer"]))
        assert row[1] == f"{point['bits']:.3f} [{low:.3f}, {high:.3f}]"
        assert row[3] == "-0.003"
        other = by_layer.get(point["layer"])
        assert row[4].split()[0] == ("removed" if other is None else f"{other['bits']:.3f}")
    figure = ElementTree.fromstring(re.search(r'(<svg id="information".*</svg>)</div>', report_text(run))[1])  # type: ignore[index]
    marked = [text.get("x") for text in figure.iter("text") if text.text == "×"]
    assert marked == [f"{100 * (layer + 1.5) / (NUM_LAYERS + 1):.3f}%" for layer in (3, 7)]
    assert "Rows: 240 select, 360 test; 2 labels; H(Y) = 1.000 bits" in page.text
    assert "-0.45 [-0.90, +0.20], p = 0.140 (5 layers scored on all rows, 7 bounded out" in page.text
    bare = tmp_path / "run"
    write_report_run(bare, how="interrupted")
    assert "Information about the label" not in report(bare, tmp_path)
    changes: dict[str, Any]
    for changes in (
        *({"full": []}, {"full": None}, {"entropy": 0.0}, {"controls": {}}, {"correlation": {}}),
        {"full": [{**point, "interval": []} for point in stored["full"]]},
        {"correlation": {**stored["correlation"], "interval": None}},
    ):
        with RunWriter.claim(str(bare)) as writer:
            writer.write_result("information", {**stored, **changes})
        broken = command("report", bare, "-o", tmp_path / "x.html")
        assert broken.code == 2, changes
        assert "information.json was changed" in broken.err


def test_regimes_are_shown_as_they_are_stored(page: Page, tmp_path: Path) -> None:
    head = page.rows.index(["regime", "seed", "layers", "accuracy", "parameters trained", "training, s"])
    assert page.rows[head + 1 : head + 3] == [
        ["base", "0", "12", "80.0% [73.9, 85.0]", "–", "–"],
        ["FT", "0", "12", "90.0% [85.1, 93.4]", "408,576", "172.0"],
    ]
    assert row_of(page, "FT", "base") == ["FT", "base", "0", "+10.0 [+5.0, +15.0]", "24", "4", "<0.001"]
    assert "corrected by Holm for 1 comparison." in page.text
    bare = tmp_path / "run"
    write_report_run(bare, how="interrupted")
    assert "Pruned and fine-tuned" not in report(bare, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"regimes": [{"regime": "magic", "seeds": []}]}, "'magic' is no regime"),
        ({"regimes": None}, "regimes is None"),
        ({"comparisons": [{**SYNERGY["comparisons"][0], "difference_interval": [0.1]}]}, "an interval has two ends"),
        ({"regimes": [{"regime": "ft", "seeds": [{**SCORE, "correct": 201}]}]}, "201 of 200 rows are no score"),
    ],
)
def test_regimes_that_were_changed_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    write_report_run(tmp_path / "run", Shape(rounds=1))
    with RunWriter.claim(str(tmp_path / "run")) as writer:
        writer.write_result("synergy", {**SYNERGY, **change})
    broken = command("report", tmp_path / "run", "-o", tmp_path / "x.html")
    assert (broken.code, words in broken.err, "synergy.json was changed" in broken.err) == (2, True, True), broken.err


def test_faults_survived(page: Page) -> None:
    head = page.rows.index(next(row for row in page.rows if row[0] == "attempt"))
    first, second = page.rows[head + 1 : head + 3]
    assert (first[3].strip(), first[6:]) == ("interrupted", ["2", "7"])
    assert (second[3].strip(), second[6:]) == ("finished", ["0", "0"])


@pytest.mark.parametrize(
    ("accuracies", "finding", "words"),
    [
        ((0.8,) * 6, "not_shown", "show no significant difference"),
        ((0.95,) + (0.2,) * 5, "full_model", "The full model is to be kept"),
        ((0.1,) + (0.9,) * 5, "better", "is more accurate on 60 test rows"),
    ],
)
def test_the_verdict_claims_no_more_than_test_rows_show(
    tmp_path: Path, accuracies: tuple[float, ...], finding: str, words: str
) -> None:
    write_report_run(tmp_path / "run", Shape(accuracies=accuracies))
    found, sentence = verdict(gather(RunReader(str(tmp_path / "run"))))
    assert (found, words in sentence) == (finding, True), sentence
    entry = show(tmp_path / "run")["test"]["selected"]
    if finding == "not_shown":
        assert entry["p_value_holm"] >= 0.05
        assert ("is not ruled out" in sentence) == (entry["difference_interval"][0] < -0.0005)


def test_a_worse_result_is_called_worse(tmp_path: Path) -> None:
    write_report_run(tmp_path / "run", Shape(splits=("search", "test"), accuracies=(0.95, *[0.3] * 5)))
    data = gather(RunReader(str(tmp_path / "run")))
    assert data.summary["best"]["round"] > 0
    assert verdict(data)[0] == "worse"


def test_without_test_rows_nothing_is_claimed(tmp_path: Path) -> None:
    write_report_run(tmp_path / "run", Shape(splits=("search",)))
    page = Page(report(tmp_path / "run", tmp_path))
    assert "this run has no test rows, that does not show that the removal is harmless" in page.text
    assert "Wins and losses" not in page.text


@pytest.mark.parametrize("how", ["interrupted", "failed"])
def test_a_run_that_has_not_ended_well_has_a_report(tmp_path: Path, how: str) -> None:
    write_report_run(tmp_path / "run", how=how)
    page = Page(report(tmp_path / "run", tmp_path))
    start = {"interrupted": "The search was interrupted and can go on: without", "failed": "The search failed: without"}
    assert start[how] in page.text
    assert "the test rows are not scored yet" in page.text
    assert ("a worker said <b>no</b>" in page.text) == (how == "failed")


def test_a_run_that_is_being_written_has_a_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunWriter.claim(str(run)):
        assert "still running: nothing is known yet" in Page(report(run, tmp_path)).text
    write_run(run, rounds=0)
    assert "can go on: nothing is known yet" in Page(report(run, tmp_path)).text
    write_report_run(tmp_path / "two", Shape(rounds=0), how="interrupted")
    assert "No round is finished yet" in Page(report(tmp_path / "two", tmp_path)).text


def test_a_run_anywhere_has_a_report(place: Place, tmp_path: Path) -> None:
    write_report_run(place.uri, Shape(rounds=2))
    assert "Which layers" in report(place.uri, tmp_path)


def test_places_that_must_not_be_written_are_refused(run: Path, tmp_path: Path) -> None:
    inside = command("report", run, "-o", run / "report.html")
    assert inside.code == 2
    assert "is in the run folder" in inside.err
    assert command("report", run, "-o", tmp_path).code == 2
    assert command("report", run, "--plots", run / "plots", "-o", tmp_path / "r.html").code == 2
    missing = command("report", tmp_path / "none", "-o", tmp_path / "r.html")
    assert missing.code == 2
    assert "is not a run" in missing.err
    assert not (tmp_path / "r.html").exists()


def test_figures_are_files_too(run: Path, tmp_path: Path) -> None:
    out = command("report", run, "-o", tmp_path / "r.html", "--plots", tmp_path / "plots").out
    names = ["trajectory.png", "trajectory.svg", "heatmap.png", "heatmap.svg"]
    assert out.splitlines()[1:] == [f"figure: {tmp_path / 'plots' / name}" for name in names]
    for name in names:
        data = (tmp_path / "plots" / name).read_bytes()
        assert data.startswith(b"\x89PNG") if name.endswith("png") else ElementTree.fromstring(data) is not None
    again = tmp_path / "again"
    command("report", run, "-o", tmp_path / "r.html", "--plots", again)
    assert (again / "heatmap.svg").read_bytes() == (tmp_path / "plots" / "heatmap.svg").read_bytes()


def test_texts_are_made_visible_and_short() -> None:
    assert visible("a\tb\n\r\n\x00\x7f\u202e\ud800é") == "a\tb\n\n␀␡\\u202e\\ud800é"
    assert excerpt("short", 10).is_cut is False
    cut = excerpt("a" * 50 + "b" * 50, 30)
    assert (cut.total, cut.is_cut) == (100, True)
    assert cut.text == f"{'a' * 20}\n[...]\n{'b' * 10}"
    assert all(len(excerpt(text, 100).text) < 700 for text in EVIL)


def test_no_model_is_needed(run: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from tale_ray.cli import main; main(sys.argv[1:]);"
        "print([name for name in ('torch', 'transformers', 'ray', 'matplotlib') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", script, "report", str(run), "-o", str(tmp_path / "r.html")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_template_and_style_are_packaged() -> None:
    root = Path(__file__).parent.parent
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tale_ray"]
    packaged = {path for pattern in patterns for path in (root / "tale_ray").glob(pattern)}
    data = {path for path in (root / "tale_ray/results/report").iterdir() if path.suffix not in (".py", "")}
    assert {path.name for path in data} == {"template.html", "style.css"}
    assert data <= packaged
