"""The small layers: embedding, linear, RMSNorm, feed-forward."""

from mindspore import Parameter, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import operations as P  # noqa: N812


class TelechatEmbedding(nn.Cell):
    """Token ids ``[...]`` int32 to ``[..., H]`` in ``res_dtype``."""

    def __init__(self, config):
        super().__init__()
        self.embedding_weight = Parameter(
            initializer(
                Normal(config.sigma, config.mean),
                (config.vocab_size, config.hidden_size),
                config.embedding_init_type,
            ),
            name="embedding_weight",
        )
        self.dtype = config.res_dtype
        self.gather = P.Gather()
        self.cast = P.Cast()
        self.dropout = nn.Dropout(p=config.embed_dropout_prob)

    def construct(self, tokens):
        return self.dropout(self.cast(self.gather(self.embedding_weight, tokens, 0), self.dtype))


class TelechatLinear(nn.Cell):
    """``x @ weight^T (+ bias)``: ``[T, in]`` to ``[T, out]``, computed and returned in ``compute_dtype``.

    Args:
        in_channels, out_channels: widths; the weight is ``[out, in]``.
        config: dtypes and initialisation.
        has_bias: whether there is a bias ``[out]``.
        sigma: standard deviation of the initial weights, None for the config's.
        dropout: probability of dropping an output, in training.
    """

    def __init__(self, in_channels, out_channels, config, has_bias=False, sigma=None, dropout=0.0):
        super().__init__()
        sigma = config.sigma if sigma is None else sigma
        self.weight = Parameter(
            initializer(Normal(sigma, config.mean), (out_channels, in_channels), config.param_init_type),
            name="weight",
        )
        self.has_bias = has_bias
        if has_bias:
            self.bias = Parameter(initializer("zeros", (out_channels,), config.param_init_type), name="bias")
            self.bias_add = P.Add()
        self.dtype = config.compute_dtype
        self.matmul = P.MatMul(transpose_b=True)
        self.cast = P.Cast()
        self.dropout = nn.Dropout(p=dropout)

    def construct(self, x):
        out = self.matmul(self.cast(x, self.dtype), self.cast(self.weight, self.dtype))
        if self.has_bias:
            out = self.bias_add(out, self.cast(self.bias, self.dtype))
        return self.dropout(out)


class TelechatRMSNorm(nn.Cell):
    """RMSNorm: ``[T, H]`` to ``[T, H]``, computed in ``layernorm_compute_type``.

    ``out_dtype`` is that of the result, by default ``compute_dtype``.
    """

    def __init__(self, config, kernels, out_dtype=None):
        super().__init__()
        self.weight = Parameter(
            initializer("ones", (config.hidden_size,), config.layernorm_compute_type), name="weight"
        )
        self.norm_dtype = config.layernorm_compute_type
        self.out_dtype = out_dtype or config.compute_dtype
        self.norm = kernels.rms_norm(config.rms_norm_eps)
        self.cast = P.Cast()

    def construct(self, x):
        return self.cast(self.norm(self.cast(x, self.norm_dtype), self.weight), self.out_dtype)


class TelechatFeedForward(nn.Cell):
    """``w2(silu(w1 x) * w3 x)``: SwiGLU, ``[T, H]`` to ``[T, H]``, with a bias on ``w2`` only."""

    def __init__(self, config, kernels):
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.add_gates(config, kernels)
        self.w2 = TelechatLinear(width, hidden, config, has_bias=True, dropout=config.hidden_dropout_prob)

    def add_gates(self, config, kernels):
        """Make the cells that ``gated`` uses."""
        self.w1 = TelechatLinear(config.hidden_size, config.intermediate_size, config)
        self.w3 = TelechatLinear(config.hidden_size, config.intermediate_size, config)
        self.swiglu = kernels.swiglu()

    def gated(self, x):
        """``silu(w1 x) * w3 x``: ``[T, H]`` to ``[T, F]``."""
        return self.swiglu(self.w1(x), self.w3(x))

    def construct(self, x):
        return self.w2(self.gated(x))
