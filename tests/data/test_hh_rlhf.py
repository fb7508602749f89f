"""HH-RLHF: parsing and dropping rows, dataset formats, files, and sampling prompts."""

import gzip
import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from datasets import Dataset, Features, List, Value

from cyclealign_trl.data import hh_rlhf
from cyclealign_trl.data.hh_rlhf import (
    HUB_ID,
    SUBSETS,
    Pair,
    load_hh_rlhf,
    prompt_text,
    sample_prompts,
    split_pair,
)
from cyclealign_trl.types import prompt_key

ROLES = {"Human": "user", "Assistant": "assistant"}
STATUSES = {"dropped_length_mismatch": "different_turns", "assertion_first_turn_not_human": "broken_turns"}


def messages(*texts):
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def dialogue(*texts):
    return "".join(f"\n\n{('Human', 'Assistant')[index % 2]}: {text}" for index, text in enumerate(texts))


def row(question, chosen, rejected):
    return {"chosen": dialogue(question, chosen), "rejected": dialogue(question, rejected)}


ROWS = [
    {"chosen": dialogue("Q1", "A1", "Q2", "good"), "rejected": dialogue("Q1", "A1", "Q2", "bad")},
    row("Q", "same", "same"),
    row("Q", "", "bad"),
    row("Q", "first\n\nsecond", "bad"),
]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def directory(tmp_path):
    for subset in SUBSETS:
        write(tmp_path / subset / "test.jsonl.gz")
    return tmp_path


# Splitting rows


def test_rows_are_split_as_by_the_reference_filter(golden):
    cases = golden["hh_rlhf"]["filter"]
    assert len(cases) == 5
    for case in cases:
        expected = case["expected"]
        pair = split_pair(case["chosen"], case["rejected"], keep_paragraphs=False)
        if expected["status"] != "kept":
            assert pair == STATUSES[expected["status"]], case["name"]
            continue
        turns = [{"role": ROLES[speaker], "content": text} for speaker, text in expected["chosen_turns"]]
        assert pair == Pair(turns[:-1], expected["good"], expected["bad"]), case["name"]
        assert pair.chosen == turns[-1]["content"]
        assert prompt_text(pair.prompt) == expected["prompt_text"]


def test_a_paragraph_belongs_to_the_turn_before_it():
    chosen = dialogue("List two\n\nplease", "One.\n\n\n\nTwo.  \n\n", "Thanks\n\n- a lot", "Gladly.\n\nBye!")
    rejected = dialogue("List two\n\nplease", "One.\n\n\n\nTwo.  \n\n", "Thanks\n\n- a lot", "No.")
    prompt = messages("List two\n\nplease", "One.\n\n\n\nTwo.", "Thanks\n\n- a lot")
    assert split_pair(chosen, rejected) == Pair(prompt, "Gladly.\n\nBye!", "No.")
    lost = Pair(messages("List two", "One.", "Thanks"), "Gladly.", "No.")
    assert split_pair(chosen, rejected, keep_paragraphs=False) == lost


def test_a_tag_without_a_space_keeps_the_next_character():
    assert split_pair("\n\nHuman:abc\n\nAssistant:def", "\n\nHuman:abc\n\nAssistant: ghi") == Pair(
        messages("abc"), "def", "ghi"
    )


@pytest.mark.parametrize("keep_paragraphs", [True, False])
def test_only_a_tag_at_the_start_of_a_block_starts_a_turn(keep_paragraphs):
    chosen = "Human: Hi\n\nAssistant: You said: Human: Hi\nAssistant: so?"
    rejected = "Human: Hi\n\nAssistant: Human: Hi"
    pair = Pair(messages("Hi"), "You said: Human: Hi\nAssistant: so?", "Human: Hi")
    assert split_pair(chosen, rejected, keep_paragraphs) == pair


