"""Attention and the decoder layer. Activations are ``[T, H]``: all tokens of all sequences in one axis."""

from mindspore import nn
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.model.moe import TelechatMoE
from research.telechat2.telechat_layer import TelechatFeedForward, TelechatLinear, TelechatRMSNorm


class TelechatAttention(nn.Cell):
    """Grouped-query attention with rotary positions, ``[T, H]`` to ``[T, H]``.

    N query heads, K key/value heads of D channels. The rows of ``wk_v`` are packed per key/value head: head g
    has its D key rows, then its D value rows.
    """

    def __init__(self, config, kernels):
        super().__init__()
        self.num_heads, self.n_kv_heads, self.head_dim = config.num_heads, config.n_kv_heads, config.head_dim
        self.add_projections(config)
        self.wo = TelechatLinear(
            self.num_heads * self.head_dim, config.hidden_size, config, has_bias=True,
            dropout=config.hidden_dropout_prob,
        )  # fmt: skip
        self.rotary_dtype, self.compute_dtype = config.rotary_dtype, config.compute_dtype
        self.use_past = config.use_past
        if config.use_past:
            self.rotary = kernels.rotary_tokens(config.head_dim)
            self.paged_attention = kernels.paged_attention(config)
        else:
            self.rotary = kernels.rotary()
            self.causal_attention = kernels.causal_attention(config)
        self.reshape = P.Reshape()
        self.split_kv = P.Split(-1, 2)
        self.cast = P.Cast()

    def add_projections(self, config):
        """Make the cells that ``project`` uses."""
        self.wq = TelechatLinear(config.hidden_size, self.num_heads * self.head_dim, config)
        self.wk_v = TelechatLinear(config.hidden_size, 2 * self.n_kv_heads * self.head_dim, config)

    def project(self, x):
        """Queries ``[T, N*D]``, keys and values ``[T, K*D]`` of tokens ``[T, H]``."""
        query = self.wq(x)
        key_value = self.reshape(self.wk_v(x), (-1, self.n_kv_heads, 2 * self.head_dim))
        key, value = self.split_kv(key_value)
        flat = (-1, self.n_kv_heads * self.head_dim)
        return query, self.reshape(key, flat), self.reshape(value, flat)

    def _rotate(self, query, key, tables):
        query, key = self.cast(query, self.rotary_dtype), self.cast(key, self.rotary_dtype)
        query, key = self.rotary(query, key, *tables)
        return self.cast(query, self.compute_dtype), self.cast(key, self.compute_dtype)

    def construct(self, x, batch_size, inputs):
        """Whole sequences: ``x`` ``[B*S, H]`` to ``[B*S, H]``; ``inputs``: of the kernel sequence_inputs."""
        return self.wo(self.attend(self.wq(x), self.wk_v(x), batch_size, inputs))

    def attend(self, query, key_value, batch_size, inputs):
        """Rotation and attention: queries ``[B*S, N*D]``, ``wk_v``'s ``[B*S, 2*K*D]`` to ``[B*S, N*D]``."""
        query_tables, key_tables, mask = inputs
        flat = query.shape
        query = self.reshape(query, (batch_size, -1, self.num_heads, self.head_dim))
        key_value = self.reshape(key_value, (batch_size, -1, self.n_kv_heads, 2 * self.head_dim))
        key, value = self.split_kv(key_value)
        query, key = self._rotate(query, key, (query_tables, key_tables))
        return self.reshape(self.causal_attention(query, key, value, mask), flat)

    def paged(self, x, prefill, tables, inputs, lengths):
        """Tokens of cached sequences: ``x`` ``[T, H]`` to ``[T, H]``.

        ``prefill``: a constant of the graph. ``tables``: cos and sin ``[T, D]``. ``inputs``: of the kernel
        paged_inputs. ``lengths`` ``[B]``: tokens of each sequence.
        """
        query, key, value = self.project(x)
        query, key = self._rotate(query, key, (*tables, lengths))
        attend = self.paged_attention.prefill if prefill else self.paged_attention.decode
        return self.wo(attend(query, key, value, inputs, lengths))


class TelechatDecoderLayer(nn.Cell):
    """``h = x + attention(norm(x)); y = h + feed_forward(norm(h))``: x and y ``[T, H]`` in ``res_dtype``.

    The feed-forward block is dense or a mixture of experts. Returns y, and with experts their auxiliary loss
    ``[1]``.
    """

    def __init__(self, config, kernels):
        super().__init__()
        self.attention_norm = TelechatRMSNorm(config, kernels)
        self.attention = TelechatAttention(config, kernels)
        self.has_experts = config.moe is not None
        # The router reads the norm's result before it is rounded.
        dtype = config.layernorm_compute_type if self.has_experts else None
        self.ffn_norm = TelechatRMSNorm(config, kernels, dtype)
        self.feed_forward = (TelechatMoE if self.has_experts else TelechatFeedForward)(config, kernels)
        self.res_dtype = config.res_dtype
        self.add_attention = P.Add()
        self.add_feed_forward = P.Add()
        self.cast = P.Cast()

    def _feed_forward(self, x, attention):
        hidden = self.add_attention(x, self.cast(attention, self.res_dtype))
        out = self.feed_forward(self.ffn_norm(hidden))
        if not self.has_experts:
            return self.add_feed_forward(hidden, self.cast(out, self.res_dtype))
        out, balance_loss = out
        return self.add_feed_forward(hidden, self.cast(out, self.res_dtype)), balance_loss

    def construct(self, x, batch_size, inputs):
        """Whole sequences, see TelechatAttention."""
        return self._feed_forward(x, self.attention(self.attention_norm(x), batch_size, inputs))

    def paged(self, x, prefill, tables, inputs, lengths):
        """Tokens with the cache, see TelechatAttention; returns y alone."""
        attention = self.attention.paged(self.attention_norm(x), prefill, tables, inputs, lengths)
        y = self._feed_forward(x, attention)
        return y[0] if self.has_experts else y
