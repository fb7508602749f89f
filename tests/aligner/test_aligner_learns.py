"""A trained aligner improves policies that it has never seen and leaves perfect answers unchanged."""

from statistics import fmean

import pytest

from benchmarks.aligner import POLICIES, mean_score, messages, perfect_answers, pretrain_upstream, train_aligner
from cyclealign_trl.demo.corpus import questions


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_aligner_improves_unseen_policies_and_keeps_perfect_answers():
    held_out = questions("held_out") * 4
    prompts = [messages(question) for question in held_out]
    aligner = train_aligner(0, warmup_fraction=0.2, num_rows=8000, epochs=3)
    for number, kinds in enumerate(POLICIES.values()):
        answers = pretrain_upstream(kinds, 200 + number)(prompts)
        before = mean_score(held_out, answers)
        after = mean_score(held_out, aligner.correct(prompts, answers))
        assert before < 0.4
        assert after > 0.85
    perfect_prompts, perfect = perfect_answers(5)
    corrected = aligner.correct(perfect_prompts, perfect)
    assert fmean(text == answer for text, answer in zip(corrected, perfect, strict=True)) >= 0.9