@pytest.mark.parametrize("keep_paragraphs", [True, False])
def test_consecutive_turns_of_one_speaker_are_joined(keep_paragraphs):
    prompt = "\n\nHuman: Hi \n\nHuman: there"
    pair = split_pair(f"{prompt}\n\nAssistant: Hello\n\nAssistant: you", f"{prompt}\n\nAssistant: No", keep_paragraphs)
    assert pair == Pair(messages("Hi\nthere"), "Hello\nyou", "No")


DROPPED = {
    "no_assistant": [("\n\nHuman: Hi", "\n\nHuman: Hi"), ("", "")],
    "different_turns": [
        (dialogue("Q", "A"), dialogue("Q", "A", "Q2")),
        # "broken_turns" applies too, but is checked later.
        (dialogue("Q", "A", "Q2"), dialogue("Q", "A")),
        (dialogue("Q", "A"), ""),
    ],
    "broken_turns": [
        (dialogue("Q", "A", "Q2"), dialogue("Q", "A", "Q2")),
        ("\n\nHuman: Assistant", "\n\nHuman: Hi"),
        (dialogue("Q", "A"), "\n\nAssistant: A\n\nHuman: Q"),
        ("\n\nAssistant: A\n\nHuman: Q", dialogue("Q", "A")),
        ("Assistant", "Assistant"),
        ("\n\nAssistant: A", "\n\nAssistant: B"),
    ],
    "different_prompts": [
        (dialogue("Q", "A"), dialogue("P", "")),
        (dialogue("Q", "a", "P", "A"), dialogue("Q", "b", "P", "B")),
    ],
    "empty_reply": [
        (dialogue("Q", ""), dialogue("Q", "A")),
        (dialogue("Q", "A"), dialogue("Q", "\n\n ")),
        (dialogue("Q", ""), dialogue("Q", "")),
        (dialogue("Q", "") + "\n\nAssistant: ", dialogue("Q", "A")),
    ],
    "equal_replies": [(dialogue("Q", "A"), dialogue("Q", "A")), (dialogue("Q", "A"), dialogue("Q", "A "))],
}


@pytest.mark.parametrize("keep_paragraphs", [True, False])
@pytest.mark.parametrize("reason", DROPPED)
def test_rows_are_dropped_for_each_reason(reason, keep_paragraphs):
    for chosen, rejected in DROPPED[reason]:
        assert split_pair(chosen, rejected, keep_paragraphs) == reason, (chosen, rejected)


def test_text_before_the_first_tag_breaks_the_turns_unless_paragraphs_are_lost():
    chosen, rejected = "Title" + dialogue("Q", "A"), "Title" + dialogue("Q", "B")
    assert split_pair(chosen, rejected) == "broken_turns"
    assert split_pair(chosen, rejected, keep_paragraphs=False) == Pair(messages("Q"), "A", "B")


def test_completions_that_differ_only_in_a_lost_paragraph_are_equal():
    chosen, rejected = dialogue("Q", "A\n\nB"), dialogue("Q", "A\n\nC")
    assert split_pair(chosen, rejected) == Pair(messages("Q"), "A\n\nB", "A\n\nC")
    assert split_pair(chosen, rejected, keep_paragraphs=False) == "equal_replies"


# Dataset formats

MESSAGES = List({"role": Value("string"), "content": Value("string")})


