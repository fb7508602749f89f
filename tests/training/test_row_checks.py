"""Rows that cannot be used are refused when a trainer is made, wherever they are in a data set."""

import csv
import time

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, load_dataset

from cyclealign_trl import (
    AlignerConfig,
    AlignerTrainer,
    CycleAlignConfig,
    CycleAlignTrainer,
    DLMAConfig,
    DLMATrainer,
    FunctionRanker,
    RankingConfig,
    RankingTrainer,
    add_self_rewards,
    generate_contrastive_pairs,
)
from cyclealign_trl.training.row_checks import PROMPT, RowCheck, check_rows, share_a_prompt
from tests.conftest import make_model, make_tokenizer

GOOD = {"prompt": "Q", "chosen": " yes", "rejected": " no"}
RANKED = {"prompt": "Q", "completions": [" yes", " no"], "ranks": [0, 1]}
FIRST_BAD = 5


def user(content):
    return [{"role": "user", "content": content}]


def assistant(content):
    return [{"role": "assistant", "content": content}]


def rows_with(bad, good, number=8):
    return [{**good, **(bad if index >= FIRST_BAD else {})} for index in range(number)]


def dataset_of(rows):
    return Dataset.from_list(rows, on_mixed_types="use_json")


def make_ranking(tmp_path, dataset, **changes):
    args = RankingConfig(str(tmp_path), use_cpu=True, **({"max_prompt_length": 64} | changes))
    return RankingTrainer(make_model(), args, dataset, processing_class=make_tokenizer())


def make_cycle(tmp_path, dataset, tokenizer=None, **changes):
    settings = {"max_prompt_length": 64, "max_completion_length": 16, "per_device_train_batch_size": 1} | changes
    args = CycleAlignConfig(str(tmp_path), use_cpu=True, num_generations=3, **settings)
    ranker = FunctionRanker(lambda prompts, completions, **kwargs: [float(len(text)) for text in completions])
    return CycleAlignTrainer(make_model(), ranker, args, None, dataset, processing_class=tokenizer or make_tokenizer())


def make_dlma(tmp_path, dataset):
    args = DLMAConfig(str(tmp_path), max_prompt_length=64, max_completion_length=64, use_cpu=True)
    return DLMATrainer(make_model(), None, args, dataset, processing_class=make_tokenizer())


def make_aligner(tmp_path, dataset):
    args = AlignerConfig(str(tmp_path), max_length=128, use_cpu=True)
    return AlignerTrainer(make_model(), args, dataset, processing_class=make_tokenizer())


PROMPTS = [
    ("Q", None, "must be a text or a list of messages, got None"),
    ("Q", "", "has no tokens to continue"),
    (user("Q"), None, "must be a text or a list of messages, got None"),
    (user("Q"), [], r"must be a text or a list of messages, got \[\]"),
    (user("Q"), [{"role": "user", "content": None}], "must be text, or a list of text parts, got None"),
    (user("Q"), [{"role": None, "content": "Q"}], "must have a role and a content"),
    (user("Q"), user([{"type": "image", "url": "cat.png"}]), "list of text parts"),
    (user("Q"), user([]), "list of text parts"),
    (user([{"type": "text", "text": "Q"}]), user([{"type": "text", "text": None}]), "list of text parts"),
    ("Q", 7, "must be a text or a list of messages, got 7"),
    ("Q", ["Q"], "must have a role and a content"),
    ("Q", str(user("Hi")), "A CSV file cannot hold lists"),
    ("Q", '[{"role": "user", "content": null}]', "A CSV file cannot hold lists"),
    (
        "Q",
        "[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'assistant'}]",
        "A CSV file cannot hold lists",
    ),
]


@pytest.mark.parametrize("make", [make_ranking, make_cycle])
@pytest.mark.parametrize(("good", "bad", "message"), PROMPTS)
def test_a_prompt_that_cannot_be_used_is_refused_at_once(tmp_path, make, good, bad, message):
    with pytest.raises(ValueError, match=rf"Row 5 of train_dataset cannot be used: .*{message}") as error:
        make(tmp_path, dataset_of(rows_with({"prompt": bad}, {**GOOD, "prompt": good})))
    assert "'prompt'" in str(error.value) or "The prompt" in str(error.value)


