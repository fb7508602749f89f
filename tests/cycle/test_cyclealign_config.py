"""Arguments that contradict each other or the demonstration pool."""

import pytest

from cyclealign_trl import DemonstrationPool
from tests.cycle.stubs import config, make_trainer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"num_interactions": 0}, "num_interactions must be at least 1, got 0"),
        ({"min_agreement": 1}, "min_agreement must be at least 2, got 1"),
        ({"loss_type": "dpo"}, "loss_type must be one of 'pro', 'rrhf', got 'dpo'"),
        ({"sft_target": "best"}, "sft_target must be one of 'improved', 'top_ranked'"),
        ({"policy_score": "p"}, "policy_score must be one of"),
        ({"demonstration_scope": "global"}, "demonstration_scope must be one of 'prompt', 'run'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"sft_weight": -1.0}, "sft_weight must be 0 or more"),
        ({"max_ranking_failures": 2.0}, "share from 0 to 1"),
        ({"max_eval_samples": 0}, "at least 1 prompt"),
        ({"max_prompt_length": 0}, "at least 1 token"),
        ({"max_completion_length": 0}, "at least 1 token"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
)
def test_invalid_values_raise(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **change)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at_budget_cap": "sft", "sft_weight": 0.0}, "trains nothing with sft_weight=0"),
        ({"at_budget_cap": "pause"}, "at_budget_cap must be one of 'stop', 'sft', got 'pause'"),
        ({"ranking_timeout": 0.0}, "ranking_timeout must be above 0"),
    ],
)
def test_budget_and_timeout_settings_without_effect_raise(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    "setting",
    [
        {"max_demonstrations": 7},
        {"demonstration_scope": "run"},
        {"use_static_demonstrations": False},
        {"use_dynamic_demonstrations": False},
    ],
)
def test_a_pool_that_contradicts_the_arguments_raises(tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        make_trainer(tmp_path, demonstrations=DemonstrationPool(), **setting)


def test_something_else_than_a_pool_raises(tmp_path):
    with pytest.raises(TypeError, match="demonstrations must be a DemonstrationPool, got list"):
        make_trainer(tmp_path, demonstrations=[])
