"""Process of `test_self_reward_distributed.py`: pairs, DLMA on them, and CycleAlign with a self-reward ranker."""

import os
import sys
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from cyclealign_trl import Aligner, DLMAConfig, DLMATrainer, SelfRewardRanker, generate_contrastive_pairs
from tests.conftest import make_model, make_tokenizer
from tests.cycle.stubs import config, make_trainer
from tests.dlma.test_contrastive_pairs import KIND, TEXTS
from tests.rankers.test_servers import save_fixed_reply_model


def train(folder, num_processes, precompute=False, **changes):
    """Generate pairs and run both trainers in steps of 4 prompts, over all processes."""
    # Training arguments must come later, because ZeRO-3 would shard the aligner.
    aligner_folder = folder / f"aligner-{os.environ.get('RANK', '0')}"
    save_fixed_reply_model(aligner_folder, "sorry")  # corrects every answer to "sorry"
    aligner = Aligner.from_pretrained(aligner_folder, template="{question} {answer}>", max_new_tokens=4)
    shared = {"per_device_train_batch_size": 4 // num_processes, "per_device_eval_batch_size": 4, **changes}
    names = DLMAConfig.__dataclass_fields__
    settings = config(folder / "dlma", **{**shared, "num_train_epochs": 2}).to_dict()
    dlma_args = DLMAConfig(  # initialises the process group
        **{name: value for name, value in settings.items() if name in names and name != "loss_type"},
        precompute_ref_log_probs=precompute,
    )
    assert dlma_args.world_size == num_processes
    pairs = generate_contrastive_pairs(
        make_model(), TEXTS + TEXTS[:2], KIND, make_tokenizer(), output_dir=folder / "pairs", batch_size=2,
        max_completion_length=12,
    )  # fmt: skip
    rows = pairs.select(range(4))  # two processes would pad a smaller last step
    dlma = DLMATrainer(
        make_model(), args=dlma_args, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer()
    )
    cycle = make_trainer(
        folder / "cycle",
        SelfRewardRanker(make_model(), make_tokenizer(), contrastive=KIND),
        corrector=aligner,
        sft_target="corrector",
        demonstration_scope="run",
        rank_improved_completion=True,
        stub_generation=True,
        **shared,
    )
    for trainer in (dlma, cycle):
        trainer.train()
        trainer.save_model()
    dlma.evaluate()
    return pairs, dlma, cycle


def main(folder, num_processes, deepspeed=None, precompute=""):
    changes = {}
    if deepspeed:
        import deepspeed as library

        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in worker.py
        changes = {"deepspeed": deepspeed}
    pairs, dlma, cycle = train(Path(folder), int(num_processes), bool(precompute), **changes)
    index = PartialState().process_index
    Dataset.from_list(pairs.to_list()).to_json(f"{folder}/pairs-{index}.jsonl")
    Dataset.from_list([{"dlma": dlma.state.log_history, "cycle": cycle.state.log_history}]).to_json(
        f"{folder}/result-{index}.jsonl"
    )
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as in worker.py


if __name__ == "__main__":
    main(*sys.argv[1:])
