"""Chat templates of files and of other models, for models without one."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from cyclealign_trl.cli import main
from cyclealign_trl.demo.loopback import LoopbackEndpoint, Reply
from cyclealign_trl.models.chat_templates import read_chat_template, set_chat_template
from tests.conftest import CHAT_TEMPLATE, make_model, make_tokenizer

QUESTION = [{"role": "user", "content": "Hi"}]


def make_plain_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Current folder with a model without a chat template, one with a template, and a Jinja file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_model(max_position_embeddings=1024).save_pretrained("plain")
    make_plain_tokenizer().save_pretrained("plain")
    make_tokenizer().save_pretrained("chat")
    Path("chat.jinja").write_text(CHAT_TEMPLATE)
    return tmp_path


@pytest.mark.parametrize("source", ["chat.jinja", "chat", "./chat", CHAT_TEMPLATE])
def test_a_template_is_read_from_a_file_a_folder_and_a_text(source):
    tokenizer = make_plain_tokenizer()
    assert set_chat_template(tokenizer, source) == CHAT_TEMPLATE
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True) == (
        "<user>Hi</s>\n<assistant>"
    )


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("missing.jinja", FileNotFoundError, r"There is no file missing\.jinja \(chat_template\)"),
        ("./missing", FileNotFoundError, r"There is no folder \./missing"),
        ("plain", ValueError, r"The tokenizer of plain has no chat template \(chat_template\)\. Name another model"),
        ("{% for message in messages %}{{ message", ValueError, "is not a Jinja template: line 1: "),
        ("{{ 'Hello' }}", ValueError, r"chat_template \"\{\{ 'Hello' \}\}\" does not show the messages"),
        ("{{ raise_exception('No.') }}", ValueError, "does not show the messages of a conversation"),
    ],
)
def test_wrong_sources_raise(source, error, message):
    with pytest.raises(error, match=message):
        set_chat_template(make_plain_tokenizer(), source)


def test_a_template_that_needs_a_system_message_is_accepted():
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('No.') }}{% endif %}" + CHAT_TEMPLATE
    set_chat_template(make_plain_tokenizer(), template)


def test_a_reward_model_takes_the_same_sources():
    from transformers import LlamaForSequenceClassification

    from cyclealign_trl import RewardModelRanker

    assert read_chat_template("chat") == CHAT_TEMPLATE
    model = LlamaForSequenceClassification(make_model(num_labels=1).config)
    ranker = RewardModelRanker(model, make_plain_tokenizer(), chat_template="chat.jinja")
    assert ranker.rank([]) == []


SETTINGS = """--model_name_or_path plain --output_dir out --max_steps 1 --use_cpu --report_to none --disable_tqdm true
    --max_completion_length 12 --per_device_train_batch_size 2 --max_prompt_length"""
COMMANDS = {
    "train": ("64 --num_interactions 1 --ranker_model judge", ["prompt"]),
    "estimate": ("64 --num_interactions 1 --ranker_model judge --num_samples 2", ["prompt"]),
    "train-ranked": ("64", ["prompt", "chosen", "rejected"]),
    "dlma": ("256 --warmup_steps 0", ["prompt"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_train_a_model_without_a_template_on_messages(command, capsys, monkeypatch):
    options, columns = COMMANDS[command]
    yes, no = ([{"role": "assistant", "content": text}] for text in ("Yes", "No"))
    questions = [[{"role": "user", "content": f"Q{i}"}] for i in range(4)]
    rows = [{"prompt": question, "chosen": yes, "rejected": no} for question in questions]
    Dataset.from_list(rows).select_columns(columns).to_json("rows.jsonl")
    reply = json.dumps({"ranking": ["B", "A", "C"]})
    with LoopbackEndpoint(lambda body: Reply(reply)) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "a-key")
        given = [command, *SETTINGS.split(), *options.split(), "--dataset_name", "rows.jsonl"]
        with pytest.raises(SystemExit) as stop:
            main(given)
        assert "set chat_template to a Jinja file" in stop.value.code
        with pytest.raises(SystemExit) as stop:
            main([*given, "--chat_template", "missing.jinja"])
        assert "There is no file missing.jinja" in stop.value.code
        main([*given, "--chat_template", "chat.jinja"])
    if command != "estimate":
        assert AutoTokenizer.from_pretrained("out").chat_template == CHAT_TEMPLATE
    if command == "dlma":  # other pairs need another folder
        with pytest.raises(SystemExit) as stop:
            main([*given, "--chat_template", CHAT_TEMPLATE.replace("</s>\n", "</s>")])
        assert "chat_template" in stop.value.code
