"""Trainers read dialogues as HH-RLHF publishes them: split where the last reply starts."""

import json

import pytest
from datasets import Dataset, load_dataset

from cyclealign_trl import (
    CycleAlignConfig,
    CycleAlignTrainer,
    DLMAConfig,
    DLMATrainer,
    RankingConfig,
    RankingTrainer,
    add_self_rewards,
    generate_contrastive_pairs,
    load_hh_rlhf,
)
from cyclealign_trl.data.hh_rlhf import is_published, read_published
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import DigestRanker

REPLIES = [
    ("I am sorry.", "I am sad."),  # a common beginning inside the reply
    ("The cat", "The car"),  # a difference inside a word
    ("Yes", "Yes, it is"),  # one is the beginning of the other
    ("One.\n\nTwo.", "One.\n\nThree."),  # paragraphs
    ("", "No"),  # an empty reply
    ("Same", "Same"),  # equal replies
    ("A", "B"),
]


def dialogue(question, reply):
    return f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {question}\n\nAssistant: {reply}"


@pytest.fixture
def rows():
    return [
        {"chosen": dialogue(f"Q{index}", chosen), "rejected": dialogue(f"Q{index}", rejected)}
        for index, (chosen, rejected) in enumerate(REPLIES)
    ]


@pytest.fixture
def published(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def make_ranking(tmp_path, dataset, tokenizer):
    args = RankingConfig(str(tmp_path), max_prompt_length=100, max_completion_length=64, use_cpu=True)
    return RankingTrainer(make_model(), args, dataset, dataset, processing_class=tokenizer)


def plain_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("tokenizer", [make_tokenizer, plain_tokenizer])
def test_published_rows_train_as_those_of_the_loader(tmp_path, rows, published, tokenizer, caplog):
    conversational = tokenizer().chat_template is not None
    expected = make_ranking(
        tmp_path, load_hh_rlhf("helpful-base", path=published, conversational=conversational), tokenizer()
    )
    assert not caplog.records
    trainer = make_ranking(tmp_path, Dataset.from_list(rows), tokenizer())
    report = "7 rows, 5 kept; dropped: empty_reply 1, equal_replies 1"
    assert caplog.text.count(report) == 2
    batches = [one.data_collator([*one.train_dataset]) for one in (trainer, expected)]
    assert batches[0] == batches[1]
    assert len(trainer.eval_dataset) == 5
    if not conversational:
        text = tokenizer().decode(batches[0].prompt_ids[0]), tokenizer().decode(batches[0].completion_ids[0][0])
        assert text == ("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Q0\n\nAssistant:", " I am sorry.</s>")


def test_a_cycle_takes_the_prompts(tmp_path, rows):
    args = CycleAlignConfig(str(tmp_path), use_cpu=True, max_prompt_length=100, per_device_train_batch_size=1)
    args.max_completion_length = 64
    trainer = CycleAlignTrainer(
        make_model(), DigestRanker(), args, None, Dataset.from_list(rows), Dataset.from_list(rows), make_tokenizer()
    )
    assert trainer.train_dataset.column_names == trainer.eval_dataset.column_names == ["prompt"]
    assert [row["prompt"][-1]["content"] for row in trainer.train_dataset] == ["Q0", "Q1", "Q2", "Q3", "Q6"]


def test_dlma_takes_pairs_and_prompts(tmp_path, rows):
    dataset, model, tokenizer = Dataset.from_list(rows), make_model(), make_tokenizer()
    args = DLMAConfig(str(tmp_path), margin_weight=0.0, max_prompt_length=100, max_completion_length=64, use_cpu=True)
    trainer = DLMATrainer(make_model(), None, args, dataset, processing_class=make_tokenizer())
    assert [row["chosen"][0]["content"] for row in trainer.train_dataset][:2] == ["I am sorry.", "The cat"]
    scored = add_self_rewards(dataset, model, tokenizer=tokenizer, max_prompt_length=300, max_completion_length=32)
    assert [row["rejected"][0]["content"] for row in scored][:2] == ["I am sad.", "The car"]
    pairs = generate_contrastive_pairs(
        model, dataset, tokenizer=tokenizer, max_prompt_length=300, max_completion_length=4
    )
    assert {row["prompt"][-1]["content"] for row in pairs} <= {"Q0", "Q1", "Q2", "Q3", "Q6"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows, True),
        (lambda rows: [{**row, "score": 1} for row in rows], True),
        (lambda rows: [{**row, "prompt": "Q"} for row in rows], False),
        (lambda rows: [{name: text.replace("\n\nHuman:", "Q:") for name, text in row.items()} for row in rows], False),
        (lambda rows: [{"chosen": row["chosen"]} for row in rows], False),
        (lambda rows: [{"chosen": 1, "rejected": 2} for row in rows], False),
        (lambda rows: rows * 3 + [{"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}], True),
        (lambda rows: [], False),
    ],
)
def test_dialogues_are_recognised(rows, change, expected):
    assert is_published(Dataset.from_list(change(rows))) is expected


def test_other_columns_stay(rows):
    dataset = Dataset.from_list([{**row, "id": index} for index, row in enumerate(rows)]).with_format("torch")
    assert read_published(dataset, "preference", conversational=False)["id"] == [0, 1, 2, 3, 6]


def test_dialogues_that_are_all_broken_raise(tmp_path):
    rows = [{"chosen": "\n\nHuman: Q", "rejected": "\n\nHuman: Q"}] * 3
    with pytest.raises(
        ValueError, match=r"No dialogue of HH-RLHF can be used: 3 rows, 0 kept; dropped: no_assistant 3"
    ):
        make_ranking(tmp_path, Dataset.from_list(rows), make_tokenizer())


def test_published_test_splits_lose_no_reply(optional_data):
    path = optional_data / "data" / "hh_rlhf" / "helpful-base.test.jsonl.gz"
    raw = load_dataset("json", data_files=str(path), split="train")
    pairs = read_published(raw, "preference", conversational=False)
    assert len(pairs) == 2348
    whole = {(row["chosen"].rstrip(), row["rejected"].rstrip()) for row in raw}
    joined = {((row["prompt"] + row["chosen"]).rstrip(), (row["prompt"] + row["rejected"]).rstrip()) for row in pairs}
    assert len(joined - whole) < 100  # white space inside of turns is normalised