def assistant(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("dataset_type", "conversational", "expected", "features"),
    [
        ("prompt-only", True, {}, {}),
        ("prompt-only", False, {}, {}),
        (
            "preference",
            True,
            {"chosen": assistant("good"), "rejected": assistant("bad")},
            {"chosen": MESSAGES, "rejected": MESSAGES},
        ),
        (
            "preference",
            False,
            {"chosen": " good", "rejected": " bad"},
            {"chosen": Value("string"), "rejected": Value("string")},
        ),
        (
            "ranked",
            True,
            {"completions": [assistant("good"), assistant("bad")], "ranks": [0, 1]},
            {"completions": List(MESSAGES), "ranks": List(Value("int64"))},
        ),
        (
            "ranked",
            False,
            {"completions": [" good", " bad"], "ranks": [0, 1]},
            {"completions": List(Value("string")), "ranks": List(Value("int64"))},
        ),
    ],
)
def test_columns_and_features_of_each_type(directory, dataset_type, conversational, expected, features):
    dataset = load_hh_rlhf("helpful-base", "test", directory, dataset_type=dataset_type, conversational=conversational)
    prompt = (
        messages("Q1", "A1", "Q2") if conversational else "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant:"
    )
    assert dataset[0] == {"prompt": prompt, **expected, "subset": "helpful-base"}
    text = MESSAGES if conversational else Value("string")
    assert dataset.features == Features({"prompt": text, **features, "subset": Value("string")})
    assert dataset.column_names == ["prompt", *features, "subset"]
    assert len(dataset) == 2


def test_an_empty_dataset_has_all_columns(tmp_path):
    write(tmp_path / "helpful-base.test.jsonl", ROWS[1:2])
    dataset = load_hh_rlhf("helpful-base", "test", tmp_path)
    assert dataset.features == load_hh_rlhf("helpful-base", "test", write(tmp_path / "kept.jsonl")).features
    assert len(dataset) == 0


def test_the_description_counts_rows_by_subset_and_reason(directory):
    write(directory / "helpful-online/test.jsonl.gz", ROWS[:1])
    dataset = load_hh_rlhf(["helpful-online", "harmless-base"], "test", directory)
    assert dataset.info.description == (
        "helpful-online/test: 1 rows, 1 kept; dropped: none\n"
        "harmless-base/test: 4 rows, 2 kept; dropped: empty_reply 1, equal_replies 1"
    )
    assert dataset["subset"][:] == ["helpful-online", "harmless-base", "harmless-base"]


def test_prompt_only_drops_repeated_prompts(directory):
    write(directory / "harmless-base/test.jsonl.gz", [row("Q", "A", "B"), row("Q", "A", "C"), row("R", "A", "B")])
    write(directory / "helpful-base/test.jsonl.gz", [row("S", "A", "B"), row("R", "D", "E")])
    dataset = load_hh_rlhf(SUBSETS[:2], "test", directory, dataset_type="prompt-only")
    assert dataset["prompt"][:] == [messages("Q"), messages("R"), messages("S")]
    assert dataset.info.description == (
        "harmless-base/test: 3 rows, 2 kept; dropped: repeated_prompt 1\n"
        "helpful-base/test: 2 rows, 1 kept; dropped: repeated_prompt 1"
    )
    assert len(load_hh_rlhf(SUBSETS[:2], "test", directory)) == 5


def test_paragraphs_are_kept_by_default(directory):
    for settings, expected in (({}, " first\n\nsecond"), ({"keep_paragraphs": False}, " first")):
        dataset = load_hh_rlhf("helpful-base", "test", directory, conversational=False, **settings)
        assert dataset[1]["chosen"] == expected


# Files and the Hub


@pytest.mark.parametrize("name", ["{}/{}.jsonl.gz", "{}/{}.jsonl", "{}.{}.jsonl.gz", "{}.{}.jsonl"])
def test_every_local_layout_is_read(tmp_path, name):
    for number, subset in enumerate(SUBSETS):
        for split in ("train", "test"):
            write(tmp_path / name.format(subset, split), [row(f"{split}\u2028{number} –", "A", "B")])
    for split in ("train", "test"):
        dataset = load_hh_rlhf(split=split, path=str(tmp_path))
        assert dataset["subset"][:] == list(SUBSETS)
        assert dataset["prompt"][:] == [messages(f"{split}\u2028{number} –") for number in range(4)]
    assert load_hh_rlhf(path=tmp_path)["prompt"][0] == messages("train\u20280 –")


