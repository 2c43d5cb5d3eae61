"""TelechatModel and TelechatForCausalLM: training, evaluation and prediction with a paged cache."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.common.errors import UsageError
from research.telechat2.compat.library import MindFormerModuleType, MindFormerRegister, is_predict_run
from research.telechat2.config.parallel import check_whole, copies_of
from research.telechat2.generation.pretrained import PreTrainedModel, find_graph_again
from research.telechat2.generation.rotary_lengths import RequestLengths
from research.telechat2.generation.step_inputs import dynamic_inputs, step_inputs
from research.telechat2.model.kernels.select import choose_kernels
from research.telechat2.model.means import GlobalMean
from research.telechat2.model.rope import RotaryTables
from research.telechat2.parallel.strategies import apply_plan
from research.telechat2.telechat_config import TelechatConfig
from research.telechat2.telechat_interleave import JoinTokens, SplitTokens, decoder_layers
from research.telechat2.telechat_layer import TelechatEmbedding, TelechatLinear, TelechatRMSNorm

LM_HEAD_SIGMA = 0.01  # spec 1.2: the output projection starts wider than the other linears


class TelechatModel(nn.Cell):
    """The decoder stack: token ids to normalised hidden states ``[T, H]`` in ``compute_dtype``."""

    def __init__(self, config: TelechatConfig, kernels):
        super().__init__()
        self.tok_embeddings = TelechatEmbedding(config)
        self.layers = nn.CellList(decoder_layers(config, kernels))
        self.norm_out = TelechatRMSNorm(config, kernels)
        self.rotary_tables = RotaryTables(config)
        if config.use_past:
            self.paged_inputs = kernels.paged_inputs(config)
        else:
            self.sequence_inputs = kernels.sequence_inputs(config)
        self.packed = bool(config.document_start_ids)
        if self.packed:
            self.documents = kernels.documents(config)
        self.has_experts = config.moe is not None
        self.interleaved = copies_of(config) > 1
        if self.interleaved:
            self.split_tokens, self.join_embedded = SplitTokens(copies_of(config)), JoinTokens()
            self.split_hidden, self.join_hidden = SplitTokens(copies_of(config)), JoinTokens()
        self.reshape = P.Reshape()
        self.add = P.Add()

    def construct(self, tokens):
        """Whole sequences ``[B, S]`` to ``[B*S, H]`` and the sum of the layers' auxiliary losses ``[1]``."""
        batch_size, seq_length = tokens.shape
        masked = self.documents(tokens) if self.packed else None
        inputs = self.sequence_inputs(*self.rotary_tables.sequence(seq_length), batch_size, masked)
        x = self._embed(self.reshape(tokens, (-1,)))
        balance_loss = ops.zeros((1,), ms.float32)
        for layer in self.layers:
            if self.has_experts:
                x, loss = layer(x, batch_size, inputs)
                balance_loss = self.add(balance_loss, loss)
            else:
                x = layer(x, batch_size, inputs)
        return self._norm(x), balance_loss

    def _embed(self, tokens):
        if not self.interleaved:
            return self.tok_embeddings(tokens)
        return self.join_embedded([self.tok_embeddings(part) for part in self.split_tokens(tokens)])

    def _norm(self, x):
        if not self.interleaved:
            return self.norm_out(x)
        return self.join_hidden([self.norm_out(part) for part in self.split_hidden(x)])

    def paged(self, tokens, prefill, positions, lengths, block_tables, slot_mapping, rotary_lengths=None):
        """Tokens ``[T]`` of cached sequences to ``[T, H]``; ``prefill`` is a constant of the graph.

        The other inputs are those of TelechatForCausalLM; ``lengths`` is its ``batch_valid_length``.
        """
        prepare = self.paged_inputs.prefill if prefill else self.paged_inputs.decode
        inputs = prepare(positions, lengths, block_tables, slot_mapping)
        tables = self.rotary_tables.tokens(positions, rotary_lengths)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer.paged(x, prefill, tables, inputs, lengths)
        return self.norm_out(x)


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class TelechatForCausalLM(PreTrainedModel):
    """TeleChat2 as a language model.

    Inputs of ``construct`` (int32):
        - **input_ids**: training and evaluation ``[B, seq_length + 1]``; prediction without a cache
          ``[B, S]``; with one ``[1, T]`` (prefill: all prompts one after the other) or ``[T, 1]`` (decode).
        - **labels**: as ``input_ids``, the id that each position holds if it is trained, else
          ``ignore_token_id``. Without labels every token but padding is trained.
        - **position_ids** ``[T]``, **batch_valid_length** ``[B]``, **block_tables** ``[B, M]``,
          **slot_mapping** ``[T]``, **last_token** ``[B]``: prediction with a cache; ``last_token`` is the
          index of each sequence's last token among the T. With DYNAMIC_NTK also
          **rotary_lengths** ``[T]``, the length whose rotary factor the token's request has.

    Returns:
        Training: the loss ``[1]``, the sum over trained tokens divided by their number (0 if there are none),
        and with experts the auxiliary losses of all layers.
        Evaluation: the sum of the losses of the trained tokens ``[1]`` and their number ``[1]``, float32, on
        a cluster those of the global batch. Without labels logits ``[B, S, V]`` float32, tokens and the mask
        of trained tokens ``[B, S]``, as MindFormers' own metrics take them.
        Prediction: logits float32, ``[B, V]`` of the last tokens with a cache, else ``[B*S, V]``.
    """

    config_class = TelechatConfig
    base_model_prefix = "telechat"

    def __init__(self, config: TelechatConfig):
        super().__init__(config, auto_prefix=True)
        self.kernels = choose_kernels(config)
        self.model = TelechatModel(config, self.kernels)
        self.lm_head = TelechatLinear(config.hidden_size, config.vocab_size, config, sigma=LM_HEAD_SIGMA)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.tok_embeddings.embedding_weight
        self.loss = self.kernels.cross_entropy()
        self.global_mean = GlobalMean()
        self.calculate_per_token_loss = config.calculate_per_token_loss
        self.ignore_token_id, self.pad_token_id = config.ignore_token_id, config.pad_token_id
        self.has_experts = config.moe is not None
        self.use_past = config.use_past
        self.predicting = is_predict_run()
        self.is_first_iteration = True
        self.last_shapes = {}
        self.requests = RequestLengths(config) if config.extend_method == "DYNAMIC_NTK" else None
        self.slice = P.StridedSlice()
        self.reshape = P.Reshape()
        self.gather = P.Gather()
        self.not_equal = P.NotEqual()
        self.mul = P.Mul()
        self.add = P.Add()
        self.cast = P.Cast()
        self.distribute(config)
        self.load_checkpoint(config)

    def distribute(self, config) -> None:
        """Apply the parallel plan of training; prediction by this class is not distributed."""
        check_whole(config)
        apply_plan(self, config)

    def construct(
        self,
        input_ids,
        labels=None,
        position_ids=None,
        batch_valid_length=None,
        block_tables=None,
        slot_mapping=None,
        last_token=None,
        rotary_lengths=None,
    ):
        if self.use_past:
            lengths = self.reshape(batch_valid_length, (-1,))
            tokens = self.reshape(input_ids, (-1,))
            hidden = self.model.paged(
                tokens, self.is_first_iteration, position_ids, lengths, block_tables, slot_mapping,
                rotary_lengths,
            )  # fmt: skip
            return self._logits(self.gather(hidden, last_token, 0))
        if self.training:
            return self._loss(input_ids, labels)
        if labels is not None:
            return self._sums(input_ids, labels)[:2]
        logits = self._logits(self.model(input_ids)[0])
        if self.predicting:
            return logits
        return self.reshape(logits, (*input_ids.shape, -1)), input_ids, self._trained(input_ids, labels)

    def _logits(self, hidden):
        return self.cast(self.lm_head(hidden), ms.float32)

    def _trained(self, input_ids, labels):
        """Float mask of the tokens that are trained, in the shape of ``input_ids``."""
        if labels is None:
            return self.cast(self.not_equal(input_ids, self.pad_token_id), ms.float32)
        return self.cast(self.not_equal(labels, self.ignore_token_id), ms.float32)

    def _sums(self, input_ids, labels):
        """Sum of the trained tokens' losses, their number, the layers' auxiliary losses, ``[1]`` each."""
        batch_size, length = input_ids.shape
        first, last, step = (0, 1), (batch_size, length), (1, 1)
        tokens = self.slice(input_ids, (0, 0), (batch_size, length - 1), step)
        targets = input_ids if labels is None else labels
        trained = self._trained(input_ids, labels)
        hidden, balance_loss = self.model(tokens)
        total, count = self.loss(
            self._logits(hidden),
            self.reshape(self.slice(targets, first, last, step), (-1,)),
            self.reshape(self.slice(trained, first, last, step), (-1,)),
        )
        return total, count, balance_loss

    def _loss(self, input_ids, labels):
        total, count, balance_loss = self._sums(input_ids, labels)
        if self.calculate_per_token_loss:
            if self.has_experts:
                total = self.add(self.reshape(total, (1,)), balance_loss * count)
            return total, count
        loss = self.global_mean(total, count)
        return self.add(loss, balance_loss) if self.has_experts else loss

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Inputs of one step of ``generate``: all prompts flattened, or one token of each row."""
        if not self.use_past:
            if self.requests is not None:
                raise UsageError(
                    "use_past is False, but with extend_method DYNAMIC_NTK only the cache gives each request "
                    "a rotary factor of its own; set use_past: True."
                )
            return {"input_ids": Tensor(input_ids.astype(np.int32))}
        if self.has_experts:
            for layer in self.model.layers:
                layer.feed_forward.ffn.transpose()
        inputs = step_inputs(self.config, self.kernels, self.requests, input_ids, **kwargs)
        if not self.config.is_dynamic:
            find_graph_again(self, "prefill" if kwargs["prefill"] else "increment", inputs)
        return inputs

    def set_dynamic_inputs(self, **kwargs):
        """Compile one graph for prompts and batches of every size."""
        if self.use_past:
            self.set_inputs(**dynamic_inputs(self.config))

    def get_model_parameters(self):
        """The trainable parameters, as MindFormers' optimizers ask for them."""
        return set(self.trainable_params())

    def add_flags_custom(self, is_first_iteration):
        """Switch between the prefill and the decode graph."""
        self.add_flags(is_first_iteration=is_first_iteration)
