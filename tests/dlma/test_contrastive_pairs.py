"""Pairs and their self-rewards: against a plain computation, killed and resumed, what is left out, wrong use."""

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
    """Token by token, without any of our code."""
    model, tokenizer = make_model(), make_tokenizer()
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = [*prompt_ids, *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return sum(logps[position - 1, ids[position]].item() for position in range(len(prompt_ids), len(ids)))


def test_self_rewards_are_what_the_paper_says(golden):
    for row in generate():
        expected = {}
        for side in ("chosen", "rejected"):
            good, bad = (plain_logp(asking, row[side]) for asking in KIND.apply(row["prompt"]))
            assert row[f"{side}_logps"] == pytest.approx([good, bad], rel=1e-4)
            expected[side] = good - bad
        assert row["self_reward"] == pytest.approx(expected["chosen"] - expected["rejected"], abs=1e-3)
    for case in golden["dlma"]["self_reward"]:
        inputs = case["inputs"]
        told = [[inputs[f"logp_{side}_{kind}"] for kind in ("pos", "neg")] for side in ("chosen", "rejected")]

        class Told(SelfReward):
            def __init__(self, logps):
                self.told = torch.tensor(logps)

            def logps(self, prompts, completions):
                return self.told

        (pair,) = contrastive_pairs._score(Told(told), ["Q"], [["a", "b"]])
        assert pair["self_reward"] == pytest.approx(case["expected"]["margin"])


def test_replies_are_sampled_under_their_prompts(monkeypatch):
    asked = []
    sample = contrastive_pairs.generate

    def spy(model, prompt_ids, *args, **kwargs):
        asked.extend(make_tokenizer().batch_decode(prompt_ids))
        return sample(model, prompt_ids, *args, **kwargs)

    monkeypatch.setattr(contrastive_pairs, "generate", spy)
    pairs = generate(MESSAGES)
    assert asked[:2] == [
        "<user>Question 0 (a kind reply)</s>\n<assistant>", "<user>Question 0 (a rude reply)</s>\n<assistant>"
    ]  # fmt: skip
    assert len(asked) == 2 * len(MESSAGES)
    for row, prompt in zip(pairs, MESSAGES, strict=True):
        assert row["prompt"] == prompt
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant"] * 2
    assert pairs.info.description == "6 prompts, 6 kept; dropped: none"


def test_batches_and_the_global_random_state_do_not_matter():
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


def test_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    whole = generate(output_dir=tmp_path / "whole")
    assert whole.to_list() == generate().to_list()
    made = []
    sample = contrastive_pairs.generate

    def mortal(*args, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(sample(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(contrastive_pairs, "generate", mortal)
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
    ("changes", "said"),
    [
        ({"seed": 1}, "another seed"),
        ({"prompts": TEXTS[:3]}, "another prompts"),
        ({"generation_kwargs": {"top_k": 5}}, "another sampling"),
    ],
)
def test_pairs_of_other_settings_are_not_mixed(tmp_path, changes, said):
    generate(output_dir=tmp_path)
    with pytest.raises(ValueError, match=said):
        generate(**{"output_dir": tmp_path, **changes})


def test_pairs_of_another_model_are_not_mixed(tmp_path):
    generate(output_dir=tmp_path)
    with pytest.raises(ValueError, match="another model"):
        generate_contrastive_pairs(
            make_model(seed=1), TEXTS, KIND, make_tokenizer(), output_dir=tmp_path, batch_size=2,
            max_completion_length=12,
        )  # fmt: skip


def test_what_is_left_out_is_counted(monkeypatch):
    replies = iter([["a", ""], ["b", "b"], ["c", "d"]])
    ids = make_tokenizer()

    def canned(model, prompt_ids, *args, **kwargs):
        return [[*ids(text)["input_ids"], 1] for text in next(replies)]

    monkeypatch.setattr(contrastive_pairs, "generate", canned)
    pairs = generate([*TEXTS[:3], "x" * 500 + "\n\nAssistant:"], batch_size=1, max_prompt_length=100)
    assert pairs.info.description == "4 prompts, 1 kept; dropped: empty_reply 1, equal_replies 1, too_long 1"
    assert pairs["chosen"][:] == ["c"]


def test_self_rewards_are_added_to_pairs_that_are_there():
    pairs = generate(MESSAGES)
    implicit = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in pairs
    ]
    for rows in (pairs.select_columns(["prompt", "chosen", "rejected"]), Dataset.from_list(implicit)):
        scored = add_self_rewards(rows, make_model(), KIND, make_tokenizer(), batch_size=4)
        assert scored["prompt"][:] == pairs["prompt"][:]
        assert scored["self_reward"][:] == pytest.approx(pairs["self_reward"][:], abs=1e-3)


def test_models_are_loaded_by_name(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    pairs = generate_contrastive_pairs(str(tmp_path), TEXTS, KIND, batch_size=2, max_completion_length=12)
    assert pairs.to_list() == generate().to_list()


def test_wrong_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no prompts"):
        generate([])
    with pytest.raises(ValueError, match="No pair is left of 6 prompts, 0 kept; dropped: too_long 6"):
        generate(max_prompt_length=3)
    with pytest.raises(ValueError, match="Pass `tokenizer`"):
        generate_contrastive_pairs(make_model(), TEXTS)
    with pytest.raises(ValueError, match="say how to load a model"):
        generate_contrastive_pairs(
            make_model(), TEXTS, tokenizer=make_tokenizer(), model_init_kwargs={"dtype": "auto"}
        )


def test_files_are_json(tmp_path):
    generate(output_dir=tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["contrastive"] == {"positive": "a kind reply", "negative": "a rude reply", "placement": "reply"}
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
