"""Models and tokenizers: building, loading, saving, and knowing whether two are the same."""

from pipeline.models.building import build_causal_lm, build_from_config, keep_layers
from pipeline.models.identity import describe_model, licence_of, number_type, weights_digest
from pipeline.models.loading import (
    Context,
    best_device,
    has_weights,
    link_model,
    load_config,
    load_lm,
    local_folder,
    require_context,
    require_loadable,
    resolve,
    source_of,
    stop_token_ids,
)
from pipeline.models.saving import require_own_model, save_model, save_note
from pipeline.models.tokenizers import load_tokenizer, require_same_tokenizer, tokenizer_identity, word_tokenizer

__all__ = [
    "Context", "best_device", "build_causal_lm", "build_from_config", "describe_model", "has_weights",
    "keep_layers", "licence_of", "link_model", "load_config", "load_lm", "load_tokenizer", "local_folder",
    "number_type", "require_context", "require_loadable", "require_own_model", "require_same_tokenizer", "resolve", 
    "save_model", "save_note", "source_of", "stop_token_ids", "tokenizer_identity", "weights_digest", "word_tokenizer",
]  # fmt: skip
