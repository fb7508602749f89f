"""Replies: models, adapters over one base, endpoints, aligners, data sets; stored, resumed and never repeated."""

import json
import threading

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cyclealign_trl.aligner.aligner_template import AlignerTemplate
from cyclealign_trl.aligner.upstreams import FunctionUpstream
from cyclealign_trl.chat import client
from cyclealign_trl.demo.loopback import LoopbackEndpoint
from cyclealign_trl.demo.loopback import Reply as HTTPReply
from cyclealign_trl.errors import UpstreamError
from cyclealign_trl.evaluation.prompts import read_prompts
from cyclealign_trl.evaluation.replies import collect_replies, file_name
from cyclealign_trl.evaluation.sources import ReplySettings, UpstreamSource, parse_source
from cyclealign_trl.models import model_pool
from tests.conftest import make_model, make_tokenizer

SETTINGS = ReplySettings(max_new_tokens=8, max_prompt_length=60, batch_size=4, device="cpu")
MESSAGES = [[{"role": "user", "content": f"Q{index}! " * (index + 1)}] for index in range(10)]
PROMPTS = read_prompts([{"prompt": prompt, "subset": "ab"[i % 2]} for i, prompt in enumerate(MESSAGES)]).prompts


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "_BACKOFF_BASE", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with the models `m0`, `m1`, `plain` (no chat template), and the adapters `a0`, `a1` over `m0`."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("m0", 0), ("m1", 1), ("plain", 0)):
        make_model(seed).save_pretrained(root / name)
        tokenizer = make_tokenizer()
        if name == "plain":
            tokenizer.chat_template = None
        tokenizer.save_pretrained(root / name)
    for seed in range(2):
        torch.manual_seed(seed)
        # A trained copy of the head must not leak into the base or the other adapter.
        config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "m0"), config)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "modules_to_save" in name:
                    weight.add_(torch.randn_like(weight))
        adapted.save_pretrained(root / f"a{seed}")
    return root


@pytest.fixture
def loads(monkeypatch):
    """Names of the models that were loaded."""
    loaded, load_model = [], model_pool.load_model

    def record(auto_class, name, init_kwargs):
        loaded.append(name)
        return load_model(auto_class, name, init_kwargs)

    monkeypatch.setattr(model_pool, "load_model", record)
    return loaded


