"""Every setting of ``model.model_config``: its type, default, unit, rule and help, here and nowhere else.

TelechatConfig is a ModelSettings with MindFormers' methods; the check without MindSpore, the estimate, the
converter and docs/settings.md read the same class. Rules that compare several settings: model.py, rope.py,
parallel.py.
"""

from dataclasses import dataclass, field
from typing import Any

from research.telechat2.config.fields import Section, follows, setting
from research.telechat2.config.moe import ExpertSection, MoESettings
from research.telechat2.config.plan_settings import ParallelSettings

DTYPES = ("float32", "float16", "bfloat16")


def _count(default: int, text: str, unit: str = "") -> int:
    return setting(default, text, unit=unit, least=1)


def _dtype(default: str, text: str) -> str:
    return setting(default, text, unit=" or ".join(DTYPES))


@dataclass(eq=False)
class Sizes(Section):
    """Sizes"""

    batch_size: int = _count(1, "Rows of a prediction batch; training takes `runner_config.batch_size`.")
    seq_length: int = _count(8192, "Longest sequence; training records hold one id more.", "tokens")
    hidden_size: int = _count(4096, "Width H of the residual stream.")
    num_layers: int = _count(30, "Decoder layers.")
    num_heads: int = _count(32, "Query heads; `head_dim = hidden_size / num_heads`.")
    n_kv_heads: int = follows("Key/value heads, a divisor of `num_heads`; null: one per query head.", least=1)
    intermediate_size: int = follows(
        "Width F of the feed-forward block. null: with `m = int((ffn_dim_multiplier + 0.01)·4H)`, "
        "`F = int(2m/3)` rounded up to `multiple_of`; without a multiplier `m = 4H`.",
        least=1,
    )
    ffn_dim_multiplier: float | None = setting(None, "See `intermediate_size`.")
    multiple_of: int = setting(256, "See `intermediate_size`.")
    vocab_size: int = _count(131072, "Rows V of embedding and output projection.")
    tie_word_embeddings: bool = setting(False, "The output projection is the embedding (TeleChat v1 7B).")
    rms_norm_eps: float = setting(1e-5, "Epsilon inside the root of RMSNorm.", above=0)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(eq=False)
class Rotary:
    """Rotary positions"""

    theta: float = setting(10000.0, "Base of the rotary frequencies.", above=0)
    max_position_embedding: int = follows(
        "Length the model was trained at. null: `training_seqlen`, else `seq_length`. Less than `seq_length` "
        "needs an `extend_method`.",
        unit="tokens",
        least=1,
    )
    extend_method: str = follows(
        "How positions beyond the trained length are read: None, PI, linear, NTK, YARN or DYNAMIC_NTK. null: "
        "as the torch release, DYNAMIC_NTK if `seq_length` exceeds a stated `training_seqlen`, else None."
    )
    scaling_factor: float | dict[str, Any] = setting(
        1.0,
        "At least 1: PI and linear divide positions by it, NTK multiplies theta by it. YARN takes a section.",
    )
    base_seqlen: int | None = setting(
        None,
        "With `training_seqlen` the lengths of the release: up to `training_seqlen` theta grows by "
        "dynamic NTK's alpha of these two. null: `max_position_embedding`, no growth up to there.",
        unit="tokens",
    )
    training_seqlen: int | None = setting(None, "See `base_seqlen`.", unit="tokens")
    extend_by_prompt: bool = setting(
        False,
        "DYNAMIC_NTK chooses the factor of a request by the length of its prompt (True), or by the length "
        "that prompt and answer may reach (False).",
    )


@dataclass(eq=False)
class Dropout:
    """Dropout"""

    embed_dropout_prob: float = setting(0.0, "After the embedding.", least=0, below=1)
    hidden_dropout_prob: float = setting(0.0, "After `wo` and `w2`.", least=0, below=1)
    attention_dropout_prob: float = setting(0.0, "Attention runs without dropout.", choices=(0.0,))


@dataclass(eq=False)
class Dtypes:  # their names, of MindSpore in a TelechatConfig
    """Dtypes"""

    compute_dtype: str = _dtype("bfloat16", "Of matrix products.")
    param_init_type: str = _dtype("float32", "Of parameters.")
    embedding_init_type: str = follows("Of the embedding; null: `param_init_type`.", unit=" or ".join(DTYPES))
    layernorm_compute_type: str = _dtype("float32", "In which norms are computed, and of their weights.")
    softmax_compute_type: str = _dtype(
        "float32", "Of attention's softmax; Ascend's fused kernels always take float32."
    )
    rotary_dtype: str = _dtype("float32", "In which rotations are computed.")
    res_dtype: str = _dtype("float32", "Of the residual stream.")


