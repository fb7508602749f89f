"""Two processes log the same win rates and accuracies as one, and stop together."""

import json

import pytest

from tests.cycle.test_distributed import ROOT, launch
from tests.evaluation.callbacks_worker import run
from tests.evaluation.test_win_rate_callback import comparisons, untimed


@pytest.mark.parametrize("config", [None, pytest.param("zero3.json", marks=pytest.mark.slow)], ids=["ddp", "zero3"])
def test_two_processes_match_one(tmp_path, config):
    if config:
        pytest.importorskip("deepspeed")
    deepspeed = [f"{ROOT}/examples/deepspeed/{config}"] if config else []
    launch("-m", "tests.evaluation.callbacks_worker", str(tmp_path / "two"), "2", *deepspeed)
    first, second = (json.loads((tmp_path / "two" / f"result-{index}.json").read_text()) for index in range(2))
    one = run(tmp_path / "one", 1)
    of_a_process = {"pool/size": 0.0}
    for name, expected in one["logs"].items():
        assert untimed(first["logs"][name]) == untimed(second["logs"][name])
        for theirs, ours in zip(untimed(first["logs"][name]), untimed(expected), strict=True):
            assert theirs | of_a_process == pytest.approx(ours | of_a_process, rel=1e-3, abs=1e-5)
    assert comparisons(tmp_path / "two" / "whole", 4) == comparisons(tmp_path / "one" / "whole", 4)
    assert untimed(first["logs"]["resumed"])[:-1] == untimed(first["logs"]["whole"])[:-1]

    # Each process asks for its share, and all calls are logged.
    logged = [sum(log.get("win_rate/cost", 0) for log in result["logs"]["whole"]) for result in (one, first, second)]
    assert logged == [one["spent"]] * 3
    assert first["spent"] + second["spent"] == one["spent"]
    assert first["spent"] > 0
    assert second["spent"] > 0

    saved = "wrong key Resume with trainer.train(resume_from_checkpoint="
    assert second["error"].startswith(saved)
    assert first["error"].startswith(f"The ranker failed on process 1. RankerError: {saved}")
    assert (tmp_path / "two" / "broken" / "checkpoint-2" / "cyclealign.complete").exists()
