"""Wrong arguments of the trainers: one message at construction that names the problem and the fix."""

import re
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, SFTConfig

from cyclealign_trl import (
    AlignerConfig,
    AlignerTrainer,
    CycleAlignConfig,
    CycleAlignTrainer,
    DLMAConfig,
    DLMATrainer,
    FunctionRanker,
    RankingConfig,
    RankingRequest,
    RankingTrainer,
)
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import DigestRanker

PAIRS = [{"prompt": "Q", "chosen": " yes", "rejected": " no", "self_reward": 1.0}] * 2
CONFIGS = {
    RankingTrainer: RankingConfig,
    CycleAlignTrainer: CycleAlignConfig,
    DLMATrainer: DLMAConfig,
    AlignerTrainer: AlignerConfig,
}
ROWS = {
    RankingTrainer: PAIRS,
    CycleAlignTrainer: [{"prompt": "Q"}] * 2,
    DLMATrainer: PAIRS,
    AlignerTrainer: [{"prompt": "Q", "answer": "no", "correction": "yes"}] * 2,
}


def make_args(config_class, folder):
    settings = {"per_device_train_batch_size": 2}
    if issubclass(config_class, RankingConfig):
        settings |= {"max_prompt_length": 64, "max_completion_length": 16}
    elif issubclass(config_class, AlignerConfig):
        settings |= {"max_length": 64}
    elif config_class is GRPOConfig:
        settings |= {"num_generations": 2}
    return config_class(str(folder), use_cpu=True, report_to="none", **settings)


