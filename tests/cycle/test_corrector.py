"""A corrector in the cycle: the completions that it corrects, and the training on its corrections."""

import pytest
import torch
from datasets import Dataset

from cyclealign_trl import RankingConfig, RankingTrainer
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import DigestRanker, config, make_trainer, prompts, read_log, weights


class Corrector:
    """Correct every answer alike, or leave all answers unchanged."""

    def __init__(self, unchanged=False):
        self.unchanged, self.calls = unchanged, []

    def correct(self, prompts, answers):
        self.calls.extend(zip(prompts, answers, strict=True))
        return list(answers) if self.unchanged else [f"sorry, {answer.strip()[:2]}" for answer in answers]


class SometimesImproves(DigestRanker):
    """Improve only the completions of even topics, and fail for topic 3."""

    def answer(self, request):
        self.improve = request.metadata["topic"] % 2 == 0
        self.fail = lambda request: "timeout" if request.metadata["topic"] == 3 else None
        return super().answer(request)


def run(folder, ranker=None, **changes):
    trainer = make_trainer(folder, ranker, stub_generation=True, **changes)
    trainer.train()
    return trainer


def test_it_corrects_the_best_completion_if_the_ranker_offers_no_improved_one(tmp_path):
    corrector = Corrector()
    trainer = run(tmp_path, SometimesImproves(), corrector=corrector, sft_target="corrector", dataset=prompts(4))
    rows = read_log(tmp_path)
    for row in rows:
        best = None if row["black_box_order"] is None else row["completions"][row["black_box_order"][0]]
        if row["prompt"] == "Question 3:":
            assert row["failure"] == "timeout"
            assert row["improved_completion"] is None
        elif row["prompt"] == "Question 1:":
            assert (row["prompt"], best) in corrector.calls
            assert row["improved_completion"].strip() == f"sorry, {best.strip()[:2]}"
        else:
            assert row["improved_completion"].strip() == "better"
    assert {prompt for prompt, _ in corrector.calls} == {"Question 1:"}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all("time/correct" in log for log in logs)
    assert {log["improved/corrected_ratio"] for log in logs} <= {0.0, 0.5, 1.0}
    assert sum(log["improved/corrected_ratio"] for log in logs) > 0


def test_a_correction_trains_like_an_improved_completion_of_the_ranker(tmp_path):

    class Corrects(DigestRanker):
        def answer(self, request):
            result = super().answer(request)
            best = request.completions[result.order[0]]
            object.__setattr__(result, "improved_completion", Corrector().correct([None], [best])[0])
            return result

    by_corrector = run(tmp_path / "a", DigestRanker(False), corrector=Corrector(), sft_target="corrector")
    by_ranker = run(tmp_path / "b", Corrects())
    torch.testing.assert_close(weights(by_corrector), weights(by_ranker), rtol=0, atol=0)


def test_an_unchanged_answer_is_the_sft_target(tmp_path):
    unchanged = run(tmp_path / "a", DigestRanker(False), corrector=Corrector(unchanged=True), sft_target="corrector")
    top = run(tmp_path / "b", DigestRanker(False), sft_target="top_ranked")
    torch.testing.assert_close(weights(unchanged), weights(top), rtol=1e-5, atol=1e-6)
    assert {row["improved_completion"] for row in read_log(tmp_path / "a")} == {None}


@pytest.mark.parametrize("loss_type", ["pro", "rrhf"])
def test_the_improved_completion_can_rank_first(tmp_path, loss_type):
    """Compare a step of the cycle with a step of offline training on K + 1 ranked completions."""
    shared = {"loss_type": loss_type, "per_device_train_batch_size": 4, "num_interactions": 1, "max_steps": 1}
    cycle = run(
        tmp_path / "cycle", SometimesImproves(), dataset=prompts(4), rank_improved_completion=True,
        corrector=Corrector(), sft_target="corrector", **shared,
    )  # fmt: skip
    rows = []
    for row in read_log(tmp_path / "cycle"):
        if row["ranks"] is not None:
            texts = [row["improved_completion"], *row["completions"]]
            rows.append({"prompt": row["prompt"], "completions": texts, "ranks": [0, *(r + 1 for r in row["ranks"])]})
    assert len(rows) == 3
    rows.append({**rows[0], "ranks": [-1] * 4})  # the failed ranking
    names = RankingConfig.__dataclass_fields__
    args = config(tmp_path / "offline", **shared).to_dict()
    offline = RankingTrainer(
        make_model(),
        RankingConfig(**{name: value for name, value in args.items() if name in names}),
        Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    offline.train()
    in_cycle, in_offline = (trainer.state.log_history[0] for trainer in (cycle, offline))
    for name in ("loss", "ranking_loss", "sft_loss", "grad_norm"):
        assert in_cycle[name] == pytest.approx(in_offline[name], rel=1e-4), name


def test_an_improved_completion_that_was_sampled_does_not_rank_above_itself(tmp_path):
    class Repeats(DigestRanker):
        def answer(self, request):
            result = super().answer(request)
            object.__setattr__(result, "improved_completion", request.completions[result.order[1]])
            return result

    ranked = run(tmp_path / "a", Repeats(), rank_improved_completion=True)
    plain = run(tmp_path / "b", DigestRanker(False))
    torch.testing.assert_close(weights(ranked), weights(plain), rtol=1e-5, atol=1e-6)


def test_an_error_of_the_corrector_is_raised(tmp_path):
    class Broken:
        def correct(self, prompts, answers):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, DigestRanker(False), corrector=Broken(), sft_target="corrector")


def test_invalid_settings_raise(tmp_path):
    with pytest.raises(ValueError, match="A corrector and sft_target='corrector' must be set together"):
        make_trainer(tmp_path, corrector=Corrector())
    with pytest.raises(ValueError, match="A corrector and sft_target='corrector' must be set together"):
        make_trainer(tmp_path, sft_target="corrector")
    with pytest.raises(TypeError, match=r"correct\(prompts, answers\), and str has none.*Aligner\.from_pretrained\("):
        make_trainer(tmp_path, corrector="aligner", sft_target="corrector")
    with pytest.raises(ValueError, match="no effect with sft_target='top_ranked'"):
        config(tmp_path, sft_target="top_ranked", rank_improved_completion=True)
