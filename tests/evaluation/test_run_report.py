"""`cyclealign report`: what it reads, what it draws, and that no text of a model or judge becomes markup or script."""

import asyncio
import base64
import gzip
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from datasets import Dataset

from cyclealign_trl import DemonstrationPool, RankingResult, Usage, write_run_report
from cyclealign_trl.cli import main
from cyclealign_trl.cycle.interaction import open_interaction, resolve
from cyclealign_trl.cycle.interaction_log import InteractionLog
from cyclealign_trl.evaluation.run_report.charts import ticks
from cyclealign_trl.evaluation.run_report.curves import MAX_POINTS, Curve, curves_of, panels, shorten
from cyclealign_trl.evaluation.run_report.documents import read_markdown
from cyclealign_trl.evaluation.run_report.run_data import RunData, read_run, short_names
from cyclealign_trl.training.run_file import continue_run_file, read_run_file
from tests.cycle.stubs import DigestRanker, make_trainer, prompts
from tests.evaluation.browser import CHROMIUM, open_browser

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    '"><img src="https://example.org/pixel.png" onerror="window.hacked = 3">',
    "<svg onload=window.hacked=4><style>*{display:none}</style>",
    "<!-- <script> ]]> {{ 7 * 7 }} {% raw %} ${7} \u2028 \u2029 &lt;b&gt;",
    "right\u202eleft \u2066isolate\u2069 null\u0000 bell\u0007 escape\u001b[31m",
    "a" * 100_000,
)
VOID = {"meta", "input", "line", "path", "circle"}


