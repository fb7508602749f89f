"""Checks that all configs share."""

import pytest
import torch

from cyclealign_trl import RankingConfig
from cyclealign_trl.training.config_checks import check_choice


def test_an_unknown_choice_raises_with_all_choices():
    check_choice("loss_type", "pro", ("pro", "rrhf"))
    with pytest.raises(ValueError, match="loss_type must be one of 'pro', 'rrhf', got 'dpo'"):
        check_choice("loss_type", "dpo", iter(("pro", "rrhf")))


def test_arguments_are_saved_without_tokens(tmp_path):
    config = RankingConfig(str(tmp_path), hub_token="hf_secret", model_init_kwargs={"dtype": "auto"})
    torch.save(config, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (loaded.hub_token, loaded.model_init_kwargs) == (None, {"dtype": "auto"})
    assert config.hub_token == "hf_secret"
