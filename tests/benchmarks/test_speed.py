"""Tests of the side-by-side benchmark: equal losses, correct limits, and the report of a run with a tiny model."""

import json
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.peer_adapter import loss_step
from benchmarks.speed.figures import draw_memory
from benchmarks.speed.limits import generation_flops, training_flops
from benchmarks.speed.loss import LOSSES, measure_in_one_process
from benchmarks.speed.measuring import Budget, NotMeasured, interleaved, isolated, peak_mib
from benchmarks.speed.peer_losses import PEER_LOSSES
from benchmarks.speed.plans import ONLINE_DPO, OURS, PLANS, UNSLOTH, StepWork
from benchmarks.speed.report import tables
from benchmarks.speed.shapes import EOS, LORA_MODULES, MODELS, add_lora, build_group, build_model
from benchmarks.speed.trainers import TRAINERS, missing

OUR_LOSS = {"PRO 2023": "pro", "RRHF 2023": "rrhf", "TRL, padded rows": "pro"}
TINY = MODELS["tiny"]


def loss_and_gradient(step, model, group):
    model.zero_grad()
    loss = step(model, group)
    loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    return loss.detach(), gradient


def float64_model(frozen_head=False):
    """Build a GPT-2. Qwen3 would round to float32 in each of its norms."""
    torch.manual_seed(0)
    sizes = {"vocab_size": TINY.vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=EOS))
    model.lm_head.weight.requires_grad_(not frozen_head)
    return model.double().eval()  # without dropout


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("peer", PEER_LOSSES)
def test_our_loss_and_gradient_equal_those_of_peers(peer, n, frozen_head):
    model = float64_model(frozen_head)
    group = build_group(TINY.vocabulary, 12, range(12, 12 - 2 * n, -2), "cpu")
    expected, expected_gradient = loss_and_gradient(PEER_LOSSES[peer], model, group)
    loss, gradient = loss_and_gradient(loss_step(OUR_LOSS[peer]), model, group)
    assert expected.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    assert (gradient - expected_gradient).norm() <= 1e-8 * expected_gradient.norm()


def test_losses_of_peers_depend_on_the_order():
    model = float64_model()
    group = build_group(TINY.vocabulary, 12, [12, 10, 6, 3], "cpu")
    reverse = type(group)(group.prompt, group.responses[::-1])
    for loss in PEER_LOSSES.values():
        assert loss(model, group).item() != pytest.approx(loss(model, reverse).item(), rel=1e-3)


def test_lora_freezes_all_other_weights():
    pytest.importorskip("peft")
    model = build_model("tiny", "cpu")
    add_lora(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * len(LORA_MODULES) * TINY.layers
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("lora", [False, True])
def test_limit_counts_the_matrix_products_of_a_plain_pass(lora):
    prompt, completion = 11, 7
    model = build_model("tiny", "cpu")
    if lora:  # without LoRA layers, whose operations do not count: their gradients reach the first layer
        for weight in model.parameters():
            weight.requires_grad_(False)
        embeddings = torch.randn(1, prompt + completion, TINY.hidden, requires_grad=True)
    ids = torch.randint(3, TINY.vocabulary, (1, prompt + completion))
    inputs = {"inputs_embeds": embeddings} if lora else {"input_ids": ids}
    with FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=completion).logits.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counted.items() if "mm" in str(operation))
    pairs = sum(range(1, prompt + completion + 1))
    attention = 3 * 4 * TINY.layers * TINY.heads * TINY.head_dim * pairs
    assert training_flops(TINY, prompt, [completion], lora) == products + attention


def test_limit_computes_the_prompt_once():
    one, two = (training_flops(TINY, 100, [10] * n, lora=False) for n in (1, 2))
    assert two - one < one / 4
    assert generation_flops(TINY, 100, [10]) < training_flops(TINY, 100, [10], lora=True)


def test_rounds_are_interleaved_and_the_first_does_not_count():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = interleaved(calls, 2, "cpu", 60)
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert len(interleaved(calls, 5, "cpu", 0)["a"]) == 1


def _allocate():
    tensor = torch.ones(64, 2**20, dtype=torch.uint8)
    return peak_mib(tensor.clone, "cpu")


def _fail():
    raise ValueError("no such thing\nand more")


def test_a_process_of_its_own_returns_its_result_or_the_reason():
    budget = Budget(60)
    assert isolated(max, 1, 2, device="cuda", budget=budget) == 2  # a new interpreter, because CUDA cannot be forked
    assert isolated(_allocate, device="cpu", budget=budget) == pytest.approx(64, abs=8)
    with pytest.raises(NotMeasured, match=r"^failed: ValueError: no such thing$"):
        isolated(_fail, device="cpu", budget=budget)
    with pytest.raises(NotMeasured, match="not finished within 1 s"):
        isolated(time.sleep, 60, device="cpu", budget=Budget(1))
    with pytest.raises(NotMeasured, match=r"not run: the 0 s of this part were over"):
        isolated(_allocate, device="cpu", budget=Budget(0))


