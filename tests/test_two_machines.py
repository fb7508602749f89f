"""Two machines on loopback: they train like one, stop when one of them dies, and resume without paying twice."""

import json
import os
import shlex
import signal
import socket
import sys
import time
from collections import Counter
from contextlib import contextmanager

import psutil
import pytest
from safetensors.torch import load_file

from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from tests.cycle.stubs import read_log
from tests.cycle.test_distributed import untimed
from tests.test_launching import PROCESSES, ROOT, respond, write_policy_and_prompts

pytest.importorskip("deepspeed")

ZERO2 = {name: PROCESSES[name] for name in ("zero2.yaml", "zero2.json")}
MAX_STEPS = 6
STEP = 4  # requests per step: 2 micro-batches on each of 2 processes
PAID = ("usage/", "ranker/")  # a resumed run has these from the cache


class Judge(LoopbackEndpoint):
    """Judge that answers some requests at once and the following ones after a delay.

    Args:
        prompt: Number of requests that are answered at once.
        delay: Seconds until the others are answered.
    """

    def __init__(self, prompt=10**6, delay=0.0):
        super().__init__(self._respond_later)
        self.prompt, self.delay = prompt, delay

    def _respond_later(self, body):
        late = len(self.requests) > self.prompt
        return Reply(respond(body).content, delay=self.delay if late else 0.0)

    def wait_for(self, number, timeout=120):
        deadline = time.monotonic() + timeout
        while len(self.requests) < number:
            assert time.monotonic() < deadline, f"{len(self.requests)} requests"
            time.sleep(0.02)

    @property
    def repeated(self):
        """Number of requests that had been sent before."""
        counts = Counter(json.dumps(body["messages"]) for body in self.requests)
        return counts.total() - len(counts)


class Machine:
    """Launcher of one machine, and the processes that it has started.

    Args:
        folder: Folder of the policy and the prompts.
        judge: The judge.
        out: Output directory.
        arguments: Further arguments of the launcher and, after ` -- `, of the example.
    """

    def __init__(self, folder, judge, out, arguments):
        launcher, _, arguments = arguments.partition(" -- ")
        command = f"""-m accelerate.commands.launch {launcher} --mixed_precision no examples/cyclealign.py
            --model_name_or_path {folder}/policy --dataset_name {folder}/prompts --output_dir {out} --ranker_model judge
            --ranker_base_url {judge.base_url} --num_interactions 2 --max_prompt_length 64 --max_completion_length 8
            --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --max_steps {MAX_STEPS} --save_steps 2
            --logging_steps 1 --learning_rate 1e-3 --dtype float32 --use_cpu --disable_tqdm true {arguments}"""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "HF_DATASETS_CACHE": f"{out}-cache",
            "OPENAI_API_KEY": "a-key",
        }
        self._output = open(f"{out}-{time.monotonic()}.log", "w+")  # noqa: SIM115
        self._launcher = psutil.Popen(
            [sys.executable, *shlex.split(command)],
            env=environment,
            cwd=ROOT,
            stdout=self._output,
            stderr=self._output,
        )

    def wait(self, timeout=280):
        """Wait for the end, and return the exit status and the output."""
        status = self._launcher.wait(timeout)
        self._output.seek(0)
        return status, self._output.read()

    def send(self, number):
        """Send a signal to the launcher and all its processes."""
        for process in [self._launcher, *self._launcher.children(recursive=True)]:
            process.send_signal(number)

    def kill(self):
        if self._launcher.is_running():
            self.send(signal.SIGKILL)
            self._launcher.wait()
        self._output.close()


@contextmanager
def two_machines(folder, judge, outs, config, arguments="", num_processes=2):
    """Start both machines, and kill what is left of them in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = []
    try:
        for rank, out in enumerate(outs):
            launcher = f"""{ZERO2[config]} --num_machines 2 --machine_rank {rank} --main_process_ip 127.0.0.1
                --main_process_port {port} --num_processes {num_processes}"""
            machines.append(Machine(folder, judge, out, with_json(launcher, config, arguments)))
        yield machines
    finally:
        for machine in machines:
            machine.kill()


def with_json(launcher, config, arguments):
    json_file = f"--deepspeed examples/deepspeed/{config}" if config.endswith("json") else ""
    return f"{launcher} -- {json_file} {arguments}"


def finish(machines):
    for status, output in [machine.wait() for machine in machines]:
        assert status == 0, output[-4000:]


def history(out):
    """Return the logged metrics that do not depend on time or on the cache."""
    state = json.loads((out / f"checkpoint-{MAX_STEPS}" / "trainer_state.json").read_text())
    return [
        {name: value for name, value in log.items() if not name.startswith(PAID)}
        for log in untimed(state["log_history"])
    ]


def interactions(outs):
    """Return the rows of all output directories without their usage, by step and prompt."""
    rows = [{**row, "usage": None} for out in dict.fromkeys(outs) for row in read_log(out)]
    return sorted(rows, key=lambda row: (row["step"], str(row["prompt"])))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_policy_and_prompts(folder)
    return folder


@pytest.fixture(scope="module")
def one_machine(inputs, tmp_path_factory):
    """Run two processes on one machine without interruption, and return the output directory and the requests."""
    out = tmp_path_factory.mktemp("one") / "out"
    with Judge() as judge:
        launcher = f"{ZERO2['zero2.yaml']} --num_processes 2 --main_process_port 0"
        machine = Machine(inputs, judge, out, with_json(launcher, "zero2.yaml", ""))
        try:
            finish([machine])
        finally:
            machine.kill()
        assert len(judge.requests) == MAX_STEPS * STEP
        return out, {json.dumps(body["messages"]) for body in judge.requests}


def assert_equals_one_machine(outs, judge, one_machine):
    expected, requests = one_machine
    assert {json.dumps(body["messages"]) for body in judge.requests} == requests
    for ours, theirs in zip(history(outs[0]), history(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert interactions(outs) == interactions([expected])
    for out in dict.fromkeys(outs):
        weights, others = (load_file(folder / "model.safetensors") for folder in (out, expected))
        assert all(weights[name].allclose(others[name], rtol=1e-4, atol=1e-6) for name in others)


def directories(folder, shared):
    return [folder / "out"] * 2 if shared else [folder / "out-0", folder / "out-1"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("config", ZERO2)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_a_killed_machine_stops_the_other_and_both_resume(tmp_path, inputs, one_machine, shared, config):
    outs = directories(tmp_path, shared)
    arguments = "" if shared else "--save_on_each_node true"
    with Judge(prompt=3 * STEP, delay=3.0) as judge:
        with two_machines(inputs, judge, outs, config, arguments) as machines:
            judge.wait_for(4 * STEP)
            in_flight = STEP  # none of the last step is answered yet
            machines[1].send(signal.SIGKILL)
            killed = time.monotonic()
            status, output = machines[0].wait()
            seconds = time.monotonic() - killed
            assert status != 0
            assert seconds < 60, output[-4000:]
            print(f"the other machine stopped after {seconds:.1f} s")
        assert len(judge.requests) == 4 * STEP
        judge.delay = 0.0
        with two_machines(inputs, judge, outs, config, f"{arguments} --resume_from_checkpoint true") as machines:
            finish(machines)
        print(f"requests in flight: {in_flight}, repeated: {judge.repeated}")
        assert 0 < judge.repeated <= in_flight
        assert_equals_one_machine(outs, judge, one_machine)
