"""A family of transformers that is not split out of the box, through three hooks: each ViTLayer becomes
smp.nn.DistributedTransformerLayer.

    modelparallel run --nproc 2 examples/huggingface/vit.py
"""

import torch
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTLayer

import smdistributed.modelparallel.torch as smp


class SplitViTLayer(smp.nn.DistributedTransformerLayer):
    """DistributedTransformerLayer that can take over the weights of a ViTLayer (config ``_match_weights``)."""

    def copy_weights_from(self, module):
        self.copy_state(weights_of_layer(module), "ViTLayer")


def weights_of_layer(layer):
    """The weights of a ViTLayer under the names of DistributedTransformerLayer."""
    attention = layer.attention
    if hasattr(layer, "mlp"):
        queries_keys_values = attention.q_proj, attention.k_proj, attention.v_proj
        projection, dense1, dense2 = attention.o_proj, layer.mlp.fc1, layer.mlp.fc2
    else:  # transformers 4
        inner = attention.attention
        queries_keys_values = inner.query, inner.key, inner.value
        projection, dense1, dense2 = attention.output.dense, layer.intermediate.dense, layer.output.dense
    renamed = {
        "attention.pre_layernorm": layer.layernorm_before,
        "attention.dense": projection,
        "output.pre_layernorm": layer.layernorm_after,
        "output.dense1": dense1,
        "output.dense2": dense2,
    }
    weights = {f"{name}.{kind}": value for name, part in renamed.items() for kind, value in part.named_parameters()}
    for kind, _ in queries_keys_values[0].named_parameters():
        weights[f"attention.qkv.{kind}"] = torch.cat([getattr(part, kind) for part in queries_keys_values])
    return weights


def init_hook(config):
    """The arguments of ViTLayer -> those of DistributedTransformerLayer."""
    if config.hidden_act not in ("gelu", "relu"):
        raise ValueError(f"ViTConfig.hidden_act={config.hidden_act!r} is not supported")
    arguments = {
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


def forward_hook(hidden_states, mask=None, **options):
    """The arguments of a call of ViTLayer -> the one tuple that DistributedTransformerLayer takes."""
    given = [name for name, value in {"mask": mask, **options}.items() if value is not None]
    if given:
        raise ValueError(f"not supported: {', '.join(given)}")
    return ((hidden_states, None),), {}


def return_hook(output):
    """What DistributedTransformerLayer gives -> what ViTModel expects of ViTLayer."""
    return output[0]


def register():
    """Before the model is built: instances record their arguments from then on."""
    smp.tp_register_with_module(ViTLayer, SplitViTLayer, init_hook, forward_hook, return_hook)


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
