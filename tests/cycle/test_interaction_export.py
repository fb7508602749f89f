"""What a run's log becomes, and that TRL's trainers and ours train on it."""

import pytest
from datasets import load_dataset

from cyclealign_trl import FunctionRanker, RankingConfig, RankingTrainer, export_interactions
from cyclealign_trl.scripts import export
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import DigestRanker, make_trainer, prompts, read_log

TYPES = ("preference", "ranked", "prompt-completion")


@pytest.fixture(scope="module", params=[False, True], ids=["text", "conversational"])
def run(request, tmp_path_factory):
    """A run of two steps with four interactions each, one of which failed."""
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


def test_each_type_says_what_the_log_says(run):
    rows = [row for row in read_log(run) if row["black_box_order"] is not None]
    assert len(rows) == 7
    exported = {to: export_interactions(run, to) for to in TYPES}
    for index, row in enumerate(rows):
        best, *_, worst = row["black_box_order"]
        pair, ranked, pairing = (exported[to][index] for to in TYPES)
        assert pair["prompt"] == ranked["prompt"] == pairing["prompt"] == row["prompt"]
        assert (text(pair["chosen"]), text(pair["rejected"])) == (row["completions"][best], row["completions"][worst])
        assert [text(completion) for completion in ranked["completions"]] == row["completions"]
        assert sorted(range(3), key=ranked["ranks"].__getitem__) == row["black_box_order"]
        assert text(pairing["completion"]) == row["improved_completion"]
    for to, dataset in exported.items():
        assert dataset.info.description.endswith(f"8 interactions, 7 exported as {to}")


def test_without_an_improved_completion_the_best_is_the_target(tmp_path):
    make_trainer(tmp_path, DigestRanker(improve=False), prompts(2), stub_generation=True).train()
    rows = read_log(tmp_path)
    for row, exported in zip(rows, export_interactions(tmp_path, "prompt-completion"), strict=True):
        assert exported["completion"] == row["completions"][row["black_box_order"][0]]


def test_ties_stay_ties(tmp_path):
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


def train_dpo(dataset, folder):
    from trl import DPOConfig, DPOTrainer

    make_model().save_pretrained(folder / "policy")  # the reference is loaded by the policy's name
    config = DPOConfig(**settings(folder), max_length=128, bf16=False)
    policy = str(folder / "policy")
    return DPOTrainer(policy, args=config, train_dataset=dataset, processing_class=make_tokenizer())


def train_ranked(dataset, folder):
    config = RankingConfig(**settings(folder), max_prompt_length=64, max_completion_length=32)
    return RankingTrainer(make_model(), config, train_dataset=dataset, processing_class=make_tokenizer())


def train_sft(dataset, folder):
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**settings(folder), max_length=128, bf16=False)
    return SFTTrainer(make_model(), args=config, train_dataset=dataset, processing_class=make_tokenizer())


# TRL's configs still read names that transformers has renamed.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("to", "make"), [*zip(TYPES, (train_dpo, train_ranked, train_sft), strict=True)], ids=TYPES)
def test_other_trainers_train_on_what_the_command_wrote(run, tmp_path, monkeypatch, capsys, to, make):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    export.main([str(run), "--to", to, "--output_dir", str(tmp_path / "data")])
    assert "8 interactions, 7 exported" in capsys.readouterr().out
    trainer = make(load_dataset(str(tmp_path / "data"), split="train"), tmp_path / "out")
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)


def test_by_default_the_data_lie_in_the_run(run, capsys):
    export.main([str(run)])
    assert (run / "preference" / "train.parquet").is_file()
    assert str(run / "preference" / "train.parquet") in capsys.readouterr().out


def test_no_log_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main([str(tmp_path)])
    assert str(stop.value) == (
        f"cyclealign export: error: No interaction log in {tmp_path / 'interactions'}: "
        "name the output directory of a CycleAlign run."
    )


def test_nothing_to_export_is_one_line(tmp_path):
    def same(completions, **_):
        return [0.0 for _ in completions]

    make_trainer(tmp_path, FunctionRanker(same), prompts(2), stub_generation=True).train()
    with pytest.raises(SystemExit) as stop:
        export.main([str(tmp_path)])
    assert "4 interactions, 0 exported as preference: there is nothing to write" in str(stop.value)


def test_an_unknown_type_raises(tmp_path):
    with pytest.raises(ValueError, match="'dpo'"):
        export_interactions(tmp_path, "dpo")
