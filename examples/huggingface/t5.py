"""T5 with its feed-forward layers, more than half of the weights of its layers, split by a module of one's own.

DistributedTransformer does not fit T5, which normalises by RMSNorm and adds a bias of relative positions to its scores.
But parts can be split alone: T5DenseActDense and T5DenseGatedActDense become `SplitFeedForward`. Its parameters have
the same names and full shapes as the originals, so state dicts need no translation. Attention stays whole on each rank.

    modelparallel run --nproc 2 examples/huggingface/t5.py
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense, T5ForConditionalGeneration

import smdistributed.modelparallel.torch as smp
from modelparallel.nn.family import FamilyModule, SplitLinear


class SplitFeedForward(FamilyModule):
    """[N, S, d_model] -> [N, S, d_model]; each rank computes d_ff / t of the inner features for all ranks' samples."""

    def __init__(self, d_model, d_ff, activation, dropout_rate, is_gated):
        super().__init__()
        self.is_gated = is_gated
        if is_gated:
            self.wi_0 = SplitLinear(d_model, d_ff, is_column=True, bias=False)
            self.wi_1 = SplitLinear(d_model, d_ff, is_column=True, bias=False)
        else:
            self.wi = SplitLinear(d_model, d_ff, is_column=True, bias=False)
        self.wo = SplitLinear(d_ff, d_model, is_column=False, bias=False)
        self.act = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, hidden):
        # The rows of all ranks come together on the way in, and everybody gets its own back (see nn/layouts.py).
        counts = self.layout.scaled_rows("SplitFeedForward", [hidden])
        hidden = self.layout.enter(hidden, counts)
        inner = self.act(self.wi_0(hidden)) * self.wi_1(hidden) if self.is_gated else self.act(self.wi(hidden))
        return self.layout.leave(self.wo(self.dropout(inner)), counts)


def init_hook(config):
    """The arguments of both classes -> those of SplitFeedForward."""
    return (config.d_model, config.d_ff, config.dense_act_fn, config.dropout_rate, config.is_gated_act), {}


def register():
    """Before the model is built: instances record their arguments from then on."""
    for module_class in (T5DenseActDense, T5DenseGatedActDense):
        smp.tp_register_with_module(module_class, SplitFeedForward, init_hook)


def split(model):
    """Mark the feed-forward layers alone: other supported modules (nn.Linear, nn.Embedding) stay whole."""
    for module in model.modules():
        if type(module) in (T5DenseActDense, T5DenseGatedActDense):
            smp.set_tensor_parallelism(module)
    return model


@smp.step
def train_step(model, ids, labels):
    loss = model(input_ids=ids, labels=labels).loss
    model.backward(loss)
    return loss


def main():
    smp.init({"tensor_parallel_degree": 2, "ddp": True})
    register()
    config = T5Config(
        vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", use_cache=False,
    )  # fmt: skip
    model = smp.DistributedModel(split(T5ForConditionalGeneration(config)))
    optimizer = smp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    ids = torch.randint(1, 100, (8, 12))
    for step in range(5):
        optimizer.zero_grad()
        loss = train_step(model, ids, ids).reduce_mean()
        optimizer.step()
        if smp.rank() == 0:
            print(f"step {step}  loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