COMPLETIONS = [
    (GOOD, {"chosen": None}, "column 'chosen': .*got None"),
    (GOOD, {"rejected": 3}, "column 'rejected': .*got 3"),
    (GOOD, {"rejected": assistant(None)}, "column 'rejected': .*got None"),
    (GOOD, {"chosen": user("Q") + assistant("a")}, "column 'chosen': .*one assistant message"),
    (GOOD, {"chosen": str(assistant("a"))}, "column 'chosen': .*A CSV file cannot hold lists"),
    (GOOD, {"chosen": assistant([{"type": "image"}])}, "column 'chosen': .*list of text parts"),
    (RANKED, {"completions": None}, "column 'completions': .*got None"),
    (RANKED, {"completions": []}, r"column 'completions': .*got \[\]"),
    (RANKED, {"completions": ["a", None]}, "column 'completions': .*got None"),
    (RANKED, {"completions": "['a', 'b']"}, "column 'completions': .*must be a list"),
    (RANKED, {"ranks": [0]}, "2 completions but 1 ranks"),
    (RANKED, {"ranks": [0, None]}, "must be integers"),
    (RANKED, {"ranks": [0, -2]}, "must be integers"),
    (RANKED, {"ranks": None}, "neither ranks nor rewards"),
    ({**RANKED, "rewards": [1.0, 0.0]}, {"rewards": [1.0, float("nan")]}, "finite numbers"),
    ({**RANKED, "rewards": [1.0, 0.0]}, {"rewards": [1.0, None]}, "finite numbers"),
    ({**RANKED, "rewards": [1.0, 0.0]}, {"rewards": [1.0, float("inf")]}, "finite numbers"),
]


@pytest.mark.parametrize(("good", "bad", "message"), COMPLETIONS)
def test_completions_that_cannot_be_used_are_refused_at_once(tmp_path, good, bad, message):
    with pytest.raises(ValueError, match=rf"(?s)Row 5 of train_dataset cannot be used: .*{message}"):
        make_ranking(tmp_path, dataset_of(rows_with(bad, good)))


def test_rewards_for_some_rows_only_are_refused_at_once(tmp_path):
    rows = rows_with({"rewards": None}, {**RANKED, "rewards": [1.0, 0.0]})
    with pytest.raises(ValueError, match="3 of 8 rows of train_dataset have no rewards, for example row 5"):
        make_ranking(tmp_path, Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"chosen": "A: yes", "rejected": "B: no"}, "no common beginning"),
        ({"chosen": " yes", "rejected": " no"}, "no common beginning"),
        ({"chosen": "Q: a", "rejected": "Q: a"}, "are equal"),
        ({"chosen": None}, "column 'chosen'"),
        ({"chosen": "", "rejected": ""}, "are equal"),
    ],
)
def test_texts_without_a_common_prompt_are_refused_at_once(tmp_path, bad, message):
    with pytest.raises(ValueError, match=f"Row 5 of train_dataset cannot be used: .*{message}"):
        make_ranking(tmp_path, Dataset.from_list(rows_with(bad, {"chosen": "Q: yes", "rejected": "Q: no"})))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (user("Q") + assistant("a"), user("R") + assistant("b")),
        (
            user("Q") + assistant("a") + user("R") + assistant("b"),
            user("Q") + assistant("c") + user("R") + assistant("d"),
        ),
        (assistant("a"), assistant("b")),
        (user("Q") + assistant(None), user("Q") + assistant("b")),
    ],
)
def test_conversations_without_a_common_prompt_are_refused_at_once(tmp_path, chosen, rejected):
    good = {"chosen": user("Q") + assistant("a"), "rejected": user("Q") + assistant("b")}
    with pytest.raises(ValueError, match="Row 5 of train_dataset cannot be used"):
        make_ranking(tmp_path, dataset_of(rows_with({"chosen": chosen, "rejected": rejected}, good)))


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf")])
def test_self_rewards_must_be_finite_numbers(tmp_path, value):
    with pytest.raises(ValueError, match="Row 5 of train_dataset cannot be used: column 'self_reward'"):
        make_dlma(tmp_path, Dataset.from_list(rows_with({"self_reward": value}, {**GOOD, "self_reward": 1.0})))


