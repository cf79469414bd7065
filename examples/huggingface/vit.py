"""A family of transformers that is not split out of the box, through three hooks: ViTEncoder (transformers 4.x) becomes
smp.nn.DistributedTransformer.

    modelparallel run --nproc 2 examples/huggingface/vit.py
"""

import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTEncoder, ViTForImageClassification

import smdistributed.modelparallel.torch as smp


class SplitViTEncoder(smp.nn.DistributedTransformer):
    """DistributedTransformer that can take over the weights of a ViTEncoder (config ``_match_weights``)."""

    def copy_weights_from(self, module):
        self.copy_state(weights_of_stack(module), "ViTEncoder")


def weights_of_stack(encoder):
    """The weights of a ViTEncoder under the names of DistributedTransformer."""
    weights = {}
    for index, layer in enumerate(encoder.layer):
        attention = layer.attention.attention
        renamed = {
            "attention.pre_layernorm": layer.layernorm_before,
            "attention.dense": layer.attention.output.dense,
            "output.pre_layernorm": layer.layernorm_after,
            "output.dense1": layer.intermediate.dense,
            "output.dense2": layer.output.dense,
        }
        for name, part in renamed.items():
            weights.update({f"seq_layers.{index}.{name}.{kind}": value for kind, value in part.named_parameters()})
        for kind in ("weight", "bias") if attention.query.bias is not None else ("weight",):
            parts = [getattr(part, kind) for part in (attention.query, attention.key, attention.value)]
            weights[f"seq_layers.{index}.attention.qkv.{kind}"] = torch.cat(parts)
    return weights


def init_hook(config):
    """The arguments of ViTEncoder -> those of DistributedTransformer."""
    if config.hidden_act not in ("gelu", "relu"):
        raise ValueError(f"ViTConfig.hidden_act={config.hidden_act!r} is not supported")
    arguments = {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_size": config.hidden_size // config.num_attention_heads,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_dropout_prob": config.attention_probs_dropout_prob,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "activation": config.hidden_act,
        "layernorm_epsilon": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "use_normal_initialization": True,
        "pre_layernorm": True,
        "post_layernorm": False,
        "qkv_bias": config.qkv_bias,
    }
    return (), arguments


def forward_hook(hidden_states, head_mask=None):
    """The arguments of a call of ViTEncoder -> the one tuple that DistributedTransformer takes."""
    if head_mask is not None and any(mask is not None for mask in head_mask):
        raise ValueError("head_mask is not supported")
    return ((hidden_states, None),), {}


def return_hook(output):
    """What DistributedTransformer gives -> what ViTModel expects of ViTEncoder."""
    return BaseModelOutput(last_hidden_state=output[0])


def register():
    """Before the model is built: instances record their arguments from then on."""
    smp.tp_register_with_module(ViTEncoder, SplitViTEncoder, init_hook, forward_hook, return_hook)


@smp.step
def train_step(model, pixels, labels):
    loss = model(pixel_values=pixels, labels=labels).loss
    model.backward(loss)
    return loss


def main():
    smp.init({"tensor_parallel_degree": 2, "ddp": True})
    register()
    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32)
    with smp.tensor_parallelism():
        model = ViTForImageClassification(config)
    model = smp.DistributedModel(model)
    optimizer = smp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    pixels, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    for step in range(5):
        optimizer.zero_grad()
        loss = train_step(model, pixels, labels).reduce_mean()
        optimizer.step()
        if smp.rank() == 0:
            print(f"step {step}  loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
