"""The interaction log: writing and reading, and its export as training data."""

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from cyclealign_trl import (
    FunctionRanker,
    RankingConfig,
    RankingFailure,
    RankingResult,
    RankingTrainer,
    Usage,
    export_interactions,
)
from cyclealign_trl.cycle.interaction import InteractionResult, open_interaction, resolve
from cyclealign_trl.cycle.interaction_log import COLUMN_DESCRIPTIONS, InteractionLog, schema
from cyclealign_trl.scripts import export
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import DigestRanker, make_trainer, prompts, read_log

TYPES = ("preference", "ranked", "prompt-completion")

# Writing and reading


def results(prompt):
    """Return the results of a ranked and of a failed interaction."""
    interaction = open_interaction(prompt, ["a", "b"])
    usage = Usage(10, 5, 2, 0.25, 3)
    ranking = RankingResult((1, 0), improved_completion="better", usage=usage, consistency=0.5)
    return [resolve(interaction, outcome, [-1.0, -2.0]) for outcome in (ranking, RankingFailure("timeout"))]


@pytest.mark.parametrize("prompt", ["Q", [{"role": "user", "content": "Q"}]], ids=["text", "conversational"])
def test_written_results_are_read(tmp_path, prompt):
    log = InteractionLog(tmp_path)
    log.write(7, 1, results(prompt))
    ranked, failed = log.read().to_pylist()
    assert ranked == {
        "step": 7,
        "interaction": 1,
        "prompt": prompt,
        "completions": ["a", "b"],
        "black_box_order": [1, 0],
        "white_box_order": [0, 1],
        "agreement": [1],
        "ranks": [1, 0],
        "improved_completion": "better",
        "failure": None,
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "cached_tokens": 2,
            "cost": 0.25,
            "attempts": 3,
            "cached": False,
        },
        "consistency": 0.5,
    }
    assert (failed["failure"], failed["white_box_order"]) == ("timeout", [0, 1])
    missing = ("black_box_order", "agreement", "ranks", "improved_completion", "usage", "consistency")
    assert [failed[name] for name in missing] == [None] * 6


def test_files_of_all_processes_are_read_by_step(tmp_path):
    for process_index in (1, 0):
        for step in (10, 2):
            prompt = f"{step} of {process_index}"
            InteractionLog(tmp_path, process_index).write(step, 0, [InteractionResult(prompt, ("a", "b"), (0, 1))])
    log = InteractionLog(tmp_path)
    assert [path.name for path in log.paths] == [
        "step-000002-0.parquet",
        "step-000002-1.parquet",
        "step-000010-0.parquet",
        "step-000010-1.parquet",
    ]
    assert log.read(["step", "prompt"]).to_pydict() == {
        "step": [2, 2, 10, 10],
        "prompt": ["2 of 0", "2 of 1", "10 of 0", "10 of 1"],
    }


def test_a_repeated_step_is_overwritten(tmp_path):
    log = InteractionLog(tmp_path)
    log.write(0, 0, results("first"))
    log.write(0, 0, results("second"))
    assert log.read(["prompt"]).to_pydict() == {"prompt": ["second"] * 2}