def make_trainer(trainer_class, folder, **changes):
    arguments = {
        "model": make_model(),
        "args": make_args(CONFIGS[trainer_class], folder),
        "train_dataset": Dataset.from_list(ROWS[trainer_class]),
        "processing_class": make_tokenizer(),
    }
    if trainer_class is CycleAlignTrainer:
        arguments["ranker"] = DigestRanker()
    return trainer_class(**(arguments | changes))


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [
        (RankingTrainer, GRPOConfig),
        (RankingTrainer, SFTConfig),
        (RankingTrainer, CycleAlignConfig),
        (RankingTrainer, DLMAConfig),
        (CycleAlignTrainer, TrainingArguments),
        (CycleAlignTrainer, RankingConfig),
        (CycleAlignTrainer, GRPOConfig),
        (DLMATrainer, RankingConfig),
        (DLMATrainer, DPOConfig),
        (AlignerTrainer, SFTConfig),
        (AlignerTrainer, RankingConfig),
        (AlignerTrainer, TrainingArguments),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default
def test_arguments_of_another_trainer_raise(tmp_path, trainer_class, config_class):
    needed = CONFIGS[trainer_class].__name__
    message = (
        f"{trainer_class.__name__} needs a {needed} as args, got {config_class.__name__}. Pass args={needed}(...)."
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        make_trainer(trainer_class, tmp_path, args=make_args(config_class, tmp_path))


@pytest.mark.parametrize("trainer_class", CONFIGS)
@pytest.mark.parametrize(
    ("args", "given"), [({"seed": 1}, "dict"), ("out", "str"), (SFTConfig, "the class SFTConfig")]
)
def test_arguments_that_are_not_a_config_raise(tmp_path, trainer_class, args, given):
    with pytest.raises(TypeError, match=f"{CONFIGS[trainer_class].__name__} as args, got {given}"):
        make_trainer(trainer_class, tmp_path, args=args)


@pytest.mark.parametrize("trainer_class", CONFIGS)
def test_a_subclass_of_the_config_is_accepted(tmp_path, trainer_class):
    class MyConfig(CONFIGS[trainer_class]):
        pass

    make_trainer(trainer_class, tmp_path, args=make_args(MyConfig, tmp_path))


def test_a_config_in_place_of_the_reference_raises(tmp_path):
    with pytest.raises(TypeError, match=r"ref_model must be a loaded model, got DLMAConfig.*args="):
        DLMATrainer(make_model(), make_args(DLMAConfig, tmp_path))


def reward(completions, **kwargs):
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("ranker", "message"),
    [
        ("gpt-5-mini", "Pass LLMRanker('gpt-5-mini'), or RewardModelRanker('gpt-5-mini')"),
        ("org/reward-model", "RewardModelRanker('org/reward-model')"),
        (DigestRanker, "ranker is the class DigestRanker. Pass an instance of it: DigestRanker(...)."),
        (FunctionRanker, "FunctionRanker(...)"),
        (reward, "Pass FunctionRanker(f)"),
        (lambda completions, **_: [], "Pass FunctionRanker(f)"),
        ([reward, reward], "Pass FunctionRanker([...])"),
        (make_model(), "Pass RewardModelRanker(model)"),
        (None, "Pass a ranker such as LLMRanker"),
        (SimpleNamespace(rank=3), "Pass a ranker such as LLMRanker"),
    ],
)
def test_an_object_that_is_not_a_ranker_raises_with_a_suggestion(tmp_path, ranker, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make_trainer(CycleAlignTrainer, tmp_path, ranker=ranker)


@pytest.mark.parametrize("trainer_class", CONFIGS)
@pytest.mark.parametrize(
    ("processing_class", "message"),
    [
        (SimpleNamespace(tokenizer=make_tokenizer()), "It is a processor: pass processor.tokenizer."),
        ("org/model", "Pass AutoTokenizer.from_pretrained('org/model')."),
        (object(), "Load one with AutoTokenizer."),
    ],
)
def test_a_processing_class_that_is_not_a_tokenizer_raises(tmp_path, trainer_class, processing_class, message):
    with pytest.raises(TypeError, match=f"processing_class must be a tokenizer.*{re.escape(message)}"):
        make_trainer(trainer_class, tmp_path, processing_class=processing_class)


@pytest.mark.parametrize("trainer_class", CONFIGS)
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset", "eval_dataset['tea']"])
@pytest.mark.parametrize("with_columns", [True, False])
def test_an_empty_data_set_raises(tmp_path, trainer_class, name, with_columns):
    rows = Dataset.from_list(ROWS[trainer_class])
    empty = rows.select([]) if with_columns else Dataset.from_list([])
    argument = {name: empty} if "[" not in name else {"eval_dataset": {"milk": rows, "tea": empty}}
    with pytest.raises(ValueError, match=re.escape(f"{name} has no rows.")):
        make_trainer(trainer_class, tmp_path, **argument)


@pytest.mark.parametrize("trainer_class", CONFIGS)
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("rows.jsonl", "train_dataset is the text 'rows.jsonl'. Pass the data set"),
        (
            DatasetDict(train=Dataset.from_list(PAIRS)),
            "train_dataset is a mapping of 'train'. Pass one of its data sets.",
        ),
    ],
)
def test_a_training_set_of_the_wrong_type_raises(tmp_path, trainer_class, dataset, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make_trainer(trainer_class, tmp_path, train_dataset=dataset)


def conversational(row):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": value}] if name in roles else value for name, value in row.items()}


@pytest.mark.parametrize("trainer_class", [RankingTrainer, CycleAlignTrainer, DLMATrainer])
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_messages_without_a_chat_template_raise(tmp_path, trainer_class, name):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    rows = Dataset.from_list([conversational(row) for row in ROWS[trainer_class]])
    with pytest.raises(
        ValueError, match=rf"first row of {name}.*no chat template.*conversational=False.*chat_template"
    ):
        make_trainer(trainer_class, tmp_path, processing_class=tokenizer, **{name: rows})
    make_trainer(trainer_class, tmp_path, processing_class=tokenizer)  # text prompts need none


def test_a_chat_template_in_the_arguments_is_enough(tmp_path):
    tokenizer = make_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    args = make_args(RankingConfig, tmp_path)
    args.chat_template_kwargs = {"chat_template": template}
    rows = Dataset.from_list([conversational(row) for row in PAIRS])
    make_trainer(RankingTrainer, tmp_path, args=args, train_dataset=rows, processing_class=tokenizer)


def test_an_aligner_needs_no_chat_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    rows = Dataset.from_list([conversational(row) for row in ROWS[AlignerTrainer]])
    make_trainer(AlignerTrainer, tmp_path, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("trainer_class", CONFIGS)
@pytest.mark.parametrize(
    "name", ["./no-such-model", "/no/such/model", "outputs/x", "nothing", "outputs/x/checkpoint-3"]
)
def test_a_missing_model_folder_raises(tmp_path, trainer_class, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=f"There is no folder {re.escape(name)}"):
        make_trainer(trainer_class, tmp_path, model=name)


def test_the_cycle_gives_its_tokenizer_to_reward_functions_of_token_ids(tmp_path):
    from trl.rewards import get_soft_overlong_punishment

    ranker = FunctionRanker([get_soft_overlong_punishment(8, 4), reward])
    make_trainer(CycleAlignTrainer, tmp_path, ranker=ranker)
    # The tokenizer has one token per character: no punishment up to 4, the full one from 8 on.
    [result] = ranker.rank([RankingRequest("Q", ("123456789", "1234", "123456"))])
    assert result.order == (1, 2, 0)
