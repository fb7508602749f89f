"""Correcting answers with a trained aligner."""

import logging

import pytest
from datasets import Dataset

from cyclealign_trl import Aligner, AlignerConfig, AlignerTrainer, Corrector
from cyclealign_trl.aligner.aligner import ALIGNER_SAMPLING
from cyclealign_trl.aligner.aligner_template import make_template
from tests.conftest import make_model, make_tokenizer

TEMPLATE = "{question}|{answer}="
GREEDY = {"do_sample": False}


def make_aligner(model=None, **changes):
    return Aligner(make_model() if model is None else model, make_tokenizer(), TEMPLATE, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a model trained to correct every answer to a text with the digit of the question."""
    rows = [
        {"prompt": f"Q{i}", "answer": text, "correction": f"is {i}"} for i in range(10) for text in ("no", "what?")
    ]
    config = AlignerConfig(
        str(tmp_path_factory.mktemp("aligner")), aligner_template=TEMPLATE, max_length=64, learning_rate=1e-2,
        num_train_epochs=40, warmup_fraction=0, per_device_train_batch_size=20, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no", activation_checkpointing=False,
    )  # fmt: skip
    trainer = AlignerTrainer(make_model(), config, Dataset.from_list(rows), None, make_tokenizer())
    trainer.train()
    return trainer.model


def test_corrections_keep_the_order_of_the_answers(trained):
    aligner = make_aligner(trained, batch_size=3, generation_kwargs=GREEDY)
    prompts = [f"Q{i}" for i in (3, 7, 1, 9, 0, 4, 8)]
    answers = ["no", "what?"] * 3 + ["no"]  # of different lengths, which batching sorts by
    expected = [f"is {prompt[1]}" for prompt in prompts]
    assert aligner.correct(prompts, answers) == expected
    assert make_aligner(trained, batch_size=64, generation_kwargs=GREEDY).correct(prompts, answers) == expected
    assert aligner.correct([], []) == []
    with pytest.raises(ValueError, match="one answer, got 2 prompts and 1 answers"):
        aligner.correct(["a", "b"], ["c"])


def test_corrects_answers_to_messages(trained):
    aligner = make_aligner(trained, generation_kwargs=GREEDY)
    assert aligner.correct([[{"role": "user", "content": "Q5"}]], ["no"]) == ["is 5"]


def test_default_sampling_is_the_papers_and_can_be_overridden(trained):
    assert make_aligner(trained).correct(["Q2"], ["no"]) == ["is 2"]
    defaults = dict(ALIGNER_SAMPLING)
    assert (defaults["temperature"], defaults["top_p"], defaults["top_k"]) == (0.3, 0.95, 10)
    assert make_aligner().sampling == defaults
    assert make_aligner(generation_kwargs={"temperature": 1.0}).sampling == {**defaults, "temperature": 1.0}
    assert make_aligner(generation_kwargs=GREEDY).sampling == GREEDY


def test_white_space_around_an_answer_is_kept(trained):
    aligner = make_aligner(trained, generation_kwargs=GREEDY)
    assert aligner.correct(["Q2", "Q3"], [" no\n", "\twhat? "]) == [" is 2\n", "\tis 3 "]


def test_an_unfinished_correction_leaves_the_answer_unchanged(trained, caplog):
    aligner = make_aligner(trained, max_new_tokens=3, generation_kwargs=GREEDY)
    for _ in range(2):
        assert aligner.correct(["Q2", "Q3"], ["no", " what?"]) == ["no", " what?"]
    (record,) = caplog.records
    assert (
        "2 corrections were not finished in 3 tokens, so these answers stay unchanged. Raise max_new_tokens"
        in record.message
    )
    assert record.levelno == logging.WARNING


def test_decodes_an_empty_correction_as_none():
    model = make_model()
    model.generation_config.eos_token_id = list(range(99))  # the first token ends the text
    aligner = Aligner(model, make_tokenizer(), TEMPLATE)
    assert aligner._decode([1]) is None
    assert aligner._decode([]) is None


def test_a_long_answer_stays_unchanged_and_a_long_question_is_truncated(trained, caplog):
    aligner = make_aligner(trained, max_new_tokens=200, generation_kwargs=GREEDY)
    assert aligner.generator.max_prompt_length == 56
    assert aligner.correct(["Q2", "x" * 200 + "Q3"], ["n" * 60, "no"])[0] == "n" * 60
    assert "1 answers do not fit into 56 tokens, so these answers stay unchanged. Lower max_new_tokens" in caplog.text
    ids = aligner.template.encode(aligner.generator.tokenizer, "x" * 200 + "Q3", "no", 56)
    assert aligner.generator.tokenizer.decode(ids).endswith("xQ3|no=")


def test_saves_and_loads_an_aligner(trained, tmp_path):
    make_aligner(trained).save_pretrained(tmp_path)
    aligner = Aligner.from_pretrained(tmp_path, device="cpu", generation_kwargs=GREEDY, batch_size=2)
    assert aligner.correct(["Q2", "Q6", "Q4"], ["no"] * 3) == ["is 2", "is 6", "is 4"]
    assert aligner.generator.batch_size == 2
    (tmp_path / "aligner_template.json").unlink()
    with pytest.raises(ValueError, match="has no saved aligner template"):
        Aligner.from_pretrained(tmp_path, device="cpu")
    assert Aligner.from_pretrained(tmp_path, device="cpu", template="labels").template == make_template("labels")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "got 0"),
        ({"max_new_tokens": 256}, "got 256, with a model of 256 positions"),
    ],
)
def test_invalid_arguments_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        make_aligner(**changes)


def test_an_aligner_is_a_corrector():
    assert isinstance(make_aligner(), Corrector)


def test_corrections_get_half_of_the_positions_by_default():
    assert make_aligner().generator.max_new_tokens == 128
    large = make_model(max_position_embeddings=8192)
    assert make_aligner(large).generator.max_new_tokens == 2048