def test_a_path_can_be_a_file(tmp_path):
    file = write(tmp_path / "anything.jsonl")
    assert load_hh_rlhf("helpful-base", "test", file)["subset"][:] == ["helpful-base"] * 2
    with pytest.raises(ValueError, match="Got 4"):
        load_hh_rlhf(None, "test", file)


def test_rows_are_loaded_from_the_hub(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(hh_rlhf, "load_dataset", load_dataset)
    assert len(load_hh_rlhf()) == 8
    assert HUB_ID == "Anthropic/hh-rlhf"
    assert calls == [((HUB_ID,), {"data_dir": subset, "split": "train"}) for subset in SUBSETS]
    assert load_hh_rlhf("helpful-online", "test")[1]["chosen"] == assistant("first\n\nsecond")
    assert calls[4:] == [((HUB_ID,), {"data_dir": "helpful-online", "split": "test"})]


def test_missing_files_are_named_in_the_error(directory):
    with pytest.raises(FileNotFoundError) as error:
        load_hh_rlhf("helpful-base", "train", directory)
    names = (
        "helpful-base/train.jsonl.gz, helpful-base/train.jsonl, helpful-base.train.jsonl.gz, helpful-base.train.jsonl"
    )
    assert f"No train rows of 'helpful-base' in {directory}: looked for {names}." in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_hh_rlhf("helpful-base", "train", directory / "nowhere")


def test_files_of_another_format_raise(tmp_path):
    file = write(tmp_path / "a.jsonl", [ROWS[0], {"chosen": "text", "prompt": "text"}])
    with pytest.raises(ValueError, match=r"Line 2 of .*a\.jsonl must have .*; it has \['chosen', 'prompt'\]"):
        load_hh_rlhf("helpful-base", "test", file)
    pointer = tmp_path / "pointer.jsonl.gz"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_hh_rlhf("helpful-base", "test", pointer)


@pytest.mark.parametrize("subset", ["red-team-attempts", [], ["helpful-base", "helpful-base"], ["helpful-base", "x"]])
def test_invalid_subsets_raise(directory, subset):
    with pytest.raises(ValueError, match="subset must be one of"):
        load_hh_rlhf(subset, "test", directory)


def test_invalid_splits_and_types_raise(directory):
    with pytest.raises(ValueError, match=r"split must be one of .* got 'dev'"):
        load_hh_rlhf("helpful-base", "dev", directory)
    with pytest.raises(ValueError, match=r"dataset_type must be one of .* got 'pairs'"):
        load_hh_rlhf("helpful-base", "test", directory, dataset_type="pairs")


# Sampling prompts


def population(sizes, repeats=1):
    return Dataset.from_list(
        [
            {"prompt": messages(f"{subset} {number}"), "subset": subset, "chosen": "unused"}
            for subset, size in sizes.items()
            for number in range(size)
            for _ in range(repeats)
        ]
    )


SIZES = {"b": 40, "a": 10, "d": 30, "c": 20}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"n": 20}, {"b": 5, "a": 5, "d": 5, "c": 5}),
        ({"n": 23}, {"b": 6, "a": 6, "d": 6, "c": 5}),
        ({"n": 10, "per_subset": "proportional"}, {"b": 4, "a": 1, "d": 3, "c": 2}),
        # Shares 5.2, 1.3, 3.9, 2.6: the two largest remainders are rounded up.
        ({"n": 13, "per_subset": "proportional"}, {"b": 5, "a": 1, "d": 4, "c": 3}),
        ({"n": 100, "per_subset": "proportional"}, SIZES),
        ({"per_subset": {"c": 3, "a": 10, "b": 0}}, {"c": 3, "a": 10}),
        ({"n": 13, "per_subset": {"c": 3, "a": 10}}, {"c": 3, "a": 10}),
    ],
)
def test_prompts_are_divided_among_the_subsets(settings, expected):
    sampled = sample_prompts(population(SIZES, repeats=2), **settings)
    assert Counter(sampled["subset"]) == expected
    assert sampled.column_names == ["prompt", "subset"]
    assert len({prompt_key(prompt) for prompt in sampled["prompt"]}) == len(sampled)
    assert all(prompt[0]["content"].startswith(subset) for prompt, subset in zip(*sampled[:].values(), strict=True))