@pytest.mark.parametrize(
    "bad",
    [{"prompt": None}, {"answer": None}, {"correction": None}, {"answer": str(assistant("a"))}, {"correction": 3}],
)
def test_corrections_that_cannot_be_used_are_refused_at_once(tmp_path, bad):
    rows = rows_with(bad, {"prompt": "Q", "answer": "a", "correction": "b"})
    with pytest.raises(ValueError, match=f"Row 5 of train_dataset cannot be used: column '{next(iter(bad))}'"):
        make_aligner(tmp_path, dataset_of(rows))


def test_prompts_in_two_formats_are_refused_at_once(tmp_path):
    rows = rows_with({"prompt": user("Q")}, {"prompt": "Q"})
    with pytest.raises(ValueError, match=r"Row 5 of train_dataset cannot be used: column 'prompt' .* in one format"):
        make_cycle(tmp_path, dataset_of(rows))


def test_a_prompt_next_to_whole_conversations_is_their_first_message(tmp_path):
    pair = {"chosen": user("Q") + assistant("a"), "rejected": user("Q") + assistant("b")}
    trainers = [make_ranking(tmp_path, Dataset.from_list([row] * 3)) for row in (pair, {"prompt": "Q", **pair})]
    batches = [trainer.data_collator([trainer.train_dataset[0]]) for trainer in trainers]
    assert batches[0] == batches[1]


def test_a_prompt_of_messages_can_have_texts_as_completions(tmp_path):
    rows = [
        {"prompt": user("Q"), "chosen": chosen, "rejected": rejected}
        for chosen, rejected in (("a", "b"), (assistant("a"), assistant("b")))
    ]
    trainers = [make_ranking(tmp_path, Dataset.from_list([row] * 3)) for row in rows]
    batches = [trainer.data_collator([trainer.train_dataset[0]]) for trainer in trainers]
    assert batches[0] == batches[1]


# Chat templates that refuse roles


REFUSING = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "system", "content": "S"}, *user("Q")], "roles system, user: System role not supported"),
        (user("Q") + user("R"), "roles user, user: Roles must alternate"),
        (assistant("a") + user("Q"), "roles assistant, user: Roles must alternate"),
        ([{"role": "system", "content": "S"}], "Invalid role in the last message|System role not supported"),
        ([{"role": "tool", "content": "S"}], "Roles must alternate"),
    ],
)
@pytest.mark.parametrize("make", [make_cycle, make_ranking])
def test_roles_that_a_template_refuses_are_named_at_once(tmp_path, make, prompt, message, monkeypatch):
    monkeypatch.setattr("tests.training.test_row_checks.make_tokenizer", lambda: _refusing_tokenizer())
    rows = rows_with({"prompt": prompt}, {**GOOD, "prompt": user("Q")})
    with pytest.raises(ValueError, match=rf"Row 5 of train_dataset cannot be used: .*({message})"):
        make(tmp_path, Dataset.from_list(rows))


@pytest.mark.parametrize("as_dataset", [False, True])
def test_roles_that_a_template_refuses_are_named_for_pairs(as_dataset):
    prompts = [user("Q")] * FIRST_BAD + [user("Q") + user("R")] * 3
    given = dataset_of([{"prompt": prompt} for prompt in prompts]) if as_dataset else prompts
    with pytest.raises(ValueError, match=r"Row 5 of prompts cannot be used: .*roles user, user: Roles must alternate"):
        generate_contrastive_pairs(make_model(), given, tokenizer=_refusing_tokenizer(), max_prompt_length=300)


def test_roles_next_to_parts_and_texts_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.training.test_row_checks.make_tokenizer", lambda: _refusing_tokenizer())
    parts = user([{"type": "text", "text": "Q"}])
    rows = [{"prompt": user("Q")}, {"prompt": parts}] * 2 + [{"prompt": parts + user("Q")}] * 2
    with pytest.raises(ValueError, match=r"Row 4 of train_dataset cannot be used: .*Roles must alternate"):
        make_cycle(tmp_path, dataset_of(rows))


