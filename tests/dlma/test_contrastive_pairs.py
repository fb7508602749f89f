"""Contrastive pairs and self-rewards: values, resumption, dropped pairs and invalid arguments."""

import json

import pytest
import torch
from datasets import Dataset

from cyclealign_trl import ContrastivePrompts, add_self_rewards, generate_contrastive_pairs
from cyclealign_trl.dlma import contrastive_pairs
from cyclealign_trl.rankers.self_reward import SelfReward
from tests.conftest import make_model, make_tokenizer

KIND = ContrastivePrompts("a kind reply", "a rude reply")
TEXTS = [f"Human: Question {i}\n\nAssistant:" for i in range(6)]
MESSAGES = [[{"role": "user", "content": f"Question {i}"}] for i in range(6)]


def generate(prompts=TEXTS, **changes):
    settings = {"batch_size": 2, "max_completion_length": 12, **changes}
    return generate_contrastive_pairs(make_model(), prompts, KIND, make_tokenizer(), **settings)


def plain_logp(prompt, completion):
    """Compute a log-probability token by token, without the package's code."""
    model, tokenizer = make_model(), make_tokenizer()
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = [*prompt_ids, *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return sum(logps[position - 1, ids[position]].item() for position in range(len(prompt_ids), len(ids)))


def test_self_rewards_match_the_papers_formula(golden):
    for row in generate():
        expected = {}
        for side in ("chosen", "rejected"):
            positive, negative = (plain_logp(prompt, row[side]) for prompt in KIND.apply(row["prompt"]))
            assert row[f"{side}_logps"] == pytest.approx([positive, negative], rel=1e-4)
            expected[side] = positive - negative
        assert row["self_reward"] == pytest.approx(expected["chosen"] - expected["rejected"], abs=1e-3)
    for case in golden["dlma"]["self_reward"]:
        inputs = case["inputs"]
        logps = [[inputs[f"logp_{side}_{kind}"] for kind in ("pos", "neg")] for side in ("chosen", "rejected")]

        class StubSelfReward(SelfReward):
            def __init__(self, logps):
                self.stub_logps = torch.tensor(logps)

            def logps(self, prompts, completions):
                return self.stub_logps

        (pair,) = contrastive_pairs._score_pairs(StubSelfReward(logps), ["Q"], [["a", "b"]])
        assert pair["self_reward"] == pytest.approx(case["expected"]["margin"])


def test_completions_are_sampled_under_the_contrastive_prompts(monkeypatch):
    prompts = []
    sample = contrastive_pairs.generate

    def spy(model, prompt_ids, *args, **kwargs):
        prompts.extend(make_tokenizer().batch_decode(prompt_ids))
        return sample(model, prompt_ids, *args, **kwargs)

    monkeypatch.setattr(contrastive_pairs, "generate", spy)
    pairs = generate(MESSAGES)
    assert prompts[:2] == [
        "<user>Question 0 (a kind reply)</s>\n<assistant>", "<user>Question 0 (a rude reply)</s>\n<assistant>"
    ]  # fmt: skip
    assert len(prompts) == 2 * len(MESSAGES)
    for row, prompt in zip(pairs, MESSAGES, strict=True):
        assert row["prompt"] == prompt
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant"] * 2
    assert pairs.info.description == "6 prompts, 6 kept; dropped: none"


def test_pairs_depend_on_the_seed_but_not_on_the_global_random_state():
    model = make_model()

    def sample(prompts=TEXTS, **changes):
        settings = {"batch_size": 2, "max_completion_length": 12, **changes}
        return generate_contrastive_pairs(model, prompts, KIND, make_tokenizer(), **settings).to_list()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(Dataset.from_dict({"prompt": TEXTS, "topic": range(6)}))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample() == first
    assert sample(seed=1) != first


def test_an_interrupted_call_resumes(tmp_path, monkeypatch):
    whole = generate(output_dir=tmp_path / "whole")
    assert whole.to_list() == generate().to_list()
    made = []
    sample = contrastive_pairs.generate

    def interrupt_third(*args, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(sample(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(contrastive_pairs, "generate", interrupt_third)
    with pytest.raises(KeyboardInterrupt):
        generate(output_dir=tmp_path / "killed")
    assert len(list((tmp_path / "killed").glob("batch-*.json"))) == 2
    made.clear()
    resumed = generate(output_dir=tmp_path / "killed")
    assert (len(made), resumed.to_list()) == (1, whole.to_list())
    made.clear()
    assert generate(output_dir=tmp_path / "killed").to_list() == whole.to_list()
    assert not made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "another seed"),
        ({"prompts": TEXTS[:3]}, "another prompts"),
        ({"generation_kwargs": {"top_k": 5}}, "another sampling"),
    ],
)
def test_a_folder_with_other_settings_is_refused(tmp_path, changes, message):
    generate(output_dir=tmp_path)
    with pytest.raises(ValueError, match=message):
        generate(**{"output_dir": tmp_path, **changes})


def test_a_folder_with_pairs_of_another_model_is_refused(tmp_path):
    generate(output_dir=tmp_path)
    with pytest.raises(ValueError, match="another model"):
        generate_contrastive_pairs(
            make_model(seed=1), TEXTS, KIND, make_tokenizer(), output_dir=tmp_path, batch_size=2,
            max_completion_length=12,
        )  # fmt: skip


def test_dropped_prompts_are_counted_by_reason(monkeypatch):
    completions = iter([["a", ""], ["b", "b"], ["c", "d"]])
    tokenizer = make_tokenizer()

    def generate_next(model, prompt_ids, *args, **kwargs):
        return [[*tokenizer(text)["input_ids"], 1] for text in next(completions)]

    monkeypatch.setattr(contrastive_pairs, "generate", generate_next)
    pairs = generate([*TEXTS[:3], "x" * 500 + "\n\nAssistant:"], batch_size=1, max_prompt_length=100)
    assert pairs.info.description == "4 prompts, 1 kept; dropped: empty_reply 1, equal_replies 1, too_long 1"
    assert pairs["chosen"][:] == ["c"]


def test_self_rewards_are_added_to_existing_pairs():
    pairs = generate(MESSAGES)
    implicit = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in pairs
    ]
    for rows in (pairs.select_columns(["prompt", "chosen", "rejected"]), Dataset.from_list(implicit)):
        scored = add_self_rewards(rows, make_model(), KIND, make_tokenizer(), batch_size=4)
        assert scored["prompt"][:] == pairs["prompt"][:]
        assert scored["self_reward"][:] == pytest.approx(pairs["self_reward"][:], abs=1e-3)


def test_a_model_is_loaded_by_name(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    pairs = generate_contrastive_pairs(str(tmp_path), TEXTS, KIND, batch_size=2, max_completion_length=12)
    assert pairs.to_list() == generate().to_list()


def test_invalid_arguments_raise(tmp_path):
    with pytest.raises(ValueError, match="no prompts"):
        generate([])
    with pytest.raises(ValueError, match="Every pair was dropped: 6 prompts, 0 kept; dropped: too_long 6"):
        generate(max_prompt_length=3)
    with pytest.raises(ValueError, match="Pass `tokenizer`"):
        generate_contrastive_pairs(make_model(), TEXTS)
    with pytest.raises(ValueError, match="only apply when a model is loaded by name"):
        generate_contrastive_pairs(
            make_model(), TEXTS, tokenizer=make_tokenizer(), model_init_kwargs={"dtype": "auto"}
        )


def test_the_folder_contains_json_files(tmp_path):
    generate(output_dir=tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["contrastive"] == {"positive": "a kind reply", "negative": "a rude reply", "placement": "reply"}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
