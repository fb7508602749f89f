"""Corrections at inference: order, batches, what stays as it is, random state, loading and publishing."""

import logging

import pytest
import torch
from datasets import Dataset

from cyclealign_trl import Aligner, AlignerConfig, AlignerTrainer, Corrector
from cyclealign_trl.aligner.aligner import SAMPLING
from cyclealign_trl.models.batched_generator import BatchedGenerator
from tests.conftest import make_model, make_tokenizer

TEMPLATE = "{question}|{answer}="
GREEDY = {"do_sample": False}


def make_aligner(model=None, **changes):
    return Aligner(make_model() if model is None else model, make_tokenizer(), TEMPLATE, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Has learnt to answer with the question's digit, whatever the answer was."""
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


def test_corrections_stand_in_the_order_of_the_answers(trained):
    aligner = make_aligner(trained, batch_size=3, generation_kwargs=GREEDY)
    prompts = [f"Q{i}" for i in (3, 7, 1, 9, 0, 4, 8)]
    answers = ["no", "what?"] * 3 + ["no"]  # of unequal lengths, so that batches are not in order
    expected = [f"is {prompt[1]}" for prompt in prompts]
    assert aligner.correct(prompts, answers) == expected
    assert make_aligner(trained, batch_size=64, generation_kwargs=GREEDY).correct(prompts, answers) == expected
    assert aligner.correct([], []) == []
    with pytest.raises(ValueError, match="2 prompts but 1 answers"):
        aligner.correct(["a", "b"], ["c"])


def test_messages_are_read_as_their_question(trained):
    aligner = make_aligner(trained, generation_kwargs=GREEDY)
    assert aligner.correct([[{"role": "user", "content": "Q5"}]], ["no"]) == ["is 5"]


def test_the_papers_sampling_is_the_default_and_can_be_changed(trained):
    assert make_aligner(trained).correct(["Q2"], ["no"]) == ["is 2"]
    assert make_aligner().sampling == dict(SAMPLING)
    assert (SAMPLING["temperature"], SAMPLING["top_p"], SAMPLING["top_k"]) == (0.3, 0.95, 10)
    assert make_aligner(generation_kwargs={"temperature": 1.0}).sampling == {**SAMPLING, "temperature": 1.0}
    assert make_aligner(generation_kwargs=GREEDY).sampling == GREEDY


def test_white_space_around_an_answer_is_kept(trained):
    aligner = make_aligner(trained, generation_kwargs=GREEDY)
    assert aligner.correct(["Q2", "Q3"], [" no\n", "\twhat? "]) == [" is 2\n", "\tis 3 "]


def test_an_unfinished_correction_leaves_the_answer(trained, caplog):
    aligner = make_aligner(trained, max_new_tokens=3, generation_kwargs=GREEDY)
    for _ in range(2):
        assert aligner.correct(["Q2", "Q3"], ["no", " what?"]) == ["no", " what?"]
    (record,) = caplog.records
    assert (
        "2 corrections were not finished in 3 tokens: these answers stay as they are. Raise max_new_tokens"
        in record.message
    )
    assert record.levelno == logging.WARNING


def test_an_empty_correction_leaves_the_answer():
    model = make_model()
    model.generation_config.eos_token_id = list(range(99))  # whatever is written first ends the text
    aligner = Aligner(model, make_tokenizer(), TEMPLATE)
    assert aligner._finished([1]) is None
    assert aligner._finished([]) is None


def test_an_answer_that_is_too_long_stays_and_a_question_is_cut(trained, caplog):
    aligner = make_aligner(trained, max_new_tokens=200, generation_kwargs=GREEDY)
    assert aligner.generator.max_prompt_length == 56
    assert aligner.correct(["Q2", "x" * 200 + "Q3"], ["n" * 60, "no"])[0] == "n" * 60
    assert "1 answers do not fit into 56 tokens: these answers stay as they are. Lower max_new_tokens" in caplog.text
    fitted = aligner.template.encode(aligner.generator.tokenizer, "x" * 200 + "Q3", "no", 56)
    assert aligner.generator.tokenizer.decode(fitted).endswith("xQ3|no=")


def test_sampling_leaves_the_random_state_alone_and_depends_on_its_seed():
    generator = BatchedGenerator(make_model(), make_tokenizer(), 4, 8)
    hot = {"do_sample": True, "temperature": 5.0, "top_k": 0, "top_p": 1.0}

    def written(seed):
        return generator.generate([[5, 6, 7]] * 4, hot, seed)

    state = torch.get_rng_state()
    first = written(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert written(0) == first != written(1)
    assert written(None) != written(None)


def test_the_repetition_penalty_is_for_what_is_written_alone():
    model = make_model()
    generator = BatchedGenerator(model, make_tokenizer(), 2, 6)
    prompts = [[5, 6, 7, 8], [9]]
    plain = generator.generate(prompts, {"do_sample": False, "max_new_tokens": 1})
    penalised = generator.generate(prompts, {"do_sample": False, "max_new_tokens": 1, "repetition_penalty": 1e6})
    assert penalised == plain  # nothing is written yet, whatever stands in the prompt
    text = generator.generate(prompts, {"do_sample": False, "repetition_penalty": 1e6})
    assert all(len(set(ids)) == len(ids) for ids in text)


def test_it_is_saved_and_loaded(trained, tmp_path):
    make_aligner(trained).save_pretrained(tmp_path)
    aligner = Aligner.from_pretrained(tmp_path, device="cpu", generation_kwargs=GREEDY, batch_size=2)
    assert aligner.correct(["Q2", "Q6", "Q4"], ["no"] * 3) == ["is 2", "is 6", "is 4"]
    assert aligner.generator.batch_size == 2
    (tmp_path / "aligner_template.json").unlink()
    with pytest.raises(ValueError, match="lies no template"):
        Aligner.from_pretrained(tmp_path, device="cpu")
    assert Aligner.from_pretrained(tmp_path, device="cpu", template="labels").template.text.startswith("## Question")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "got 0"),
        ({"max_new_tokens": 256}, "got 256, with a model of 256 positions"),
    ],
)
def test_wrong_use_raises(changes, said):
    with pytest.raises(ValueError, match=said):
        make_aligner(**changes)


def test_it_is_a_corrector_of_the_cycle():
    assert isinstance(make_aligner(), Corrector)


def test_room_is_half_of_the_positions_by_default():
    assert make_aligner().generator.max_new_tokens == 128
    big = make_model(max_position_embeddings=8192)
    assert make_aligner(big).generator.max_new_tokens == 2048