def test_a_trainer_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental.online_dpo", None)
    monkeypatch.setitem(sys.modules, "unsloth", None)
    work = StepWork("tiny", 1, 4, 2, 4)
    assert missing(TRAINERS[OURS], work, "cpu") == ""
    assert missing(TRAINERS[ONLINE_DPO], work, "cpu") == f"absent from TRL {version('trl')}"
    assert missing(TRAINERS[UNSLOTH], work, "cpu") == "not installed: unsloth"


def test_losses_of_a_large_model_share_a_process(monkeypatch):
    """As on a GPU, where a loss can run out of memory."""

    def too_large(model, group):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(PEER_LOSSES, "RRHF 2023", too_large)
    seconds, peaks, notes = measure_in_one_process(PLANS["tiny"].loss[0], LOSSES, 2, 60, "cpu")
    assert notes == {"RRHF 2023": "out of memory"}
    assert seconds.keys() == peaks.keys() == set(LOSSES) - {"RRHF 2023"}
    assert {len(times) for times in seconds.values()} == {2}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("speed") / "report.json"
    command = [sys.executable, "-m", "benchmarks.speed", "--tiny", "--output", str(path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(path.read_text(encoding="utf-8")), finished.stdout


@pytest.mark.timeout(240)
def test_report_has_each_loss_of_each_work(report):
    report, printed = report
    rows = report["loss"]
    assert [(row["work"], row["loss"]) for row in rows] == [
        (str(work), name) for work in PLANS["tiny"].loss for name in LOSSES
    ]
    for row in rows:
        assert "note" not in row, row
        assert row["seconds"] > 0
        assert 0 < row["share_of_limit"] < 1
        assert ("ours_to_it_seconds" in row) == (row["loss"] != "ours")
        assert f"## loss: {row['work']}" in printed
    assert report["flops_per_second"] > 0
    assert report["versions"]["torch"] == torch.__version__


def test_report_has_each_trainer_of_each_work(report):
    report, printed = report
    works = {str(work): work for work in PLANS["tiny"].step}
    assert [(row["work"], row["trainer"]) for row in report["step"]] == [
        (work, name) for work in works for name in TRAINERS
    ]
    for row in report["step"]:
        assert row["note"] == missing(TRAINERS[row["trainer"]], works[row["work"]], "cpu")
        if row["note"]:
            assert row["note"] in printed
            assert "seconds" not in row
        else:
            assert row["seconds"] >= row["generate"] + row["train"] > row["train"] > 0
            assert row["peak_mib"] > 0
            assert ("ours_to_it_seconds" in row) == (row["trainer"] != OURS)


def test_report_has_the_memory_by_completions_and_its_prediction(report, tmp_path):
    rows = report[0]["memory"]
    assert [row["n"] for row in rows] == [2, 4, 8, 16]
    assert [row["shared_tokens"] for row in rows][:2] == [24 + 8 + 3, 24 + 8 + 7 + 5 + 3]
    assert [row["padded_tokens_growth"] for row in rows] == [1, 2, 4, 8]
    assert all({"ours_mib", "padded_mib"} <= row.keys() for row in rows)
    draw_memory(rows, tmp_path / "images" / "memory.svg")
    assert "<svg" in (tmp_path / "images" / "memory.svg").read_text(encoding="utf-8")


def test_tables_show_only_what_was_measured():
    rows = [{"work": "a", "loss": "ours", "seconds": 1.0}, {"work": "b", "loss": "ours", "note": "out of memory"}]
    first, second = tables("loss", rows).split("## loss: ")[1:]
    assert "| ours | 1 |" in first
    assert "note" not in first
    assert "out of memory" in second


def test_plans_vary_every_setting():
    loss = PLANS["gpu"].loss
    assert {"Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B"} == {work.model for work in loss}
    assert {work.lora for work in loss} == {True, False}
    assert {work.n for work in loss} == {2, 4, 8, 16}
    assert min(work.prompt_share for work in loss) == 0.25
    assert max(work.prompt_share for work in loss) == 0.9
    assert set(PLANS["gpu"].step[0].trainers) == set(TRAINERS)
    assert {work.vllm for work in PLANS["gpu"].step} == {True, False}
    assert sum(PLANS["gpu"].seconds.values()) < 600
    assert sum(PLANS["cpu"].seconds.values()) < 480
    assert sum(PLANS["quick"].seconds.values()) < 120
