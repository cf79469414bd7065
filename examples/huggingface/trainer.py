"""Hugging Face's Trainer, which knows this API by itself: no line of the script speaks of parallelism.

    pip install "transformers[torch]==4.57.6"
    modelparallel run --nproc 2 --parameters '{"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": true}' \
        examples/huggingface/trainer.py
    modelparallel run ... examples/huggingface/trainer.py trainer-output/checkpoint-4

The second line goes on from the fourth step of the first.
"""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


def main():
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (64, 16))]
    arguments = TrainingArguments(
        "trainer-output", max_steps=6, save_steps=2, eval_strategy="steps", eval_steps=3, logging_steps=1,
        learning_rate=1e-3, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data, eval_dataset=data[:16])
    trainer.train(resume_from_checkpoint=sys.argv[1] if len(sys.argv) > 1 else None)
    trainer.evaluate()
    trainer.save_model()


main()
