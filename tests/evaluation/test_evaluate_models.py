"""Evaluations: rewards of models, their order, kills and resumption, refusals, reports and hostile replies."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cyclealign_trl import FunctionUpstream, ReplySettings, RewardScorer, evaluate_models, read_prompts
from cyclealign_trl.aligner.upstreams import Upstream
from cyclealign_trl.errors import PromptError
from tests.conftest import make_model, make_tokenizer
from tests.evaluation.killed_evaluation import NUM_PROMPTS
from tests.rankers.test_reward_model import make_reward_model, score_alone

ROOT = Path(__file__).parents[2]
PROMPTS = read_prompts(
    {"prompt": [{"role": "user", "content": f"Question {index}?"}], "subset": "abc"[index % 3]} for index in range(30)
)


@pytest.fixture
def folder(tmp_path):
    for seed in range(2):
        make_model(seed).save_pretrained(tmp_path / f"m{seed}")
        make_tokenizer().save_pretrained(tmp_path / f"m{seed}")
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "m0"), config).save_pretrained(tmp_path / "a0")
    make_reward_model().save_pretrained(tmp_path / "rm")
    make_tokenizer().save_pretrained(tmp_path / "rm")
    return tmp_path


def constant(text):
    return FunctionUpstream(lambda prompts: [text] * len(prompts))


def scorer():
    return RewardScorer(make_reward_model(), make_tokenizer(), device="cpu")


def reward(prompt, text):
    """Return 100 times the sigmoid of the score of a completion, computed alone."""
    score = score_alone(make_reward_model(), f"<user>{prompt.prompt[0]['content']}</s>\n<assistant>{text}</s>\n")
    return 100 / (1 + math.exp(-score))


def test_rewards_are_those_of_the_replies(tmp_path):
    report = evaluate_models(
        {"yes": constant("Yes."), "no": constant("No, no!")}, scorer(), PROMPTS, output_dir=tmp_path
    )
    expected = {name: [reward(prompt, text) for prompt in PROMPTS.prompts] for name, text in
                (("yes", "Yes."), ("no", "No, no!"))}  # fmt: skip
    for name, rewards in expected.items():
        figures = report.figures["models"][name]
        assert figures["micro"]["mean"] == pytest.approx(sum(rewards) / 30, abs=1e-3)
        assert figures["groups"]["b"]["mean"] == pytest.approx(sum(rewards[1::3]) / 10, abs=1e-3)
        assert figures["groups"]["b"]["count"] == 10
        assert f"{figures['micro']['mean']:.2f}" in report.to_markdown()
    [difference] = report.figures["differences"]
    assert (difference["model"], difference["baseline"]) == ("no", "yes")
    assert difference["micro"]["mean"] == pytest.approx(
        sum(n - y for y, n in zip(expected["yes"], expected["no"], strict=True)) / 30, abs=1e-3
    )


def test_the_total_weights_groups_by_their_sizes_in_the_data_set(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "subset": "large" if i < 80 else "small"}
            for i in range(100)]  # fmt: skip
    report = evaluate_models(
        {"yes": constant("Yes.")}, scorer(), read_prompts(rows, max_samples=10), output_dir=tmp_path
    )
    figures = report.figures["models"]["yes"]
    means = [figures["groups"][name]["mean"] for name in ("large", "small")]
    assert figures["micro"]["mean"] == pytest.approx(0.8 * means[0] + 0.2 * means[1])
    assert figures["macro"]["mean"] == pytest.approx(sum(means) / 2)
    assert "Groups are samples" in report.to_markdown()
    assert "100 prompts" in report.to_markdown()


def test_a_known_order_is_found_with_intervals_apart(tmp_path):
    def chosen(best):
        """Return an upstream that chooses the completion with the best or worst reward for most prompts."""

        def answer(prompts):
            texts = ["Yes.", "No, no!", "Ask me tomorrow.", "!"]
            replies = []
            for number, prompt in enumerate(prompts):
                ranked = sorted(texts, key=lambda text, prompt=prompt: scoring.score([prompt], [text])[0])
                replies.append(ranked[-1 if best == (number % 4 > 0) else 0])
            return replies

        return FunctionUpstream(answer)

    scoring = scorer()
    report = evaluate_models({"before": chosen(False), "after": chosen(True)}, scorer(), PROMPTS, output_dir=tmp_path)
    before, after = (report.figures["models"][name]["micro"] for name in ("before", "after"))
    assert before["interval"][1] < after["interval"][0]
    assert report.figures["differences"][0]["micro"]["interval"][0] > 0


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_evaluation_continues_and_repeats_nothing(folder, kills):
    subprocess.run(
        [sys.executable, "-m", "tests.evaluation.killed_evaluation", str(folder), "0", str(kills)],
        cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    counts = {}
    for name in ("whole", "killed"):
        counts[name] = dict.fromkeys(("generated", "scored", "lost_generated", "lost_scored"), 0)
        for line in (folder / f"{name}-counts.jsonl").read_text().splitlines():
            [(what, number)] = json.loads(line).items()
            counts[name][what] += number
    expected = 3 * NUM_PROMPTS
    assert counts["whole"] == {"generated": expected, "scored": expected, "lost_generated": 0, "lost_scored": 0}
    killed = counts["killed"]
    assert killed["lost_generated"] + killed["lost_scored"] > 0
    assert killed["generated"] - killed["lost_generated"] == expected
    assert killed["scored"] - killed["lost_scored"] == expected
    assert (folder / "whole/report.md").read_text() == (folder / "killed/report.md").read_text()
    files = [*(folder / "killed").rglob("*.jsonl")]
    assert len(files) == 6
    for file in files:
        ids = [json.loads(line)["prompt_id"] for line in file.read_text().splitlines()]
        assert len(ids) == len(set(ids)) == NUM_PROMPTS


def test_scores_follow_the_replies_and_the_reward_model(folder, tmp_path):
    def evaluate(text, **options):
        return evaluate_models({"x": constant(text)}, f"{folder}/rm", PROMPTS, output_dir=tmp_path / "out", **options)

    first = evaluate("Yes.")
    (tmp_path / "out/replies/x.jsonl").unlink()
    other = evaluate("No, no!")  # the stored scores belong to the replies that were deleted
    assert other.scores["x"][0] != first.scores["x"][0]
    assert evaluate("ignored, because replies are stored").scores == other.scores
    with pytest.raises(ValueError, match="max_length was None and is 20"):
        evaluate("", reward_model_kwargs={"max_length": 20})
    with pytest.raises(ValueError, match=r"does not accept these reward_model_kwargs: .*'size'"):
        evaluate("", reward_model_kwargs={"size": 20})
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        evaluate_models(["x=m"], f"{folder}/missing", PROMPTS, output_dir=tmp_path / "out")


class Refusing(Upstream):
    """An upstream that refuses every fifth prompt for its content."""

    batch_size = 1

    def __call__(self, prompts, **sampling):
        if int(prompts[0][0]["content"].split()[1].strip("?")) % 5 == 0:
            raise PromptError("no", "content_filter")
        return ["Yes."]


def test_refused_prompts_are_left_out_of_means_and_of_differences(tmp_path):
    report = evaluate_models({"all": constant("Yes."), "some": Refusing()}, scorer(), PROMPTS, output_dir=tmp_path)
    figures = report.figures["models"]
    assert (figures["some"]["failed"], figures["some"]["micro"]["count"], figures["all"]["micro"]["count"]) == (
        6,
        24,
        30,
    )
    [difference] = report.figures["differences"]
    assert difference["micro"]["count"] == 24
    assert difference["micro"]["mean"] == pytest.approx(0, abs=1e-4)
    assert "some: 6 replies refused by the endpoint, left out." in report.to_markdown()


def test_scores_that_are_no_numbers_are_left_out(tmp_path):
    model = make_reward_model()
    mark = make_tokenizer().convert_tokens_to_ids("7")

    def spoil(_, args, inputs, output):
        output.logits[(inputs["input_ids"] == mark).any(dim=1)] = math.nan

    model.register_forward_hook(spoil, with_kwargs=True)
    spoiled = RewardScorer(model, make_tokenizer(), device="cpu")
    report = evaluate_models({"x": constant("Yes.")}, spoiled, PROMPTS, output_dir=tmp_path)
    assert report.figures["models"]["x"]["unscored"] == 3  # 7, 17, 27
    assert report.figures["models"]["x"]["micro"]["count"] == 27


HOSTILE = "\x1b[31m| a | b |\r\n<script>alert(1)</script>\x00\ud800‮"


def test_hostile_replies_and_names_neither_break_tables_nor_files(tmp_path, capsys):
    rows = [
        {"prompt": [{"role": "user", "content": HOSTILE + str(i)}], "subset": f"g\x1b[0m|\n{i % 2}"} for i in range(8)
    ]
    models = {f"x|\x1b[1m\n{HOSTILE}": constant(HOSTILE), "../y": constant("Yes.")}
    report = evaluate_models(models, scorer(), read_prompts(rows), output_dir=tmp_path / "out")
    table = report.to_markdown()
    assert all(letter.isprintable() or letter == "\n" for letter in table)
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines[:4]} == {5}
    report.save(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    rows = datasets.Dataset.from_parquet(str(tmp_path / "out/rewards.parquet"), cache_dir=str(tmp_path / "out/cache"))
    assert len(rows) == 16
    assert rows["completion"][0].startswith("\x1b[31m| a")
    json.loads((tmp_path / "out/report.json").read_text())


def test_the_rows_are_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    report = evaluate_models({"yes": constant("Yes."), "no": constant("No.")}, scorer(), PROMPTS, output_dir=tmp_path)
    assert report.save(tmp_path) == ["report.json", "report.md", "rewards.parquet"]
    rows = datasets.Dataset.from_parquet(str(tmp_path / "rewards.parquet"), cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 60
    assert rows[30]["model"] == "no"
    assert rows[31] == {
        "prompt_id": PROMPTS.prompts[1].id, "group": "b", "prompt": PROMPTS.prompts[1].prompt, "model": "no",
        "completion": "No.", "finish_reason": "stop", "score": report.scores["no"][1],
        "reward": pytest.approx(reward(PROMPTS.prompts[1], "No."), abs=1e-3),
    }  # fmt: skip
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == report.to_dict()


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "at least one model"),
        ("m", {}, "at least one model in a list"),
        (["m"], {"transform": "log"}, "got 'log'"),
        (["m"], {"confidence_level": 95}, "between 0 and 1"),
        (["m"], {"reward_model_kwargs": {"max_length": 3}}, "no effect on a loaded reward model"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_loaded(models, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate_models(models, scorer(), PROMPTS, output_dir=tmp_path, **options)


def test_prompts_that_the_reward_model_rejects_raise_and_keep_the_replies(tmp_path):
    template = "{{ raise_exception('no system turns') }}"
    rejecting = RewardScorer(make_reward_model(), make_tokenizer(), chat_template=template, device="cpu")
    with pytest.raises(ValueError, match="rejects a prompt: no system turns"):
        evaluate_models({"x": constant("Yes.")}, rejecting, PROMPTS, output_dir=tmp_path)
    assert len((tmp_path / "replies/x.jsonl").read_text().splitlines()) == 30


def test_settings_reach_the_models(folder, tmp_path):
    settings = ReplySettings(max_new_tokens=3, max_prompt_length=60, device="cpu")
    report = evaluate_models(
        [f"m={folder}/m0"], f"{folder}/rm", PROMPTS, output_dir=tmp_path / "out", settings=settings
    )
    assert max(len(reply.completion) for reply in report.replies["m"]) <= 3
    assert report.figures["models"]["m"]["length_limited"] > 0.5
    assert "of the replies reached the token limit" in report.to_markdown()
