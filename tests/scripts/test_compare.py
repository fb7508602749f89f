"""`cyclealign compare`: files of replies and models, a judge over HTTP, an estimate, and wrong use."""

import json

import pytest

from cyclealign_trl.chat import client
from cyclealign_trl.cli import main
from cyclealign_trl.demo.loopback import LoopbackEndpoint
from tests.evaluation.test_comparison import Judge
from tests.evaluation.test_evaluate_models import folder  # noqa: F401
from tests.rankers.test_reward_model import warnings_in


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)


@pytest.fixture
def files(tmp_path):
    """Prompts in two groups, and a file of replies for each model: the replies of the first are better."""
    prompts = [{"prompt": f"question {index}", "topic": "even" if index % 2 == 0 else "odd"} for index in range(8)]
    for name, merit in (("new", 7), ("old", 3)):
        rows = [{"prompt": row["prompt"], "completion": f"merit {merit}, {row['prompt']}"} for row in prompts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return tmp_path


@pytest.fixture
def judge():
    respond = Judge()
    with LoopbackEndpoint(respond) as endpoint:
        respond.url = endpoint.base_url
        yield respond


def compare(files, judge, *arguments):
    main(["compare", f"new={files}/new.jsonl", f"old={files}/old.jsonl", "--dataset_name", f"{files}/prompts.jsonl",
          "--group_column", "topic", "--ranker_model", "judge", "--ranker_base_url", judge.url,
          "--output_dir", f"{files}/out", *arguments])  # fmt: skip


def test_compares_two_files_of_replies(files, judge, capsys, caplog):
    compare(files, judge)
    output = capsys.readouterr().out
    assert "new against old (overall): 100.0 % wins, 95% interval 100.0 to 100.0. Judge: judge, both orders." in output
    assert judge.calls == 16
    rows = [json.loads(line) for line in (files / "out" / "comparisons.jsonl").read_text().splitlines()]
    assert {row["verdict"] for row in rows} == {"win"}
    assert {row["group"] for row in rows} == {"even", "odd"}
    report = json.loads((files / "out" / "report.json").read_text())
    assert report["criteria"]["overall"]["groups"]["odd"]["win"] == 4
    assert "sk-secret" not in "".join(path.read_text(errors="replace") for path in (files / "out").glob("*.json*"))
    assert warnings_in(caplog) == []
    compare(files, judge)
    assert judge.calls == 16
    assert "16 verdicts were stored before." in capsys.readouterr().out


def test_criteria_are_judged_one_after_another(files, judge, capsys):
    compare(files, judge, "--criteria", "helpfulness", "harmlessness", "--max_samples", "2")
    output = capsys.readouterr().out
    assert "(helpfulness): 100.0 % wins" in output
    assert "(harmlessness): 100.0 % wins" in output
    assert judge.calls == 2 * 2 * 4


def test_an_estimate_asks_nothing(files, judge, capsys):
    compare(files, judge, "--estimate", "--ranker_kwargs", '{"prices": {"input": 1, "output": 2}}')
    output = capsys.readouterr().out
    assert output.startswith("16 calls, about ")
    assert "$0.0" in output
    assert judge.calls == 0


def test_compares_models_with_a_reward_model(folder, tmp_path, capsys):  # noqa: F811
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one?"}\n{"prompt": "two?"}\n')
    arguments = ["compare", f"{folder}/m0", f"{folder}/a0", "--dataset_name", f"{tmp_path}/prompts.jsonl",
                 "--output_dir", f"{tmp_path}/out", "--max_new_tokens", "6", "--max_prompt_length", "60",
                 "--device", "cpu", "--ranker_factory", "cyclealign_trl.RewardModelRanker",
                 "--ranker_kwargs", json.dumps({"model": f"{folder}/rm", "device": "cpu"})]  # fmt: skip
    main(arguments)
    assert "both orders" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["criteria"]["verdicts"]["prompts"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--criteria", "niceness"], "must be one of 'overall', 'helpfulness', 'harmlessness'"),
        (["--criteria", "overall", "overall"], "must be distinct"),
        (["--dataset_name", "missing.jsonl"], "missing.jsonl"),
        (["--ranker_kwargs", '{"improve": true}'], "unknown argument 'improve'"),
        (["--ranker_kwargs", '{"api_key": "sk"}'], "must not contain an API key"),
    ],
)
def test_wrong_use_is_one_line(files, judge, changes, message):
    with pytest.raises(SystemExit) as stop:
        compare(files, judge, *changes)
    assert message in stop.value.code
    assert "\n" not in stop.value.code
    assert judge.calls == 0


@pytest.mark.parametrize("models", [[], ["one"], ["one", "two", "three"]])
def test_two_models_are_compared(models, capsys):
    with pytest.raises(SystemExit):
        main(["compare", *models, "--ranker_model", "judge"])
    assert f"two models are compared, got {len(models)}" in capsys.readouterr().err
