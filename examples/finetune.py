"""The whole job from Python: trains a tiny DeepSeek-V3 on two CPU processes, exports it and loads it in transformers.

    python -m examples.finetune [--root FOLDER] [--max_steps N]      in the environment of scripts/setup.sh

It does what `fit --config configs/tiny_cpu.yaml` does, with Lightning's Trainer. On GPUs: `accelerator="cuda"`,
`precision="bf16-true"`, the directory of a published model in place of MODEL, and no `from_scratch`.
"""

from pathlib import Path

import lightning.pytorch as pl
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM

from src.callbacks.export_at_end import ExportAtEnd
from src.callbacks.loggers import count_steps_from_one
from src.callbacks.progress import Progress
from src.callbacks.run_record import RunRecord
from src.callbacks.step_checkpoint import StepCheckpoint
from src.callbacks.throughput import Throughput
from src.datamodules import SFTDataModule
from src.datamodules.tokenizer import load_tokenizer, opening_files
from src.models.sft_module import SFTModule
from src.strategies import DeepSpeedSPStrategy

MODEL = "configs/models/tiny"


def main(root: Path = Path("runs/example"), max_steps: int = -1) -> None:
    pl.seed_everything(0)
    tokenizer = load_tokenizer("deepseek")
    module = SFTModule(MODEL, from_scratch=True, learning_rate=3e-3, min_learning_rate=3e-4)
    data = SFTDataModule(
        ["data/demo/train.jsonl"], val_files=["data/demo/val.jsonl"], tokenizer="deepseek", max_length=512
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        precision="32-true",
        strategy=DeepSpeedSPStrategy(sequence_parallel_size=2),  # both ranks share each row
        max_epochs=2,
        max_steps=max_steps,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        default_root_dir=root,
        callbacks=[
            Progress(),
            Throughput(),
            StepCheckpoint(),  # checkpoints/step=N.ckpt and last.ckpt, which trainer.fit(ckpt_path=...) continues from
            RunRecord("", MODEL, tokenizer.name_or_path, opening_files(tokenizer)),  # what an export has to know
            ExportAtEnd(str(root / "hf")),
        ],
    )
    count_steps_from_one(trainer)  # loggers, as the progress bar and checkpoints do
    trainer.fit(module, data)
    trainer.validate(module, data)
    if trainer.is_global_zero:
        model = AutoModelForCausalLM.from_pretrained(root / "hf")
        print(f"{root / 'hf'}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in transformers")


if __name__ == "__main__":
    auto_cli(main)
