"""Rows and order of the identity warm-up."""

from datasets import Dataset

from cyclealign_trl.aligner.identity_warmup import WarmupSampler, num_warmup_rows, with_warmup

ROWS = [{"prompt": f"Q{i}", "answer": "no" * i, "correction": "yes"} for i in range(10)]


def test_golden_warmup_counts(golden):
    for case in golden["aligner"]["warmup_counts"]:
        assert num_warmup_rows(case["warmup_fraction"], case["num_qac"]) == case["num_qaa"]


def test_warmup_is_the_first_rows_with_the_answer_as_correction():
    dataset = with_warmup(Dataset.from_list(ROWS), 0.25)
    assert list(dataset["identity"]) == [True, True] + [False] * 10
    assert list(dataset["correction"]) == ["", "no"] + ["yes"] * 10
    assert list(dataset["prompt"][:3]) == ["Q0", "Q1", "Q0"]
    assert list(with_warmup(Dataset.from_list(ROWS), 0.0)["identity"]) == [False] * 10


def test_sampler_draws_the_warmup_once_and_then_whole_epochs():
    epoch = iter(range(3))
    identity = [True] * 3 + [False] * 7
    sampler = WarmupSampler(identity, window=2, seed=0, epoch=lambda: next(epoch))
    assert (sampler.num_warmup_steps, sampler.num_epoch_steps, len(sampler)) == (2, 4, 8)
    stream = []
    for _ in range(3):
        drawn = list(sampler)
        assert len(drawn) == len(sampler)
        stream += drawn
    warmup, first, second = stream[:4], stream[4:12], stream[12:20]
    assert set(warmup) == {0, 1, 2}
    assert warmup[3] == warmup[0]  # the last window is filled from the start of the pass
    for drawn in (first, second):
        assert set(drawn) == set(range(3, 10))
        assert drawn[7] == drawn[0]
    assert first != second
    other = WarmupSampler(identity, window=2, seed=1, epoch=lambda: 0)
    assert list(other) != stream[:8]


def test_sampler_without_warmup():
    sampler = WarmupSampler([False] * 3, window=2, seed=0, epoch=lambda: 0)
    assert sampler.num_warmup_steps == 0
    assert set(sampler) == {0, 1, 2}


def test_sampler_with_a_warmup_longer_than_an_epoch():
    sampler = WarmupSampler([True] * 3 + [False] * 3, window=8, seed=0, epoch=lambda: 0)
    assert set(sampler) == {0, 1, 2}  # one window, filled from three rows