def _refusing_tokenizer(make=make_tokenizer):
    tokenizer = make()
    tokenizer.chat_template = REFUSING
    return tokenizer


# What can be used is used


@pytest.mark.parametrize("number", [1, 2])
def test_text_parts_are_joined(tmp_path, number):
    parts = [{"type": "text", "text": text} for text in ("Hi", " you")[:number]]
    plain = {
        "prompt": user("Hi you"[: 2 if number == 1 else 6]),
        "chosen": assistant("yes"),
        "rejected": assistant("no"),
    }
    in_parts = {**plain, "prompt": user(parts), "chosen": assistant([{"type": "text", "text": "yes"}])}
    expected = make_ranking(tmp_path, Dataset.from_list([plain] * 3)).data_collator([plain])
    trainer = make_ranking(
        tmp_path, Dataset.from_list([{**in_parts, "rejected": assistant([{"type": "text", "text": "no"}])}] * 3)
    )
    assert trainer.data_collator([trainer.train_dataset[0]]) == expected
    cycle = make_cycle(tmp_path, Dataset.from_list([{"prompt": user(parts)}] * 3))
    assert cycle.data_collator([cycle.train_dataset[0]]).prompts == [plain["prompt"]]


def test_a_prompt_in_parts_reaches_ranker_and_log_as_text(tmp_path):
    rows = [{"prompt": user([{"type": "text", "text": f"Q{index}"}])} for index in range(2)]
    cycle = make_cycle(tmp_path, Dataset.from_list(rows), max_steps=1, report_to="none", num_interactions=1)
    cycle.train()
    assert cycle.interaction_log.read().to_pylist()[0]["prompt"][0]["content"].startswith("Q")


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_the_format_of_a_data_set_does_not_matter(tmp_path, kind):
    rows = [{**RANKED, "rewards": [1.5, -0.5]}] * 3
    expected = make_ranking(tmp_path, Dataset.from_list(rows))
    formatted = make_ranking(tmp_path, Dataset.from_list(rows).with_format(kind))
    batches = [trainer.data_collator([trainer.train_dataset[0]]) for trainer in (expected, formatted)]
    assert batches[0] == batches[1]


def test_a_transform_of_the_users_own_is_kept(tmp_path):
    dataset = Dataset.from_list([GOOD] * 3).with_transform(
        lambda batch: {**batch, "prompt": ["R"] * len(batch["prompt"])}
    )
    trainer = make_ranking(tmp_path, dataset)
    assert trainer.data_collator([trainer.train_dataset[0]]).prompt_ids == [make_tokenizer()("R")["input_ids"]]


@pytest.mark.parametrize(
    "prompt",
    ["[1, 2] is a list", "[{'a': 1}]", "   Q", "['x']", "[", '[{"role": "user"} is JSON', "None", "nan"],
)
def test_unusual_prompts_are_used(tmp_path, prompt):
    make_ranking(tmp_path, Dataset.from_list([GOOD, {**GOOD, "prompt": prompt}, GOOD]))