def test_1000_prompts_are_sampled_by_default():
    dataset = population({"a": 600, "b": 600, "c": 300})
    assert Counter(sample_prompts(dataset, per_subset="proportional")["subset"]) == {"a": 400, "b": 400, "c": 200}
    assert len(sample_prompts(population({"a": 500, "b": 500}))) == 1000


def test_sample_and_order_depend_on_the_seed_only():
    dataset = population(SIZES)
    state = random.getstate()
    first, repeated, other = (sample_prompts(dataset, 20, seed=seed)[:] for seed in (1, 1, 2))
    assert random.getstate() == state
    assert first == repeated
    assert {prompt_key(prompt) for prompt in first["prompt"]} != {prompt_key(prompt) for prompt in other["prompt"]}
    # Subsets are mixed, so that a run that stops early has used all of them.
    assert set(first["subset"][:10]) == set(SIZES)
    # The sample is not taken from the start of a subset.
    assert any(int(prompt[0]["content"].split()[1]) >= 20 for prompt in first["prompt"])


def test_a_prompt_in_several_subsets_belongs_to_the_first():
    rows = [{"prompt": text, "subset": subset} for subset, text in [("a", "P"), ("b", "P"), ("b", "Q"), ("a", "R")]]
    sampled = sample_prompts(Dataset.from_list(rows), per_subset={"a": 2, "b": 1})
    assert sorted(zip(sampled["subset"], sampled["prompt"], strict=True)) == [("a", "P"), ("a", "R"), ("b", "Q")]
    with pytest.raises(ValueError, match="2 from 'b', which has 1 distinct prompts"):
        sample_prompts(Dataset.from_list(rows), n=4)


def test_invalid_samples_raise():
    dataset = population(SIZES)
    message = "Cannot sample 11 from 'a', which has 10 distinct prompts or 7 from 'x', which has 0 distinct prompts"
    with pytest.raises(ValueError, match=message):
        sample_prompts(dataset, per_subset={"a": 11, "b": 40, "x": 7})
    with pytest.raises(ValueError, match="n=5 contradicts per_subset, whose numbers sum to 4"):
        sample_prompts(dataset, 5, {"a": 4})
    with pytest.raises(ValueError, match="got 'even'"):
        sample_prompts(dataset, 4, "even")
    with pytest.raises(ValueError, match="-1 from 'a'"):
        sample_prompts(dataset, per_subset={"a": -1})
    with pytest.raises(ValueError, match="41 from 'b', which has 40"):
        sample_prompts(dataset, 101, "proportional")
    with pytest.raises(ValueError, match=r"got 100 rows of \['prompt'\]"):
        sample_prompts(dataset.select_columns(["prompt"]))
    with pytest.raises(ValueError, match="got 0 rows"):
        sample_prompts(dataset.select([]))


# Published test files. A second parser confirmed the counts.

COUNTS = {
    True: {
        "harmless-base": (2312, 2308, "empty_reply 4", 2306),
        "helpful-base": (2354, 2348, "empty_reply 4, equal_replies 2", 2348),
        "helpful-online": (1137, 1130, "different_turns 2, empty_reply 3, equal_replies 2", 1130),
        "helpful-rejection-sampled": (2749, 2717, "equal_replies 32", 2716),
    },
    # Without the text after blank lines, ten more pairs are equal.
    False: {
        "harmless-base": (2312, 2308, "empty_reply 4", 2306),
        "helpful-base": (2354, 2348, "empty_reply 4, equal_replies 2", 2348),
        "helpful-online": (1137, 1122, "different_turns 2, empty_reply 3, equal_replies 10", 1122),
        "helpful-rejection-sampled": (2749, 2715, "equal_replies 34", 2714),
    },
}


