"""Prompts to evaluate on: HH-RLHF, other data sets, groups and samples."""

import gzip
import json

import pytest

from cyclealign_trl.data.hh_rlhf import SUBSETS, cut_at_role_tag
from cyclealign_trl.evaluation.prompts import load_prompts, read_prompts


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def dialogue(question, reply):
    return f"\n\nHuman: {question}\n\nAssistant: {reply}"


@pytest.mark.parametrize("layout", ["{}.test.jsonl.gz", "{}/test.jsonl.gz"])
def test_reads_the_subsets_of_hh_rlhf_from_a_folder(tmp_path, layout):
    for subset in SUBSETS:
        path = tmp_path / layout.format(subset)
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as lines:
            for index in (0, 1, 1):
                row = {name: dialogue(f"{subset} {index}", name) for name in ("chosen", "rejected")}
                lines.write(json.dumps(row) + "\n")
    prompts = load_prompts(str(tmp_path))
    assert prompts.group_sizes == dict.fromkeys(SUBSETS, 2)
    assert prompts.prompts[0].prompt == [{"role": "user", "content": "harmless-base 0"}]
    assert [prompt.group for prompt in prompts.prompts] == [subset for subset in SUBSETS for _ in range(2)]
    assert len({prompt.id for prompt in prompts.prompts}) == 8
    assert load_prompts(str(tmp_path), "helpful-online").group_sizes == {"helpful-online": 2}


def test_reads_any_data_set_by_a_column(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{index}?", "topic": "ab"[index % 2]} for index in range(5)]
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    prompts = load_prompts(str(path), group_column="topic")
    assert prompts.group_sizes == {"a": 3, "b": 2}
    assert prompts.dropped == {"repeated_prompt": 1}
    assert load_prompts(str(path)).group_sizes == {"all": 5}
    with pytest.raises(FileNotFoundError, match="missing"):
        load_prompts(str(tmp_path / "missing.jsonl"))


def test_reads_preference_pairs_and_published_dialogues(tmp_path):
    pair = {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]}
    pair["rejected"] = [pair["chosen"][0], {"role": "assistant", "content": "b"}]
    assert read_prompts([pair]).prompts[0].prompt == [{"role": "user", "content": "Hi"}]
    path = tmp_path / "dialogues.jsonl"
    path.write_text(json.dumps({"chosen": dialogue("Hi", "a"), "rejected": dialogue("Hi", "b")}))
    assert load_prompts(str(path)).prompts[0].prompt == [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="Row 0 has no readable prompt"):
        read_prompts([{"text": "Hi"}])
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts([])


def test_a_larger_sample_contains_a_smaller_one():
    rows = [{"prompt": f"{index}?", "subset": "ab"[index % 2]} for index in range(100)]
    small, large = (read_prompts(rows, max_samples=number, seed=3) for number in (10, 20))
    assert small.group_sizes == large.group_sizes == {"a": 50, "b": 50}
    assert len(small.prompts) == 20
    assert set(small.prompts) < set(large.prompts)
    assert set(read_prompts(rows, max_samples=10, seed=4).prompts) != set(small.prompts)
    with pytest.raises(ValueError, match="max_samples must be at least 1, got 0"):
        read_prompts(rows, max_samples=0)


def test_cuts_replies_like_the_reference(golden):
    assert golden["hh_rlhf"]["reply_truncation"]
    for case in golden["hh_rlhf"]["reply_truncation"]:
        assert cut_at_role_tag(case["raw"]) == case["expected"]
