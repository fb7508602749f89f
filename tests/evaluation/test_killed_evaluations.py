"""A run that is killed with SIGKILL in an evaluation resumes with the same log, and asks for nothing twice."""

import json
import multiprocessing
import os
import signal

from tests.cycle.stubs import make_trainer
from tests.evaluation.test_win_rate_callback import Judge, add_win_rate, untimed

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["tests.cycle.stubs", "cyclealign_trl.evaluation.win_rate_callback"])


def run_killed(folder, kill_at=None):
    """Start or resume a run, and write its log. The process kills itself at request number `kill_at` to the judge."""

    class KilledJudge(Judge):
        def answer(self, request):
            if len(asked) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            asked.append(request)
            return super().answer(request)

        def stream(self, requests):
            yield from enumerate(map(self.answer, requests))

    asked = []
    trainer = make_trainer(folder, save_strategy="steps", save_steps=3, learning_rate=0.05)
    add_win_rate(trainer, KilledJudge())
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*/cyclealign.complete")))
    (folder / "end.json").write_text(json.dumps([len(asked), trainer.state.log_history]))


def test_a_run_killed_in_an_evaluation_resumes_and_asks_for_the_missing_rankings_alone(tmp_path):
    def run(folder, kill_at=None):
        process = FORK_SERVER.Process(target=run_killed, args=(folder, kill_at))
        process.start()
        process.join()
        return process.exitcode

    run_killed(tmp_path / "whole")
    asked, expected = json.loads((tmp_path / "whole" / "end.json").read_text())
    assert run(tmp_path / "killed", kill_at=11) == -signal.SIGKILL  # in the evaluation of step 4
    assert run(tmp_path / "killed") == 0
    missing, history = json.loads((tmp_path / "killed" / "end.json").read_text())
    assert untimed(history)[:-1] == untimed(expected)[:-1]
    assert missing == asked - 11