class Reader(HTMLParser):
    """Collect tags, attributes, and the text outside of scripts and styles."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)


def read_page(path):
    reader = Reader()
    reader.feed(Path(path).read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def unpack(path, name="index"):
    (packed,) = re.findall(rf'id="{name}">([\w+/=]*)</script>', Path(path).read_text(encoding="utf-8"))
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def write_history(folder, entries, step=9, name="."):
    (folder / name).mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "log_history": entries}
    (folder / name / "trainer_state.json").write_text(json.dumps(state))


def hostile_run(folder):
    """Write a run whose prompts, completions, failures, names of metrics and settings attack the page."""
    folder.mkdir()
    for step, text in enumerate(HOSTILE):
        interaction = open_interaction(f"{text} {step}", [text, f"{text}!", "plain"])
        outcome = RankingResult((2, 0, 1), improved_completion=text, usage=Usage(5, 5, cost=0.1))
        result = resolve(interaction, outcome, [-1.0, -2.0, -0.5])
        InteractionLog(folder).write(step, 0, [result])
    write_history(folder, [{"step": 1, "loss": 1.0, HOSTILE[1]: 2.0, HOSTILE[2]: float("nan")}])
    run = {"version": 1, "trainer": HOSTILE[0], "model": HOSTILE[1], "ranker": HOSTILE[2], "changed": [HOSTILE[3]],
           "settings": {HOSTILE[3]: HOSTILE[4]}, "versions": {HOSTILE[5]: HOSTILE[5]}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    held_out = [{"prompt": HOSTILE[0], "before": [*HOSTILE], "after": ["\ud800 lone \udc00", HOSTILE[2]]}]
    (folder / "held_out.json").write_text(json.dumps(held_out))
    rows = "\n".join(f"| {text[:200]} | 0.5 [0.4, 0.6] |" for text in HOSTILE)
    (folder / "report.md").write_text(f"# {HOSTILE[1]}\n\n| a | b |\n|---|---|\n{rows}\n\n{HOSTILE[2]}\n")
    return folder


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    folder = hostile_run(tmp_path_factory.mktemp("hostile") / "<img src=x onerror=alert(1)>")
    return write_run_report(folder, folder.parent / "page.html")


# Without a browser


def test_nothing_in_a_run_becomes_markup(hostile_page):
    page = read_page(hostile_page)
    plain = {"html", "head", "meta", "title", "style", "body", "a", "header", "p", "h1", "bdi", "nav", "main", "dl",
             "div", "dt", "dd", "section", "h2", "h3", "h4", "figure", "figcaption", "span", "svg", "line", "text",
             "path", "circle", "ul", "li", "details", "summary", "noscript", "input", "select", "option", "button",
             "article", "table", "caption", "thead", "tbody", "tr", "th", "td", "footer", "script"}  # fmt: skip
    assert set(page.tags) <= plain
    assert page.tags.count("style") == 1
    assert not [one for one in page.attributes if one[1].startswith("on") or one[1] in ("style", "src", "srcset")]
    assert {value for _, name, value in page.attributes if name == "href"} == {
        "#main", "#curves", "#interactions", "#before-after", "#evaluations", "#settings"
    }  # fmt: skip
    text = "".join(page.text)
    assert HOSTILE[0] in text
    assert HOSTILE[2] in text
    assert "right[U+202E]left [U+2066]isolate" in text
    raw = hostile_page.read_text(encoding="utf-8")
    assert not re.search("[\u0000-\u0008\u000b-\u001f\u007f\u2028-\u202e\u2066-\u2069]", raw.partition("<script>")[0])


def test_scripts_hold_compressed_data_and_one_program_that_the_policy_names(hostile_page):
    raw = hostile_page.read_text(encoding="utf-8")
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", raw, re.DOTALL)
    *data, (attributes, program) = scripts
    assert attributes == ""
    assert all('type="text/plain"' in attributes and re.fullmatch(r"[\w+/=]+", text) for attributes, text in data)
    (policy,) = [
        value for _, name, value in read_page(hostile_page).attributes if name == "content" and "src" in value
    ]
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "innerHTML" not in program
    assert "https://" not in program


def test_all_texts_are_in_the_data_unchanged(hostile_page):
    index = unpack(hostile_page)
    block = unpack(hostile_page, "block-0")
    completions = [group[1][0][1][0][2][0] for group in block]
    assert completions == list(HOSTILE)
    assert len(index["groups"]) == len(HOSTILE)
    assert index["held"][0][1][0][2][0] == "\ud800 lone \udc00"


def test_the_command_writes_the_page_and_reports_errors_in_one_line(tmp_path, capsys):
    write_history(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    main(["report", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.html").as_uri() in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "has nothing to report"), ("missing", "There is no folder")):
        with pytest.raises(SystemExit, match=message):
            main(["report", str(tmp_path / folder)])
    with pytest.raises(ValueError, match="max_prompts must be at least 1, got 0"):
        write_run_report(tmp_path / "run", max_prompts=0)
    with pytest.raises(ValueError, match="at least one output directory"):
        write_run_report([])


# What is read


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"demonstration_scope": "run", "max_demonstrations": 3},
        {"demonstration_scope": "run", "demonstration_selection": "random", "max_demonstrations": 2},
        {"ranking_lookahead": 1},
        {"stop_on_agreement": True},
    ],
    ids=["prompt", "run", "random", "lookahead", "stop"],
)
def test_replayed_demonstrations_are_those_that_the_ranker_was_shown(tmp_path, changes):
    ranker = DigestRanker(fail=lambda request: "timeout" if "3:" in request.prompt else None)
    make_trainer(tmp_path, ranker, prompts(6), num_interactions=3, num_train_epochs=2, stub_generation=True,
                 **changes).train()  # fmt: skip
    run = read_run(tmp_path, "run")
    asked = {(request.prompt, request.completions): request.demonstrations for request in ranker.requests}
    found = 0
    for row, shown in zip(run.rows, run.shown, strict=True):
        if shown is None:
            continue
        texts = tuple(dict.fromkeys(row["completions"]))
        demonstrations = asked[row["prompt"], texts]
        assert len(demonstrations) == len(shown)
        for source, demonstration in zip(shown, demonstrations, strict=True):
            if source < 0:
                assert run.initial_demonstrations[-1 - source] == demonstration
                continue
            found += 1
            origin = run.rows[source]
            assert origin["prompt"] == demonstration.prompt
            best_first = [demonstration.completions[index] for index in demonstration.order]
            assert best_first == [origin["completions"][index] for index in origin["agreement"]]
    assert found > 3
    assert run.notes == []


def test_a_run_without_a_record_shows_no_demonstrations_and_says_so(tmp_path):
    saved = Path(__file__).parents[1] / "saved_run" / "files" / "run"
    shutil.copytree(saved, tmp_path / "run")
    run = read_run(tmp_path / "run", "run")
    assert (len(run.rows), run.shown) == (12, [])
    text = "".join(read_page(write_run_report(tmp_path / "run")).text)
    assert "The demonstrations that the ranker was shown are not known" in text
    assert "No run.json was found" in text


def test_run_json_has_settings_and_versions_but_no_secret(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.args.hub_token = "hf_secret"
    trainer.args.model_init_kwargs = {"token": "hf_secret", "revision": "main"}
    trainer.args.vllm_server_base_url = "http://user:sk-secret@host/v1"
    trainer.train()
    text = (tmp_path / "run.json").read_text()
    assert "secret" not in text
    run = read_run_file(tmp_path)
    assert run["trainer"] == "CycleAlignTrainer"
    assert run["settings"]["num_generations"] == 3
    assert {"num_interactions", "learning_rate"} <= set(run["changed"])
    assert not {"sft_weight", "output_dir", "bf16"} & set(run["changed"])
    assert {"torch", "transformers", "python"} <= run["versions"].keys()
    assert DemonstrationPool.from_settings(run["demonstrations"]).static == trainer.demonstrations.static
    trainer.args.learning_rate = 0.5
    continue_run_file(tmp_path, trainer.args)
    resumed = read_run_file(tmp_path)
    assert (resumed["settings"]["learning_rate"], resumed["started"]) == (0.5, run["started"])


def test_the_longest_history_is_read_but_not_that_of_an_earlier_run(tmp_path):
    write_history(tmp_path, [{"step": 2, "loss": 2.0}], 2)
    write_history(tmp_path, [{"step": 4, "loss": 4.0}, {"step": 3, "loss": 3.0}], 4, "checkpoint-4")
    write_history(tmp_path, [{"step": 8, "loss": 8.0}], 8, "checkpoint-8")
    (tmp_path / "checkpoint-8" / "cyclealign.earlier").touch()
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9, "log_hi')
    assert [entry["step"] for entry in read_run(tmp_path, "run").history] == [3, 4]


def test_names_of_runs_differ():
    assert short_names([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]
    assert short_names([Path("out/pro"), Path("out/rrhf")]) == ["pro", "rrhf"]


# What is drawn


def test_bounds_become_the_band_of_their_metric():
    values = {"win_rate/rate": 0.5, "win_rate/low": 0.4, "win_rate/high": 0.6, "win_rate/length": 90.0,
              "ranking_accuracy/full": 0.7, "ranking_accuracy/full_low": 0.6,
              "ranking_accuracy/full_high": 0.8}  # fmt: skip
    run = RunData("run", history=[{"step": step, **values} for step in (1, 2)])
    assert curves_of(run) == {
        "win_rate/rate": Curve([1, 2], [0.5, 0.5], [0.4, 0.4], [0.6, 0.6]),
        "win_rate/length": Curve([1, 2], [90.0, 90.0]),
        "ranking_accuracy/full": Curve([1, 2], [0.7, 0.7], [0.6, 0.6], [0.8, 0.8]),
    }
    known, others = panels([run])
    assert [len(panel.series) for panel in known] == [1, 1]
    assert [panel.title for panel in others] == ["win_rate/length"]


def test_long_curves_are_means_of_successive_values():
    curve = shorten(Curve(range(1000), [float(value) for value in range(1000)]))
    assert len(curve.steps) == 200 <= MAX_POINTS
    assert (curve.points_per_mean, curve.steps[0], curve.values[0], curve.steps[-1]) == (5, 4, 2.0, 999)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.29, 0.9), (3, 3), (0, 0), (-5, 1e6), (1e-9, 2e-9)])
def test_ticks_enclose_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 7


def test_markdown_tables_keep_their_cells():
    text = (
        "# Title\n\nSome *text*\ngoes on.\n\n| name | rate |\n| :-- | --: |\n| a \\| b | 0.5 [0.4, 0.6] |\n| c | - |\n"
    )
    heading, paragraph, table = read_markdown(text)
    assert (heading.text, paragraph.text) == ("Title", "Some *text* goes on.")
    assert table.table.rows == [["a | b", "0.5 [0.4, 0.6]"], ["c", "-"]]
    assert table.table.numeric == [False, True]


def test_a_page_of_many_prompts_keeps_the_given_number(tmp_path):
    make_trainer(tmp_path, dataset=prompts(8), stub_generation=True).train()
    path = write_run_report(tmp_path, max_prompts=3)
    assert len(unpack(path)["groups"]) == 3
    assert "leaves out 5" in "".join(read_page(path).text)


# In a browser


def in_browser(tmp_path, visit):
    async def run():
        async with open_browser(tmp_path / "profile") as page:
            await visit(page)
            assert page.errors == []
            assert {url.partition(":")[0] for url in page.requests} <= {"file"}

    asyncio.run(run())


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: chromium)")


@needs_browser
def test_hostile_texts_stay_texts_in_a_browser(tmp_path, hostile_page):
    async def visit(page):
        await page.open(hostile_page)
        for number, text in enumerate(HOSTILE):
            await page.run(f"document.querySelector('#row-{number}').click()")
            await page.wait_for(f"document.querySelector('.detail').dataset.group === '{number}' && "
                                "document.querySelector('.detail .completion.improved')")  # fmt: skip
            shown = await page.run("document.querySelector('.completion.improved .text').textContent")
            if len(text) < 1000 and number != 5:
                assert shown == re.sub("[\u2028\u2029]", lambda match: f"[U+{ord(match[0]):04X}]", text)
        assert shown == "a" * 2000 + "…"
        await page.run("document.querySelector('.completion.improved .more').click()")
        assert await page.run("document.querySelector('.completion.improved .text').textContent.length") == 100_000
        assert await page.run("window.hacked") is None
        assert (
            await page.run("document.images.length + document.querySelectorAll('svg[onload], main style').length") == 0
        )

    in_browser(tmp_path, visit)


@needs_browser
def test_keys_and_filters_work_at_phone_width(tmp_path):
    make_trainer(tmp_path / "one", dataset=prompts(6), num_interactions=3, stub_generation=True).train()
    path = write_run_report(tmp_path / "one")

    async def visit(page):
        await page.open(path, width=360, height=740, dark=True)
        await page.wait_for("document.querySelector('.steps')")
        assert await page.run("document.documentElement.scrollWidth") == 360
        await page.run("document.querySelector('.list').focus()")
        await page.press("ArrowDown")
        await page.wait_for("document.querySelector('.detail').dataset.group === '1'")
        active = "document.getElementById(document.querySelector('.list').getAttribute('aria-activedescendant'))"
        assert await page.run(f"{active}.getAttribute('aria-selected')") == "true"
        await page.wait_for("document.querySelector('.steps button[tabindex=\"0\"]')")
        await page.run("document.querySelector('.steps button').focus()")
        for _ in range(5):
            await page.press("ArrowRight")
        assert await page.run("document.activeElement.textContent") == "3"
        assert "interaction 3 of the prompt" in await page.run("document.querySelector('.detail .meta').textContent")
        await page.run("document.querySelector('.chart').focus()")
        await page.press("ArrowLeft")
        assert "step" in await page.run("document.querySelector('.at').textContent")
        await page.run("document.querySelector('#find').value = 'question 4'; "
                       "document.querySelector('#find').dispatchEvent(new Event('input'))")  # fmt: skip
        await page.wait_for("document.querySelector('.count').textContent === '1 of 6 prompts'")

    in_browser(tmp_path, visit)


@needs_browser
def test_runs_are_shown_beside_each_other(tmp_path):
    for name in ("one", "two"):
        make_trainer(tmp_path / name, dataset=prompts(4), stub_generation=True).train()
    path = write_run_report([tmp_path / "one", tmp_path / "two"], tmp_path / "both.html")
    assert Dataset.from_list(read_run(tmp_path / "one", "one").rows).num_rows == 8

    async def visit(page):
        await page.open(path)
        await page.wait_for("document.querySelectorAll('.pane').length === 2")
        assert await page.run("document.querySelector('.detail').innerText.includes('two')")

    in_browser(tmp_path, visit)