def generate_alone(path, prompts=MESSAGES):
    """Return the greedy reply to each prompt, generated in a batch of its own."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), make_tokenizer()
    replies = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([ids[-60:]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        replies.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return replies


def completions(replies):
    return [reply.completion for reply in replies]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shout(prompts):
    return [f" {prompt[-1]['content']}!\n\nHuman: And?" for prompt in prompts]


def test_adapters_share_their_base_and_the_base_answers_without_them(folder, tmp_path, loads):
    texts = [f"{folder}/a0", f"base={folder}/m0", f"{folder}/m1", f"{folder}/a1"]
    collected = collect_replies([parse_source(text) for text in texts], PROMPTS, tmp_path, SETTINGS)
    assert list(collected) == [f"{folder}/a0", "base", f"{folder}/m1", f"{folder}/a1"]
    assert loads == [f"{folder}/m0", f"{folder}/m1"]
    for replies, name in zip(collected.values(), ("a0", "m0", "m1", "a1"), strict=True):
        assert completions(replies) == generate_alone(folder / name)
    assert len({tuple(completions(replies)) for replies in collected.values()}) == 4


def test_replies_are_a_data_set_and_are_generated_once(folder, tmp_path, loads):
    sources = [parse_source(f"m={folder}/m0")]
    first = collect_replies(sources, PROMPTS[:6], tmp_path, SETTINGS)
    file = tmp_path / "replies" / "m.jsonl"
    before = file.read_bytes()
    assert collect_replies(sources, PROMPTS[:6], tmp_path, SETTINGS) == first
    assert loads == [f"{folder}/m0"]
    everything = collect_replies([parse_source(f"m={folder}/m0")], PROMPTS, tmp_path, SETTINGS)
    assert everything["m"][:6] == first["m"]
    assert file.read_bytes().startswith(before)
    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    assert len(rows) == len({row["prompt_id"] for row in rows}) == 10
    assert sorted(rows["group"]) == ["a"] * 5 + ["b"] * 5
    by_id = {prompt.id: prompt.prompt for prompt in PROMPTS}
    assert all(row["prompt"] == by_id[row["prompt_id"]] for row in rows)


def test_an_incomplete_last_line_is_dropped_and_a_damaged_one_named(tmp_path):
    def source():
        return UpstreamSource("x", FunctionUpstream(shout))

    whole = collect_replies([source()], PROMPTS, tmp_path, SETTINGS)
    file = tmp_path / "replies" / "x.jsonl"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert collect_replies([source()], PROMPTS, tmp_path, SETTINGS) == whole
    assert sorted(map(str, read_lines(file))) == sorted(map(str, map(json.loads, data.splitlines())))
    file.write_bytes(data.replace(b'"prompt_id"', b'"id"', 1))
    with pytest.raises(ValueError, match=r"Line 1 of .*x\.jsonl is damaged"):
        collect_replies([source()], PROMPTS, tmp_path, SETTINGS)


def test_other_settings_or_weights_are_refused(folder, tmp_path):
    import shutil

    path = tmp_path / "model"
    shutil.copytree(folder / "m0", path)
    collect_replies([parse_source(f"m={path}")], PROMPTS[:2], tmp_path, SETTINGS)
    other = ReplySettings(max_new_tokens=9, max_prompt_length=60, device="cpu")
    with pytest.raises(ValueError, match=r"max_new_tokens was 8 and is 9.*another output_dir"):
        collect_replies([parse_source(f"m={path}")], PROMPTS[:2], tmp_path, other)
    moved = tmp_path / "moved"
    path.rename(moved)  # the same weights elsewhere are the same model
    collect_replies([parse_source(f"m={moved}")], PROMPTS[:2], tmp_path, SETTINGS)
    make_model(seed=7).save_pretrained(moved)
    with pytest.raises(ValueError, match=r"model was 'sha256:.*' and is 'sha256:"):
        collect_replies([parse_source(f"m={moved}")], PROMPTS[:2], tmp_path, SETTINGS)


def test_replies_end_before_the_next_turn(tmp_path):
    texts = read_prompts([{"prompt": f"\n\nHuman: {index}\n\nAssistant:"} for index in range(2)]).prompts
    spoken = UpstreamSource("text", FunctionUpstream(lambda prompts: [" Yes.\n\nHuman: And?"] * len(prompts)))
    assert completions(collect_replies([spoken], texts, tmp_path)["text"]) == [" Yes."] * 2
    chat = UpstreamSource("chat", FunctionUpstream(shout))
    replies = collect_replies([chat], PROMPTS, tmp_path)["chat"]
    assert completions(replies) == [f"{prompt[-1]['content']}!" for prompt in MESSAGES]


@pytest.mark.parametrize(("name", "prompt_format"), [("plain", "auto"), ("m0", "text")])
def test_a_model_without_a_chat_template_reads_dialogues_as_text(folder, tmp_path, name, prompt_format):
    settings = ReplySettings(8, None, prompt_format, 4, "cpu")
    replies = collect_replies([parse_source(f"m={folder}/{name}")], PROMPTS[:3], tmp_path, settings)["m"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / name), make_tokenizer()
    for message, reply in zip(MESSAGES, replies, strict=False):
        inputs = tokenizer(f"\n\nHuman: {message[0]['content']}\n\nAssistant:", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert reply.completion == tokenizer.decode(output, skip_special_tokens=True).strip()


def test_replies_of_a_data_set_are_found_by_their_prompts(tmp_path):
    path = tmp_path / "given.jsonl"
    rows = [
        {"prompt": f"\n\nHuman: {prompt[0]['content']}\n\nAssistant:", "completion": f"reply {index} human: kept"}
        for index, prompt in enumerate(MESSAGES)
    ]
    path.write_text("\n".join(map(json.dumps, rows[::-1])))
    replies = collect_replies([parse_source(str(path))], PROMPTS, tmp_path / "out")[str(path)]
    assert completions(replies) == [f"reply {index} human: kept" for index in range(10)]
    path.write_text("\n".join(map(json.dumps, rows[:4])))
    with pytest.raises(ValueError, match="has 4 replies, and none to this prompt"):
        collect_replies([parse_source(str(path))], PROMPTS, tmp_path / "other")
    path.write_text(json.dumps({"prompt": "x", "text": "y"}))
    with pytest.raises(ValueError, match=r"'completion'; .* has prompt, text"):
        collect_replies([parse_source(str(path))], PROMPTS, tmp_path / "third")


def test_an_aligner_corrects_the_replies_of_its_upstream_which_are_generated_once(folder, tmp_path, loads):
    aligner = make_model(seed=3, max_position_embeddings=1024)
    aligner.generation_config.eos_token_id = [1, *range(20, 60)]  # short corrections
    aligner.save_pretrained(tmp_path / "aligner")
    make_tokenizer().save_pretrained(tmp_path / "aligner")
    AlignerTemplate("{question}|{answer}=").save(tmp_path / "aligner")
    texts = [f"fixed={tmp_path}/aligner+{folder}/m0", f"m={folder}/m0"]
    collected = collect_replies([parse_source(text) for text in texts], PROMPTS, tmp_path / "out", SETTINGS)
    assert list(collected) == ["fixed", "m"]
    assert loads == [f"{folder}/m0"]
    assert sorted(path.name for path in (tmp_path / "out/replies").glob("*.jsonl")) == ["fixed.jsonl", "m.jsonl"]
    assert completions(collected["m"]) == generate_alone(folder / "m0")
    assert completions(collected["fixed"]) != completions(collected["m"])


def test_an_endpoint_answers_concurrently_and_refusals_are_no_replies(tmp_path):
    together = threading.Barrier(5, timeout=10)
    asked = []

    def respond(body):
        question = body["messages"][-1]["content"]
        asked.append(question)
        assert (body["temperature"], body["max_tokens"]) == (0.0, 8)
        together.wait()
        if question.startswith("Q3"):
            return HTTPReply("content management policy", status=400, body=json.dumps(
                {"error": {"message": "rejected", "code": "content_filter"}}))  # fmt: skip
        return HTTPReply(f"re: {question}", finish_reason="length" if question.startswith("Q4") else "stop")

    with LoopbackEndpoint(respond) as endpoint:
        text = f"gpt=endpoint:any@{endpoint.base_url}"
        replies = collect_replies([parse_source(text)], PROMPTS, tmp_path, SETTINGS)["gpt"]
        assert collect_replies([parse_source(text)], PROMPTS, tmp_path, SETTINGS)["gpt"] == replies
    assert len(asked) == 10
    assert [reply.failed for reply in replies] == [index == 3 for index in range(10)]
    assert replies[0].completion == "re: Q0!"
    assert replies[4].finish_reason == "length"
    written = "".join(path.read_text() for path in (tmp_path / "replies").iterdir())
    assert "content_filter" in written


def test_paid_replies_survive_an_endpoint_that_fails(tmp_path):
    healthy = False

    def respond(body):
        question = body["messages"][-1]["content"]
        asked.append(question)
        return (
            HTTPReply("no", status=500) if question.startswith("Q5") and not healthy else HTTPReply(f"re: {question}")
        )

    asked = []
    settings = ReplySettings(8, endpoint_kwargs={"max_concurrency": 3, "max_retries": 1})
    with LoopbackEndpoint(respond) as endpoint:
        text = f"endpoint:any@{endpoint.base_url}"
        with pytest.raises(UpstreamError, match="did not answer"):
            collect_replies([parse_source(text)], PROMPTS, tmp_path, settings)
        answered = {question for question in asked if not question.startswith("Q5")}
        assert len(read_lines(tmp_path / "replies/any.jsonl")) == len(answered) > 0
        healthy = True
        replies = collect_replies([parse_source(text)], PROMPTS, tmp_path, settings)["any"]
    assert len(replies) == 10
    assert all(asked.count(question) == 1 for question in set(asked) if not question.startswith("Q5"))


def test_equal_names_raise_and_files_have_safe_names(tmp_path):
    sources = [UpstreamSource("x", FunctionUpstream(shout)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"Several models have the name 'x'. .* LABEL=MODEL"):
        collect_replies(sources, PROMPTS, tmp_path)
    names = ["org/model", "org-model", "../../etc/passwd", "\x1b[31m", "", "é"]
    files = [file_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(file.replace("-", "").replace(".", "").isalnum() and not file.startswith(".") for file in files)