def test_a_call_of_a_tool_needs_no_text(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    rows = [{**GOOD, "prompt": [*user("Q"), call, {"role": "tool", "content": "7"}]}] * 3
    make_ranking(tmp_path, Dataset.from_list(rows))


def test_lists_in_a_csv_file_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt"])
        writer.writerows([[str(user("Hi"))]] * 3)
    dataset = load_dataset("csv", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"first row of train_dataset .* column 'prompt': .*A CSV file cannot hold lists"
    ):
        make_cycle(tmp_path, dataset)


def test_a_list_of_rows_is_checked(tmp_path):
    rows = rows_with({"prompt": None}, GOOD)
    args = RankingConfig(str(tmp_path), max_prompt_length=64, use_cpu=True)
    with pytest.raises(ValueError, match=r"Row 5 of eval_dataset\['held-out'\] cannot be used: column 'prompt'"):
        RankingTrainer(make_model(), args, Dataset.from_list([GOOD]), {"held-out": rows}, make_tokenizer())


@pytest.mark.parametrize("make", [make_ranking, make_cycle])
def test_a_prompt_beyond_the_models_positions_is_refused_at_once(tmp_path, make):
    rows = rows_with({"prompt": "Q" * 250}, {**GOOD, "prompt": "Q" * 20})
    with pytest.raises(ValueError, match=r"Row [567] of train_dataset .* has 250 tokens, .* the 256 positions"):
        make(tmp_path, Dataset.from_list(rows), max_prompt_length=None, max_completion_length=16)
    make(tmp_path, Dataset.from_list(rows[:FIRST_BAD]), max_prompt_length=None, max_completion_length=16)


# Speed, and rows in another order


@pytest.mark.parametrize(
    "select", [lambda dataset: dataset.shuffle(seed=1), lambda dataset: dataset.select([7, 2, 5, 5, 0])]
)
def test_rows_are_named_by_their_own_index(select):
    dataset = select(
        Dataset.from_list(
            [{"prompt": "Q", "id": index} for index in range(6)]
            + [{"prompt": None, "id": 6}, {"prompt": "Q", "id": 7}]
        )
    )
    bad = [index for index, row in enumerate(dataset) if row["prompt"] is None]
    check = RowCheck({"prompt": PROMPT}, read=lambda row: None, collate=lambda rows: None)
    if not bad:
        check_rows("data", dataset, check)
        return
    with pytest.raises(ValueError, match=f"Row {bad[0]} of data"):
        check_rows("data", dataset, check)


def test_a_million_rows_take_seconds():
    number = 1_000_000
    roles = pa.DictionaryArray.from_arrays(pa.array([0, 1] * number, pa.int8()), ["user", "assistant"]).cast(
        pa.string()
    )
    offsets = pa.array(np.arange(0, 2 * number + 1, 2, dtype=np.int32))
    columns = {
        name: pa.ListArray.from_arrays(
            offsets, pa.StructArray.from_arrays([roles, pa.array(["Q", name] * number)], ["role", "content"])
        )
        for name in ("chosen", "rejected")
    }
    dataset = Dataset(pa.table(columns)).shuffle(seed=0)
    collated = []
    check = RowCheck(
        {"chosen": PROMPT, "rejected": PROMPT}, read=collated.append, collate=collated.append,
        is_plain=share_a_prompt, dialogue="chosen", collate_longest=True,
    )  # fmt: skip
    start = time.monotonic()
    check_rows("data", dataset, check)
    assert time.monotonic() - start < 10
    assert len(collated) < 200


@pytest.mark.parametrize(("good", "bad", "message"), PROMPTS)
def test_prompts_of_pairs_are_checked(good, bad, message):
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [good] * FIRST_BAD + [bad] * 3
    for given in (prompts, dataset_of([{"prompt": prompt} for prompt in prompts])):
        with pytest.raises(ValueError, match=rf"Row 5 of prompts cannot be used: .*({message})") as error:
            generate_contrastive_pairs(model, given, tokenizer=tokenizer, max_prompt_length=300)
        assert "prompt" in str(error.value)


@pytest.mark.parametrize(
    "bad", [{"chosen": None}, {"rejected": 3}, {"prompt": None}, {"chosen": user("Q") + assistant("a")}]
)
def test_pairs_to_score_are_checked(bad):
    with pytest.raises(ValueError, match="Row 5 of dataset cannot be used"):
        add_self_rewards(dataset_of(rows_with(bad, GOOD)), make_model(), tokenizer=make_tokenizer())


def test_pairs_cannot_be_sampled_with_tools():
    dataset = Dataset.from_list([{"prompt": user("Q"), "tools": "[{}]"}])
    with pytest.raises(ValueError, match="Pairs cannot be sampled with tools"):
        generate_contrastive_pairs(make_model(), dataset, tokenizer=make_tokenizer(), max_prompt_length=300)


def test_equal_conversations_are_used(tmp_path):
    pair = {"chosen": user("Q") + assistant("a"), "rejected": user("Q") + assistant("a")}
    make_ranking(tmp_path, Dataset.from_list([pair] * 3))
