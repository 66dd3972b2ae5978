"""Reports: what they derive from table and plan, the closing strip, and the page as a browser runs it."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fake_report import fake_plan, fake_report, fake_table
from rich.console import Console

from lwcompile.errors import BadInput
from lwcompile.html.view import report_view, short_labels
from lwcompile.plans import Plan
from lwcompile.progress import BarProgress, LineProgress, format_seconds, terminal_progress
from lwcompile.report import PARTS, Report, finite
from lwcompile.site import Site
from lwcompile.spec import Spec
from lwcompile.strip import FLOAT, SCALE, Strip, bits_colour, closing, mean_bits, summary_rows
from lwcompile.table import Choice, OptionTable, SiteRow

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
BROWSER_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=3000",
]  # fmt: skip


@cache
def report() -> Report:
    return fake_report()


# --- what a report derives


def test_bytes_bits_and_drops_agree_with_the_table():
    table, data = fake_table(), report().data
    plan = Plan({site: tuple(map(Spec.parse, options)) for site, options in data["plan"].items()})
    found = table.evaluate(plan.choices)
    model = data["model"]
    inside = [sub for block in model["blocks"] for sub in block["sublayers"]]
    assert {sub["id"] for sub in inside if sub["dropped"]} == set(found.dropped) != set()
    assert sum(part["bytes"] for part in [*inside, *model["other"]]) + table.fixed_bytes == found.bytes
    assert sum(data["bytes"]["parts"].values()) == found.bytes == data["bytes"]["planned"]
    assert sum(data["bytes"]["dense_parts"].values()) == model["dense_bytes"] == table.evaluate({}).bytes
    assert data["predicted"] == found.damage and set(data["bytes"]["parts"]) <= set(PARTS)
    for sub in inside:
        linears = [row for id, row in table.sites.items() if row.parent == sub["id"]]
        stored = sum(row.choice(plan[row.site]).bytes for row in linears)
        expected = 0.0 if sub["dropped"] else 8 * stored / sum(row.parameters for row in linears)
        assert sub["bits"] == pytest.approx(expected, abs=1e-4)


def test_scales_are_what_codes_leave():
    table, data = fake_table(4), fake_report(4).data
    overhead = 0
    for site, options in data["plan"].items():
        bits = Spec.parse(options[-1]).get("bits")
        row = table.sites[site]
        if isinstance(bits, int) and site != "head":  # tied to the embedding
            overhead += row.choice((Spec.parse(options[-1]),)).bytes - math.ceil(row.parameters * bits / 8)
    assert data["bytes"]["parts"]["scales"] == overhead


def test_points_of_the_curve_are_what_the_table_says_of_their_plans():
    table = fake_table()
    for point in report().data["pareto"]:
        choices = {site: tuple(Spec.parse(part) for part in text.split(" + ")) for site, text in point["plan"].items()}
        found = table.evaluate(choices)
        assert (point["bytes"], point["damage"], point["dropped"]) == (found.bytes, found.damage, list(found.dropped))
        assert sum(point["parts"].values()) == found.bytes
        assert sum(bits is None for block in point["strip"] for bits in block) == len(found.dropped)


def test_a_table_without_rows_for_blocks_takes_them_from_the_structure():
    choices = (Choice(Spec.of("quantize", bits=4), 0.1, 50),)
    ids = ["block0.attention.q", "block0.mlp.up", "block1.attention.q", "block1.mlp.up"]
    table = OptionTable("u", 400, {id: SiteRow(id, None, "linear", 100, 400, choices) for id in ids})
    sites = {id: Site(id, "linear", id.rpartition(".")[0]) for id in ids}
    sites |= {f"block{b}.{kind}": Site(f"block{b}.{kind}", kind, f"block{b}") for b in (0, 1) for kind in ("attention", "mlp")}  # type: ignore[misc]
    sites |= {f"block{b}": Site(f"block{b}", "block") for b in (0, 1)}
    plan = Plan.of(table, {ids[0]: (Spec.of("quantize", bits=4),)})
    model = Report.build(name="m", table=table, plan=plan, sites=sites).data["model"]
    assert [[sub["bits"] for sub in block["sublayers"]] for block in model["blocks"]] == [[4.0, 32.0], [32.0, 32.0]]
    assert model["other"] == []
    loose = Report.build(name="m", table=table, plan=plan).data["model"]
    assert loose["blocks"] == [] and [part["id"] for part in loose["other"]] == ids


def test_save_and_load(tmp_path):
    path = report().save(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    assert Report.load(tmp_path / "run").data == Report.load(tmp_path / "run" / "report.json").data == finite(report().data)
    for text, said in (("{", "is not a report"), ('{"a": 1}', "no section 'model'"), ("[]", "no section 'model'")):
        (tmp_path / "run" / "report.json").write_text(text)
        with pytest.raises(BadInput, match=said):
            Report.load(tmp_path / "run")
    with pytest.raises(BadInput, match=r"holds no report\.json"):
        Report.load(tmp_path / "none")


def test_json_of_other_libraries_numbers():
    torch = pytest.importorskip("torch")
    given = {"a": torch.tensor(2.5), "b": float("inf"), "c": (1, Path("x")), 3: {"n": float("nan")}, "d": True}
    assert finite(given) == {"a": 2.5, "b": None, "c": [1, "x"], "3": {"n": None}, "d": True}


# --- the strip


def _printed(renderable: Any, width: int = 100, colour: bool = False) -> str:
    console = Console(width=width, color_system="truecolor" if colour else None, force_terminal=colour)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def _model(*blocks: list[tuple[float, bool]]) -> dict[str, Any]:
    rows = [
        {"id": f"block{i}", "sublayers": [{"bits": bits, "dropped": dropped, "dense_bytes": 100} for bits, dropped in block]}
        for i, block in enumerate(blocks)
    ]
    return {"blocks": rows, "other": [{"id": "embedding", "kind": "embedding", "bits": 4.3, "bytes": 1, "dense_bytes": 8}]}


def test_without_colour_each_half_cell_is_a_digit():
    model = _model([(4.3, False), (3.3, False)], [(0, True), (5.2, False)], [(32, False), (0, True)], [(0, True), (0, True)])
    text = _printed(Strip(model))
    assert text.splitlines()[0] == "embedding 4 43-5f---"
    assert "\x1b" not in text and "- = dropped" in text


def test_in_colour_a_cell_is_the_mean_and_what_is_dropped_is_missing():
    model = _model([(4.0, False), (6.0, False)], [(0, True), (8.0, False)])
    text = _printed(Strip(model), colour=True)
    line = re.sub(r"\x1b\[[0-9;]*m", "", text.splitlines()[0])
    assert line == "embedding ██ ██·█"
    red, green, blue = (int(bits_colour(5.0)[i : i + 2], 16) for i in (1, 3, 5))
    assert f"38;2;{red};{green};{blue}m██"[:-2] in text


def test_a_long_strip_wraps_and_keeps_its_numbers():
    rows = _printed(Strip(_model(*[[(4.0, False), (4.0, False)]] * 100)), width=80).splitlines()
    assert all(len(row) <= 80 for row in rows)
    assert "".join(rows[:-1:2]).replace("embedding 4", "").count("4") == 200
    assert [int(number) for row in rows[1:-1:2] for number in row.split()] == list(range(0, 100, 5))


def test_colours_run_from_few_bits_to_floating_point():
    assert [bits_colour(bits) for bits, _ in SCALE] == [colour for _, colour in SCALE]
    assert bits_colour(1) == SCALE[0][1] and bits_colour(11) == SCALE[-1][1] and bits_colour(16) == FLOAT

    def lightness(colour: str) -> float:
        linear = [((int(colour[i : i + 2], 16) / 255 + 0.055) / 1.055) ** 2.4 for i in (1, 3, 5)]
        y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        return 116 * y ** (1 / 3) - 16

    steps = [lightness(bits_colour(2 + k / 4)) for k in range(33)]
    assert all(a > b for a, b in itertools.pairwise(steps))  # darker with every quarter bit


def test_the_mean_counts_weights_and_not_sublayers():
    parts = [{"bits": 4.0, "dense_bytes": 300}, {"bits": 8.0, "dense_bytes": 100}]
    assert mean_bits(parts) == 5.0


def test_rows_hold_what_was_measured_and_leave_out_the_rest():
    rows = {row[0]: row for row in summary_rows(report().data)}
    assert list(rows) == ["size", "bits per weight", "damage", "perplexity", "agreement", "prefill", "decode a token"]
    assert rows["size"][1:] == ("538.1 MB", "74.31 MB", "7.24x smaller")
    assert rows["decode a token"][1:] == ("15.5 ms", "8.3 ms", "1.87x")
    assert "95 %" in rows["damage"][3] and "nats/token" in rows["damage"][3]
    bare = {key: value for key, value in report().data.items() if key in ("model", "predicted", "unit")}
    assert [row[0] for row in summary_rows(bare)] == ["damage"]
    assert "not measured" in summary_rows(bare)[0][3]
    assert "nats/token" in _printed(closing(report().data))


# --- the page


def test_the_page_is_one_file_that_asks_for_nothing():
    page = report().html()
    assert "http:" not in page and "https:" not in page and "src=" not in page and "href=" not in page and "@import" not in page
    assert "default-src 'none'" in page and len(page) < 2_000_000


def test_data_cannot_become_markup():
    evil = "</script><script>document.title='x'</script>\u2028@@STYLE@@"
    made = fake_report(4, name=evil)
    page = made.html()
    assert evil not in page and html.escape(evil) in page
    inline = page.split('id="data">', 1)[1].split("</script>", 1)[0]
    assert json.loads(inline)["name"] == evil


def test_facets_hold_every_choice_of_the_table():
    table = fake_table()
    cells = {
        (facet["sites"][column], facet["options"][row]): (damage, refused)
        for facet in report_view(report().data)["facets"]
        for column, row, damage, _, _, refused in facet["cells"]
    }
    expected = {
        (id, "keep" if not c.options else str(c.options[0])): (c.damage, c.refused)
        for id, row in table.sites.items()
        for c in row.choices
    }
    assert cells == expected


def test_short_labels_tell_options_apart():
    def label(*lines: str) -> list[str]:
        return short_labels([tuple(Spec.parse(part) for part in line.split(" + ")) if line else () for line in lines])

    one_group = label("", "quantize{bits=4,group_size=64}", "quantize{bits=3,group_size=64}", "drop")
    assert one_group == ["keep", "4 bit", "3 bit", "drop"]
    assert label("quantize{bits=4,group_size=64}", "quantize{bits=4,group_size=32}") == ["4 bit g64", "4 bit g32"]
    assert label("lowrank{rank=8} + quantize{bits=4}", "lowrank{rank=16} + quantize{bits=4}") == [
        "lowrank 8 + 4 bit",
        "lowrank 16 + 4 bit",
    ]
    assert label("share{source=-1}", "share{source=-1,rank=2}") == ["share", "share rank 2"]
    assert label("share{source=-1}", "share{source=-2}") == ["share -1", "share -2"]
    assert label("a{bits=4}", "b{bits=4}") == ["a{bits=4}", "b{bits=4}"]  # what would be one label stays whole


def test_refusals_of_passes_and_of_the_table_are_all_there():
    remarks = report_view(report().data)["remarks"]
    refused = [r for r in remarks if r["kind"] == "refused"]
    assert len(refused) == sum(c.refused is not None for row in fake_table().sites.values() for c in row.choices)
    assert {r["text"] for r in refused} >= {"its branch is read by an output of the model"}
    assert sum(r["kind"] == "did" for r in remarks) == 31


def test_a_report_of_little_still_makes_a_page():
    table = OptionTable("u", 10, {"body": SiteRow("body", None, "linear", 10, 40)})
    made = Report.build(name="plain", table=table, plan=Plan({}))
    assert "plain" in made.html()
    view = report_view(made.data | {"table": {"of another": "version"}})
    assert view["facets"] == [] and view["blocks"] == []


def _browse(page: str, folder: Path, script: str = "", fragment: str = "", screenshot: bool = False) -> str:
    """The page's document after its scripts ran, or the bytes of its picture."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    out = [f"--screenshot={folder / 'page.png'}", "--window-size=1280,1600"] if screenshot else ["--dump-dom"]
    command = [CHROMIUM, *BROWSER_FLAGS, f"--user-data-dir={folder / 'profile'}", *out, f"{file.as_uri()}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        pytest.skip(f"Chromium does not start here: {done.stderr.strip()[-200:]}")
    return done.stdout


def test_the_page_runs_in_a_browser(tmp_path):
    dom = _browse(report().html(), tmp_path)
    assert 'data-ready="true"' in dom and "data-error" not in dom
    for id in ("figures", "plan", "pareto", "slider", "heat", "bytes", "scatter", "remarks", "details"):
        assert f'id="{id}"' in dom, id
    data = report().data
    sublayers = [sub for block in data["model"]["blocks"] for sub in block["sublayers"]]
    assert dom.count('class="dropped"') == sum(sub["dropped"] for sub in sublayers)
    assert dom.count('class="cell"') == len(data["model"]["other"]) + sum(not sub["dropped"] for sub in sublayers)
    choices = [choice for row in fake_table().sites.values() for choice in row.choices]
    assert dom.count('class="heat') == len(choices)
    assert dom.count('class="heat refused"') == sum(c.refused is not None for c in choices)
    assert dom.count('class="chosen"') > 150
    assert dom.count('class="point hit"') == len(data["pareto"])
    assert dom.count('class="pair"') == sum(len(a.get("pairs", ())) for a in data["analyses"])
    assert "&lt;b&gt;not markup&lt;/b&gt;" in dom
    assert "Parity of the written file" in dom and "onnxruntime" in dom


def test_the_slider_redraws_and_the_filter_filters(tmp_path):
    script = """
    const slider = document.getElementById("slider"), filter = document.getElementById("filter");
    const text = (selector) => document.querySelector(selector).textContent, set = document.documentElement.dataset;
    set.before = text("#plan svg"); set.chosenBefore = document.querySelectorAll(".chosen").length;
    slider.value = 0; slider.dispatchEvent(new Event("input"));
    set.after = text("#plan svg"); set.title = text("#shown"); set.command = text("#pareto code");
    set.yaml = document.querySelector("#pareto textarea").value;
    document.getElementById("back").click();
    set.back = text("#plan svg");
    filter.value = "block3. quantize"; filter.dispatchEvent(new Event("input"));
    set.rows = document.querySelectorAll("#remarks tbody tr").length;
    document.getElementById("kind").value = "did"; document.getElementById("kind").dispatchEvent(new Event("change"));
    set.did = document.querySelectorAll("#remarks tbody tr").length;
    document.querySelector("header button").click();
    set.finished = "yes";
    """
    dom = _browse(report().html(), tmp_path, script)
    found = {key: html.unescape(value) for key, value in re.findall(r'data-([\w-]+)="([^"]*)"', dom.split(">", 2)[1])}
    assert "error" not in found and found["finished"] == "yes"
    assert found["before"] == found["back"] != found["after"]
    smallest = min(report().data["pareto"], key=lambda p: p["bytes"])
    assert found["title"] == "Another plan of the curve" and found["command"] == f"--max-size {smallest['bytes']}"
    assert Plan.parse(found["yaml"]).choices == {s: (Spec.parse(o),) for s, o in smallest["plan"].items()}
    remarks = report_view(report().data)["remarks"]
    hit = [
        r
        for r in remarks
        if all(w in f"{r['pass']} {r['site']} {r['text']} {r['numbers']}".lower() for w in ("block3.", "quantize"))
    ]
    assert int(found["rows"]) == len(hit) and int(found["did"]) == sum(r["kind"] == "did" for r in hit) == 1


def test_a_point_can_be_linked_to(tmp_path):
    dom = _browse(report().html(), tmp_path, fragment="#point=0")
    smallest = min(report().data["pareto"], key=lambda p: p["bytes"])
    assert f"--max-size {smallest['bytes']}" in dom and "data-error" not in dom


def test_the_page_of_a_model_without_blocks_runs_too(tmp_path):
    table = OptionTable(
        "u", 10, {"body": SiteRow("body", None, "linear", 10, 40, (Choice(Spec.of("quantize", bits=4), -1e-3, 5),))}
    )
    dom = _browse(Report.build(name="plain", table=table, plan=Plan({})).html(), tmp_path)
    assert 'data-ready="true"' in dom and "data-error" not in dom and "no residual stream" in dom


def shared_report() -> Report:
    """Block 1's attention reads the weights of block 0's, and block 2's has a window."""
    made = fake_report(3)
    made.data["plan"] |= {"block1.attention": ["share{source=-1}"], "block2.attention": ["window{size=64}"]}
    for block, bits in ((1, 0.0), (2, 4.0)):
        made.data["model"]["blocks"][block]["sublayers"][0] |= {"bits": bits, "bytes": 0, "dropped": False}
    return made


def test_the_strip_tells_shared_weights_from_few_bits():
    plain = _printed(Strip(shared_report().data["model"]))
    assert "=" in plain.splitlines()[0] and "= = another's weights" in plain
    assert "another's" not in _printed(Strip(fake_report(3).data["model"]))


def test_the_page_marks_what_computes_otherwise(tmp_path):
    dom = _browse(shared_report().html(), tmp_path)
    assert "data-error" not in dom and dom.count('class="changed"') == 2
    assert dom.count(">=</text>") == 1 and "a pale one reads another's weights" in dom


def test_the_page_has_something_to_look_at(tmp_path):
    _browse(report().html(), tmp_path, screenshot=True)
    image = pytest.importorskip("PIL.Image").open(tmp_path / "page.png")
    assert image.size == (1280, 1600) and len(set(image.convert("RGB").resize((320, 400)).getdata())) > 100


# --- progress


def test_lines_say_the_share_and_the_time_left(monkeypatch):
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr("lwcompile.progress.time.monotonic", lambda: next(clock))
    console = Console(width=100, color_system=None)
    with console.capture() as captured, LineProgress(console).task("scoring", 4) as task:
        task.advance()
        task.advance(2)
    assert captured.get().splitlines() == [
        "scoring: 25 %, 1 min 30 s left",
        "scoring: 75 %, 20 s left",
        "scoring: done in 1 min 30 s",
    ]
    with console.capture() as captured, LineProgress(console).task("scoring", 1000) as task:
        task.advance()  # too little to tell by
    assert captured.get().splitlines()[0] == "scoring: 0 %"


def test_bars_nest_and_leave_one_line_each():
    console = Console(width=100, force_terminal=True, color_system=None)
    progress = terminal_progress(console)
    assert isinstance(progress, BarProgress)
    with console.capture() as captured:
        with progress.task("outer", 2) as outer:
            with progress.task("inner", 3) as inner:
                inner.advance(3)
            outer.advance()
            assert [task.completed for task in progress.bars.tasks] == [1]
        with pytest.raises(ValueError, match="stop"), progress.task("failing", 1):
            raise ValueError("stop")
    text = captured.get()
    assert text.count("✓ outer") == 1 and "✓ inner" not in text and "✓ failing" not in text
    assert progress.bars.tasks == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3900, "1 h 5 min")]
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_a_plan_of_a_fake_is_a_plan():
    """The fake keeps the table's own rules, or nothing above means anything."""
    table = fake_table(6)
    assert table.violations(fake_plan(table, 1e-9, ("block2.attention",)).choices) == []
