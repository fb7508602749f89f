"""Two machines on loopback: they train like one, stop when one of them dies, and resume without paying twice."""

import functools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
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

CONFIGS = {name: PROCESSES[name] for name in ("zero2.yaml", "zero2.json", "zero3.yaml")}
CONFIGS["ddp"] = CONFIGS["zero2.json"]  # without the JSON file
MAX_STEPS = 6
PER_PROCESS = 2  # requests per step: one in each micro-batch
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

    def wait_for(self, number, timeout=280):
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
        program: Arguments of Python that start the launcher or the command.
        arguments: Further arguments.
    """

    def __init__(self, folder, judge, out, program, arguments):
        command = f"""{program} --mixed_precision no {arguments}
            --model_name_or_path {folder}/policy --dataset_name {folder}/prompts --output_dir {out}
            --ranker_model judge --ranker_base_url {judge.base_url} --num_interactions 2
            --max_prompt_length 64 --max_completion_length 8 --per_device_train_batch_size 1
            --gradient_accumulation_steps 2 --max_steps {MAX_STEPS}
            --save_steps 2 --logging_steps 1 --learning_rate 1e-3 --dtype float32 --use_cpu --disable_tqdm true"""
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


def start(folder, judge, out, config, launcher, arguments):
    """Start the example on one machine."""
    json_file = f"--deepspeed examples/deepspeed/{config}" if config.endswith("json") else ""
    program = f"-m accelerate.commands.launch {CONFIGS[config]} {launcher}"
    return Machine(folder, judge, out, program, f"examples/cyclealign.py {json_file} {arguments}")


@contextmanager
def two_machines(start, outs, num_processes=2):
    """Start both machines by `start(out, arguments of the launcher)`, and kill what is left of them in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = []
    try:
        for rank, out in enumerate(outs):
            launcher = f"""--num_machines 2 --machine_rank {rank} --main_process_ip 127.0.0.1
                --main_process_port {port} --num_processes {num_processes}"""
            machines.append(start(out, launcher))
        yield machines
    finally:
        for machine in machines:
            machine.kill()


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
    """Return the rows of all output directories, copied into the first one, without their usage."""
    for out in set(outs) - {outs[0]}:  # as the page on several machines says
        shutil.copytree(out / "interactions", outs[0] / "interactions", dirs_exist_ok=True)
    rows = [{**row, "usage": None} for row in read_log(outs[0])]
    return sorted(rows, key=lambda row: (row["step"], str(row["prompt"])))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    # A machine that is killed while it compiles this would leave a lock, for which every later run waits.
    build = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True)
    folder = tmp_path_factory.mktemp("inputs")
    write_policy_and_prompts(folder)
    return folder


@pytest.fixture(scope="module")
def one_machine(inputs, tmp_path_factory):
    """Return a function that runs processes on one machine, once for each number of them.

    It returns the output directory and the requests.
    """

    @functools.cache
    def run(num_processes):
        out = tmp_path_factory.mktemp("one") / "out"
        with Judge() as judge:
            launcher = f"--num_processes {num_processes} --main_process_port 0"
            machine = start(inputs, judge, out, "zero2.yaml", launcher, "")
            try:
                finish([machine])
            finally:
                machine.kill()
            assert len(judge.requests) == MAX_STEPS * PER_PROCESS * num_processes
            return out, {json.dumps(body["messages"]) for body in judge.requests}

    return run


def assert_equals_one_machine(outs, judge, one_machine, with_model):
    """Assert that requests, metrics, interactions, and the models in some of the directories are the same."""
    expected, requests = one_machine
    assert {json.dumps(body["messages"]) for body in judge.requests} == requests
    for out in dict.fromkeys(outs):
        for ours, theirs in zip(history(out), history(expected), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for out in dict.fromkeys(with_model):
        weights, others = (load_file(folder / "model.safetensors") for folder in (out, expected))
        assert all(weights[name].allclose(others[name], rtol=1e-3, atol=1e-4) for name in others)
    assert interactions(outs) == interactions([expected])


def directories(folder, shared):
    return [folder / "out"] * 2 if shared else [folder / "out-0", folder / "out-1"]


def test_separate_directories_without_save_on_each_node_stop_both(tmp_path, inputs):
    with Judge() as judge:

        def train(out, launcher):
            program = f"-m cyclealign_trl train {CONFIGS['zero2.yaml']} {launcher}"
            return Machine(inputs, judge, out, program, "")

        with two_machines(train, directories(tmp_path, shared=False)) as machines:
            for machine in machines:
                status, output = machine.wait()
                assert status == 1
                assert "the machines of processes 1 do not see what process 0 writes" in output
                assert "cyclealign train: error: " in output
        assert judge.requests == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("config", "num_processes", "shared"),
    [
        ("zero2.yaml", 2, True),
        ("zero2.json", 2, True),
        ("zero2.yaml", 2, False),
        ("zero2.json", 2, False),
        ("zero2.yaml", 4, False),
        ("zero3.yaml", 2, False),
        ("ddp", 2, False),
    ],
)
def test_a_killed_machine_stops_the_other_and_both_resume(
    tmp_path, inputs, one_machine, config, num_processes, shared
):
    outs = directories(tmp_path, shared)
    arguments = "" if shared else "--save_on_each_node true"
    step = PER_PROCESS * num_processes
    with Judge(prompt=3 * step, delay=3.0) as judge:

        def run(out, launcher):
            return start(inputs, judge, out, config, launcher, arguments)

        with two_machines(run, outs, num_processes) as machines:
            judge.wait_for(4 * step)
            in_flight = step  # none of the last step is answered yet
            machines[1].send(signal.SIGKILL)
            killed = time.monotonic()
            status, output = machines[0].wait()
            seconds = time.monotonic() - killed
            assert status != 0
            assert seconds < 60, output[-4000:]
            print(f"the other machine stopped after {seconds:.1f} s")
        assert len(judge.requests) == 4 * step
        judge.delay = 0.0
        arguments += " --resume_from_checkpoint true"
        with two_machines(run, outs, num_processes) as machines:
            finish(machines)
        print(f"requests in flight: {in_flight}, repeated: {judge.repeated}")
        assert 0 < judge.repeated <= in_flight
        # ZeRO-3 gathers the weights on the first machine alone.
        with_model = outs[:1] if config == "zero3.yaml" else outs
        assert_equals_one_machine(outs, judge, one_machine(num_processes), with_model)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_that_hangs_stops_the_other_after_ddp_timeout(tmp_path, inputs):
    step = PER_PROCESS * 2
    with Judge(prompt=3 * step, delay=1.0) as judge:

        def run(out, launcher):
            return start(inputs, judge, out, "zero2.yaml", launcher, "--ddp_timeout 20 --ranking_timeout 10")

        with two_machines(run, directories(tmp_path, shared=True)) as machines:
            judge.wait_for(4 * step)
            machines[1].send(signal.SIGSTOP)
            stopped = time.monotonic()
            status, output = machines[0].wait()
            seconds = time.monotonic() - stopped
            print(f"the other machine stopped after {seconds:.1f} s")
            assert status != 0
            assert 15 < seconds < 60, output[-4000:]
