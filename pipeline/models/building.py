"""Models made here: tiny ones from a size, students cut from larger models or built from a configuration."""

from pipeline.errors import UserError
from pipeline.models.loading import lm_class
from pipeline.params import Model


def build_causal_lm(size: Model, tokenizer, context: int, seed: int):
    """A new Llama-like model with tied embeddings (RMSNorm, RoPE, SwiGLU), weights drawn with `seed`."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=size.width**-0.5 / 2,
    )
    return build_from_config(config, tokenizer, seed)


def build_from_config(config, tokenizer, seed: int):
    """A new model of `config`'s shape for the vocabulary of `tokenizer`, weights drawn with `seed`."""
    import torch

    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return lm_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)


def keep_layers(model, layers: int):
    """Cut a model in place to `layers` of its blocks, evenly spaced, the first and the last among them; returns it.

    Raises UserError where it does not have more blocks than that, or they are not in `layers`.
    """
    from torch import nn

    blocks = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UserError(f"cannot cut layers of {type(model).__name__}: its blocks are not in `layers`")
    if layers >= len(blocks):
        raise UserError(f"cannot cut a model with {len(blocks)} layers to {layers}: give fewer")
    kept = [len(blocks) - 1] if layers == 1 else [round(i * (len(blocks) - 1) / (layers - 1)) for i in range(layers)]
    model.base_model.layers = nn.ModuleList(blocks[i] for i in kept)
    for number, block in enumerate(model.base_model.layers):
        if hasattr(block, "self_attn"):
            block.self_attn.layer_idx = number  # its place in the key-value cache
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    return model
