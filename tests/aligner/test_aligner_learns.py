"""A trained aligner improves policies that it has never seen, and leaves good answers alone."""

import importlib.util
from pathlib import Path
from statistics import fmean

import pytest

from cyclealign_trl.demo.corpus import questions
from cyclealign_trl.demo.corrections import good_answers

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "aligner.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_unseen_policies_improve_and_good_answers_stay_unchanged():
    spec = importlib.util.spec_from_file_location("aligner_benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    held_out = questions("held_out") * 4
    prompts = [[{"role": "user", "content": question}] for question in held_out]
    aligner = benchmark.train_aligner(0, warmup_fraction=0.2, num_rows=8000, epochs=3)
    for number, kinds in enumerate(benchmark.POLICIES.values()):
        answers = benchmark.pretrain(kinds, 200 + number)(prompts)
        before = benchmark.mean_score(held_out, answers)
        after = benchmark.mean_score(held_out, aligner.correct(prompts, answers))
        assert before < 0.4
        assert after > 0.85
    good_prompts, good = good_answers(5)
    corrected = aligner.correct(good_prompts, good)
    assert fmean(text == answer for text, answer in zip(corrected, good, strict=True)) >= 0.9