@pytest.fixture
def published(optional_data):
    return optional_data / "data" / "hh_rlhf"


@pytest.mark.parametrize("keep_paragraphs", [True, False])
def test_published_files_have_the_expected_counts(published, keep_paragraphs):
    dataset = load_hh_rlhf(split="test", path=published, keep_paragraphs=keep_paragraphs)
    counts = COUNTS[keep_paragraphs]
    assert dataset.info.description.splitlines() == [
        f"{subset}/test: {rows} rows, {kept} kept; dropped: {dropped}"
        for subset, (rows, kept, dropped, _) in counts.items()
    ]
    assert Counter(dataset["subset"]) == {subset: kept for subset, (_, kept, _, _) in counts.items()}
    prompts = load_hh_rlhf(split="test", path=published, keep_paragraphs=keep_paragraphs, dataset_type="prompt-only")
    assert Counter(prompts["subset"]) == {subset: distinct for subset, (_, _, _, distinct) in counts.items()}


def test_open_assistants_filter_keeps_all_of_harmless_base(published):
    """Open-Assistant's loader has two reasons to drop a row. It keeps 2312 rows with 2310 distinct prompts."""
    with gzip.open(published / "harmless-base.test.jsonl.gz", "rt", encoding="utf-8") as lines:
        outcomes = [
            split_pair(row["chosen"] + " .", row["rejected"] + " ,", keep_paragraphs=False)
            for row in map(json.loads, lines)
        ]
    # The appended characters rule out empty and equal completions, which that loader keeps.
    assert Counter(map(type, outcomes)) == {Pair: 2312}
    assert len({prompt_key(pair.prompt) for pair in outcomes}) == 2310


def test_prompt_and_completion_rebuild_the_published_dialogue(published):
    """All but 38 of 17006 dialogues. In those, one speaker has consecutive turns, which are joined."""
    rows = 0
    changed = []
    for subset in SUBSETS:
        with gzip.open(published / f"{subset}.test.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                pair = split_pair(row["chosen"], row["rejected"])
                if isinstance(pair, Pair):
                    rows += 1
                    for kind in ("chosen", "rejected"):
                        text = f"{prompt_text(pair.prompt)} {getattr(pair, kind)}"
                        if text.strip() != row[kind].strip():
                            changed.append((kind, row[kind]))
    assert rows == 8503
    assert Counter(kind for kind, _ in changed) == {"chosen": 18, "rejected": 20}
    for _, text in changed:
        tags = [block.split(":")[0] for block in text.split("\n\n") if block.startswith(("Human:", "Assistant:"))]
        assert any(tag == after for tag, after in pairwise(tags))


def test_completions_of_several_turns_share_a_prompt(published):
    """In 17 pairs, a completion consists of consecutive turns, so the texts differ before the last "Assistant:"."""
    outcomes = []
    for subset in SUBSETS:
        with gzip.open(published / f"{subset}.test.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                prefixes = {text.rpartition("\n\nAssistant:")[0] for text in row.values()}
                if len(prefixes) > 1:
                    outcomes.append(split_pair(row["chosen"], row["rejected"]))
    assert Counter(map(type, outcomes)) == {Pair: 17}


def test_prompts_are_sampled_from_the_published_subsets(published):
    dataset = load_hh_rlhf(split="test", path=published, dataset_type="prompt-only")
    assert Counter(sample_prompts(dataset)["subset"]) == dict.fromkeys(SUBSETS, 250)
    proportional = Counter(sample_prompts(dataset, per_subset="proportional")["subset"])
    assert [proportional[subset] for subset in SUBSETS] == [271, 276, 133, 320]