@dataclass(eq=False)
class Initialization:
    """Initial weights"""

    sigma: float = setting(
        0.0048, "Deviation of embedding and linears; the output projection takes 0.01.", least=0
    )
    mean: float = setting(0.0, "Mean of embedding and linears.")


@dataclass(eq=False)
class Tokens:
    """Token ids and packed records"""

    bos_token_id: int = setting(1, "Id that begins a conversation.")
    eos_token_id: int = setting(2, "Id that ends an answer.")
    pad_token_id: int = setting(3, "Id that fills rows; -1: there is none.")
    ignore_token_id: int = setting(-100, "Label that is not trained.")
    document_start_ids: tuple[int, ...] | list[int] = setting(
        (),
        "Ids that begin a document of a packed training record. A document sees nothing of the others: each "
        "record gives the losses of its documents alone. Empty: one causal sequence.",
    )
    max_documents: int = _count(
        128, "Most documents of a packed record: the length of its cumulative sequence lengths."
    )


@dataclass(eq=False)
class Cache:
    """Prediction with a cache"""

    use_past: bool = setting(False, "Predict with a paged key/value cache.")
    qkv_concat: bool = setting(
        False,
        "ParallelTelechatForCausalLM has one product for queries, keys and values, and in dense models one "
        "for gate and up.",
    )
    is_dynamic: bool = setting(
        True,
        "With `use_past`: one graph for all shapes (True), or one for each length rounded up to a power of "
        "two (False: faster steps, a compilation for each new length).",
    )
    block_size: int = _count(16, "Tokens in a block of the paged cache.", "tokens")
    num_blocks: int = _count(512, "Blocks of the paged cache.")
    prefill_chunk: int = setting(
        0,
        "With `use_past`: most tokens of prompts read in one step; longer prompts are read in chunks. 0: "
        "every prompt at once.",
        unit="tokens",
        least=0,
    )
    use_flash_attention: bool = setting(
        True, "On Ascend the fused attention kernels (True) or plain operators (False)."
    )


@dataclass(eq=False)
class Sampling:
    """Defaults of generate"""

    top_k: int = setting(5, "Draw among the k likeliest tokens; 0: all.", least=0)
    top_p: float = setting(1.0, "Draw among the likeliest tokens of this mass; 1.0: all.", above=0, most=1)
    do_sample: bool = setting(False, "Draw each token (True), or take the likeliest (False).")
    temperature: float = setting(1.0, "Divides the logits before a draw; 1.0: off.", above=0)
    repetition_penalty: float = setting(1.0, "Makes tokens that are there less likely; 1.0: off.", above=0)
    max_decode_length: int = setting(
        512,
        "Most tokens of prompt and answer together, where a command sets no other limit; `seq_length` is one "
        "in any case.",
        unit="tokens",
    )


@dataclass(eq=False)
class Run:
    """The run and its pipeline"""

    checkpoint_name_or_path: str = setting("", "Weights loaded when the model is built; empty: none.")
    calculate_per_token_loss: bool | None = setting(
        False, "Return the loss as numerator and denominator (MindFormers' accumulation)."
    )
    offset: int | list[Any] = setting(
        0, "Layers that stages of the pipeline have more than `num_layers // stages`, see pipeline.py."
    )
    pp_interleave_num: int = _count(1, "Runs of layers, virtual chunks, of each stage of the pipeline.")
    fine_grain_interleave: int = _count(
        1,
        "Copies of the tokens, 1 or 2, in which a layer is computed where `model_parallel` is above 1: one "
        "communicates beside the products of the other.",
    )
    disable_lazy_inline: bool = setting(
        False,
        "Compile the graph of a cluster anew for every micro-batch. MindFormers' Trainer sets it where a "
        "step has only one.",
    )


# Fields stand in the order of the bases from the last to the first.
@dataclass(eq=False)
class ModelSettings(Run, Sampling, Cache, Tokens, Initialization, Dtypes, Dropout, Rotary, Sizes):
    """A model's settings, complete, with the sections of the YAML that a model needs.

    ``parallel_config`` and ``moe_config`` are MindFormers' objects in a TelechatConfig. ``moe``: the mixture
    of experts that follows from ``moe_config``; None for a dense model.
    """

    parallel_config: ParallelSettings = field(default_factory=ParallelSettings)
    moe_config: ExpertSection = field(default_factory=ExpertSection)
    moe: MoESettings | None = None


DTYPE_FIELDS = tuple(name for name in Dtypes.__annotations__)