def test_a_step_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    def write_half(table, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", write_half)
    log = InteractionLog(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        log.write(0, 0, results("Q"))
    assert list(log.folder.iterdir()) == []


def test_reading_without_a_log_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass the output directory of a CycleAlign run"):
        InteractionLog(tmp_path).read()


def test_a_log_without_the_files_of_another_machine_warns(tmp_path, caplog):
    for process in (0, 1, 3):
        InteractionLog(tmp_path, process).write(0, 0, results("Q"))
    log = InteractionLog(tmp_path)
    assert len(log.read()) == 6
    assert caplog.messages == []  # a published log has no run.json
    (tmp_path / "run.json").write_text('{"version": 1, "processes": 4}')
    assert len(log.read()) == 6
    (message,) = caplog.messages
    assert message.startswith(f"{log.folder} has no interactions of processes 2, of 4 in the run. If its machines had")
    InteractionLog(tmp_path, 2).write(0, 0, results("Q"))
    assert len(log.read()) == 8
    assert len(caplog.messages) == 1


def test_every_column_is_described():
    assert list(COLUMN_DESCRIPTIONS) == schema(conversational=False).names == schema(conversational=True).names


# Export


@pytest.fixture(scope="module", params=[False, True], ids=["text", "conversational"])
def run(request, tmp_path_factory):
    """Train two steps of four interactions, one of which fails. Return the output directory."""
    folder = tmp_path_factory.mktemp("run")
    failed = []

    def fail(request):
        if not failed:
            failed.append(request)
            return "timeout"
        return None

    trainer = make_trainer(
        folder,
        DigestRanker(fail=fail),
        prompts(4, conversational=request.param),
        per_device_train_batch_size=4,
        stub_generation=True,
    )
    trainer.train()
    return folder


def text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def test_each_type_matches_the_log(run):
    rows = [row for row in read_log(run) if row["black_box_order"] is not None]
    assert len(rows) == 7
    exported = {to: export_interactions(run, to) for to in TYPES}
    for index, row in enumerate(rows):
        best, *_, worst = row["black_box_order"]
        pair, ranked, imitated = (exported[to][index] for to in TYPES)
        assert pair["prompt"] == ranked["prompt"] == imitated["prompt"] == row["prompt"]
        assert (text(pair["chosen"]), text(pair["rejected"])) == (row["completions"][best], row["completions"][worst])
        assert [text(completion) for completion in ranked["completions"]] == row["completions"]
        assert sorted(range(3), key=ranked["ranks"].__getitem__) == row["black_box_order"]
        assert text(imitated["completion"]) == row["improved_completion"]
    for to, dataset in exported.items():
        assert dataset.info.description.endswith(f"8 interactions, 7 exported as {to}")


def test_the_top_ranked_completion_replaces_a_missing_improved_one(tmp_path):
    make_trainer(tmp_path, DigestRanker(improve=False), prompts(2), stub_generation=True).train()
    rows = read_log(tmp_path)
    for row, exported in zip(rows, export_interactions(tmp_path, "prompt-completion"), strict=True):
        assert exported["completion"] == row["completions"][row["black_box_order"][0]]


def test_ties_are_kept_and_complete_ties_make_no_preference(tmp_path):
    def length(completions, **_):
        return [float(len(text) > 4) for text in completions]

    make_trainer(tmp_path, FunctionRanker(length), prompts(8), stub_generation=True, num_interactions=2).train()
    rows = read_log(tmp_path)
    tied = [row for row in rows if len(set(row["ranks"])) == 1]
    mixed = [row for row in rows if sorted(row["ranks"]) in ([0, 0, 1], [0, 1, 1])]
    assert tied
    assert mixed
    assert [row["ranks"] for row in export_interactions(tmp_path, "ranked")] == [row["ranks"] for row in rows]
    preferences = export_interactions(tmp_path, "preference")
    assert len(preferences) == len(rows) - len(tied)
    assert all(len(row["chosen"]) > 4 >= len(row["rejected"]) for row in preferences)


def settings(folder):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def make_dpo_trainer(dataset, folder):
    from trl import DPOConfig, DPOTrainer

    make_model().save_pretrained(folder / "policy")  # DPOTrainer loads the reference by the policy's name
    config = DPOConfig(**settings(folder), max_length=128, bf16=False)
    policy = str(folder / "policy")
    return DPOTrainer(policy, args=config, train_dataset=dataset, processing_class=make_tokenizer())


def make_ranking_trainer(dataset, folder):
    config = RankingConfig(**settings(folder), max_prompt_length=64, max_completion_length=32)
    return RankingTrainer(make_model(), config, train_dataset=dataset, processing_class=make_tokenizer())


def make_sft_trainer(dataset, folder):
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**settings(folder), max_length=128, bf16=False)
    return SFTTrainer(make_model(), args=config, train_dataset=dataset, processing_class=make_tokenizer())


# TRL's configs read deprecated names of transformers.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("to", "make"),
    [*zip(TYPES, (make_dpo_trainer, make_ranking_trainer, make_sft_trainer), strict=True)],
    ids=TYPES,
)
def test_other_trainers_train_on_the_exported_data(run, tmp_path, monkeypatch, capsys, to, make):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    export.main([str(run), "--to", to, "--output_dir", str(tmp_path / "data")])
    assert "8 interactions, 7 exported" in capsys.readouterr().out
    trainer = make(load_dataset(str(tmp_path / "data"), split="train"), tmp_path / "out")
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)


def test_data_is_written_to_the_run_by_default(run, capsys):
    export.main([str(run)])
    assert (run / "preference" / "train.parquet").is_file()
    assert str(run / "preference" / "train.parquet") in capsys.readouterr().out


def test_a_missing_log_exits_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main([str(tmp_path)])
    assert str(stop.value) == (
        f"cyclealign export: error: No interaction log in {tmp_path / 'interactions'}. "
        "Train first, or pass the output directory of a CycleAlign run."
    )


def test_exporting_nothing_exits_with_one_line(tmp_path):
    def same(completions, **_):
        return [0.0 for _ in completions]

    make_trainer(tmp_path, FunctionRanker(same), prompts(2), stub_generation=True).train()
    with pytest.raises(SystemExit) as stop:
        export.main([str(tmp_path)])
    assert str(stop.value) == (
        f"cyclealign export: error: Nothing to export: {tmp_path / 'interactions'}: 4 interactions, 0 exported as "
        "preference."
    )


def test_an_unknown_type_raises(tmp_path):
    with pytest.raises(
        ValueError, match=r"to must be one of .*'preference', 'ranked', 'prompt-completion'.*, got 'dpo'"
    ):
        export_interactions(tmp_path, "dpo")
