"""Tables of completions on the console and in trackers, whose pages must not render what a model wrote."""

import html
import json
import re

import pytest

from cyclealign_trl import RankingFailure, RankingResult
from cyclealign_trl.cycle.completion_tables import TABLE, _markdown_table, track_completions
from cyclealign_trl.cycle.interaction import open_interaction, resolve
from cyclealign_trl.cycle.step_metrics import InteractionRecord
from tests.cycle.stubs import make_trainer

HOSTILE = (
    "<script>alert(1)</script>",
    '| cell | <img src="https://evil.test/x.png"> [link](javascript:alert(1))',
    "![tracker](https://evil.test/y.png) `code`\n\n# Heading\n---\n\x1b[31mred &lt;b&gt; **bold**",
)
COLUMNS = [
    "step", "prompt", "completion", "ranker_rank", "policy_rank", "agreed", "improved_completion", "failure"
]  # fmt: skip
PROMPT = [{"role": "user", "content": "<b>Hi</b>"}]


def record(outcome, prompt=PROMPT):
    result = resolve(open_interaction(prompt, HOSTILE), outcome, [-1.0, -3.0, -2.0])
    return InteractionRecord(result, lengths=(1,) * 3, num_clipped=0, prompt_truncated=False, improved_truncated=False)


RECORDS = [
    record(RankingResult((0, 1, 2), improved_completion="<i>better</i>")),
    record(RankingFailure("timeout"), prompt="plain"),
]


def shown(text):
    return text.replace("\x1b", "\ufffd")


def rows_of(records):
    """Return the expected cells: the policy orders the completions 0, 2, 1."""
    return [
        [7, prompt, shown(HOSTILE[index]), rank, place, agreed, improved, failure]
        for prompt, improved, failure, ranks in (
            ("user: <b>Hi</b>", "<i>better</i>", None, (1, 3, 2)),
            ("plain", None, "timeout", (None, None, None)),
        )
        for index, rank, place, agreed in zip(
            (0, 2, 1), ranks, (1, 2, 3), (ranks[0] == 1, False, ranks[0] == 1), strict=True
        )
    ]


def test_tensorboard_shows_text_as_it_is():
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    texts = [shown(text) for text in HOSTILE]
    page = plugin_util.markdown_to_safe_html(_markdown_table(["a", "b"], [texts[:2], [texts[2], None]]))
    assert set(re.findall(r"<(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td", "br"}
    cells = [html.unescape(cell.replace("<br>", "\n")) for cell in re.findall(r"<td>(.*?)</td>", page, re.DOTALL)]
    assert cells == [*texts, ""]


def test_a_table_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, log_completions=True, report_to="tensorboard", max_steps=2)
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    tables = events.Tensors(f"{TABLE}/text_summary")
    assert [event.step for event in tables] == [1, 2]
    text = tables[0].tensor_proto.string_val[0].decode()
    assert text.count("\n") == 1 + 2 * 3  # a header, and three completions of two prompts
    assert html.unescape(text.splitlines()[0]) == f"| {' | '.join(COLUMNS)} |"
    assert "Question" in text
    assert events.Scalars("train/loss")


def test_a_table_in_wandb(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with wandb.init(project="test", dir=tmp_path) as run:
        track_completions(RECORDS, 7, ["wandb"], [])
        media = list((tmp_path / "wandb").glob(f"offline-run-*/files/media/table/{TABLE}_*.table.json"))
        assert run.summary["train/global_step"] == 7
    (path,) = media
    table = json.loads(path.read_text())
    assert table["columns"] == COLUMNS
    assert table["data"] == rows_of(RECORDS)


def test_a_table_in_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path)
    trackio.init(project="test", name="run", embed=False)
    track_completions(RECORDS, 7, ["trackio"], [])
    trackio.finish()
    (log,) = SQLiteStorage.get_logs("test", "run")
    assert log["train/global_step"] == 7
    rows = log[TABLE]["_value"]
    assert [list(row.values()) for row in rows] == rows_of(RECORDS)
    assert list(rows[0]) == COLUMNS


def test_nothing_is_sent_without_a_tracker():
    track_completions(RECORDS, 7, [], [])
    track_completions([], 7, ["tensorboard"], [])
