"""Token ids of questions, answers and corrections under many kinds of tokenizers."""

import pytest
from datasets import Dataset

from cyclealign_trl import AlignerConfig, AlignerTrainer
from cyclealign_trl.aligner.aligner_template import AlignerTemplate, make_template
from cyclealign_trl.aligner.aligner_trainer import _Encoder
from cyclealign_trl.aligner.corrections import corrections_dataset
from cyclealign_trl.models.special_text import TextEncoder
from tests.conftest import make_model, make_tokenizer
from tests.models.tokenizers import POST_PROCESSORS, TOKENIZERS, make

ROW = {"prompt": "Where is the cat?", "answer": "She went to the park.", "correction": "It sits on the mat."}


def encode(tokenizer, template="labels", **changes):
    row = _Encoder(make_template(template), TextEncoder(tokenizer), None)(ROW | changes)
    start = row["labels"].count(-100)
    return row["input_ids"][:start], row["input_ids"][start:]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", ["labels", "instruction", "conversation", "Q: {question} A: {answer} Better: "])
def test_a_correction_has_the_tokens_that_it_has_after_its_prompt(kind, template):
    tokenizer = make(kind)
    prompt_ids, ids = encode(tokenizer, template)
    text = make_template(template).render(ROW["prompt"], ROW["answer"])
    assert prompt_ids == tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(prompt_ids + ids[:-1]).lstrip() == text + ROW["correction"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("adds", POST_PROCESSORS)
def test_a_prompt_does_not_end_with_a_token_that_the_tokenizer_adds(kind, adds):
    tokenizer = make(kind, adds)
    prompt_ids, ids = encode(tokenizer)
    assert (prompt_ids[0] == tokenizer.bos_token_id) == ("BOS" in adds)
    assert tokenizer.eos_token_id not in prompt_ids
    assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("column", ROW)
@pytest.mark.parametrize("text", ["The tag </s> closes", "<s>bold</s> text", "a <pad> b"])
def test_special_tokens_that_a_text_spells_out_are_text(kind, column, text):
    tokenizer = make(kind)
    prompt_ids, ids = encode(tokenizer, **{column: text})
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert not special & {*prompt_ids, *ids[:-1]}
    assert text in tokenizer.decode(prompt_ids + ids[:-1])
    assert text in tokenizer.decode(AlignerTemplate("<s>{question}{answer}").encode(tokenizer, text, ""))


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b", "\ud83d\ude00 and \ud83d"])
def test_a_lone_surrogate_becomes_a_valid_character(text):
    dataset = corrections_dataset([("Q", text, text)], "1 row")
    assert "\ufffd" in dataset[0]["correction"]
    assert encode(make("byte-level BPE"), correction=dataset[0]["correction"])


def test_rows_and_tokenizers_that_the_model_is_too_small_for_are_refused(tmp_path):
    rows = Dataset.from_list([ROW, {**ROW, "prompt": "Q" * 300}])
    args = AlignerConfig(str(tmp_path), max_length=None, use_cpu=True)
    with pytest.raises(
        ValueError, match=r"longest row of train_dataset has 3\d\d tokens, but the model has 256 positions"
    ):
        AlignerTrainer(make_model(), args, rows, processing_class=make_tokenizer())
    AlignerTrainer(make_model(), args, rows.select([0]), processing_class=make_tokenizer())
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    trainer = AlignerTrainer(make_model(), args, rows.select([0]), processing_class=tokenizer)
    with pytest.raises(ValueError, match="without an embedding, for example '<new>'"):
        trainer.train()
