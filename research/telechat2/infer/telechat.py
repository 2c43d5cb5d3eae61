"""ParallelTelechatForCausalLM: prediction with a paged cache by one process or several."""

import mindspore as ms

from research.telechat2.checkpoint.layouts.read import weights_of_rank
from research.telechat2.checkpoint.loading import load_tensors
from research.telechat2.checkpoint.sizes import sizes_of_model
from research.telechat2.common.errors import UsageError
from research.telechat2.compat.library import MindFormerModuleType, MindFormerRegister
from research.telechat2.infer.telechat_transformers import (
    JoinedDecoderLayer,
    JoinedLogits,
    ParallelEmbedding,
)
from research.telechat2.model.tensor_parallel_group import ranks_of
from research.telechat2.telechat import LM_HEAD_SIGMA, TelechatForCausalLM, TelechatModel
from research.telechat2.telechat_layer import TelechatEmbedding, TelechatLinear
from research.telechat2.telechat_transformer import TelechatDecoderLayer


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class ParallelTelechatForCausalLM(TelechatForCausalLM):
    """TeleChat2 for prediction by ``parallel_config.model_parallel`` processes, which share the weights.

    Every process gets the same inputs, those of TelechatForCausalLM with a cache, and returns the same logits
    ``[B, V]`` float32. Its blocks of the cache hold the keys and values of its heads.

    Raises:
        UsageError: ``use_past`` is not set, sizes do not divide, or another number of processes runs.
    """

    def parts(self, config):
        """The decoder stack and the output projection of this process."""
        if not config.use_past:
            raise UsageError(
                "use_past is False, but ParallelTelechatForCausalLM predicts with a cache only; set "
                "model_config.use_past: True, or model.arch.type: TelechatForCausalLM."
            )
        ranks = ranks_of(config)
        shared = ranks.size > 1
        layer = JoinedDecoderLayer if config.qkv_concat else TelechatDecoderLayer
        model = TelechatModel(
            config,
            tok_embeddings=ParallelEmbedding(config, ranks) if shared else TelechatEmbedding(config),
            layers=[layer(config, ranks) for _ in range(config.num_layers)],
            ranks=ranks,
        )
        self.ranks, self.shared = ranks, shared
        if shared:
            self.joined_logits = JoinedLogits(ranks)
        head = TelechatLinear(
            config.hidden_size, config.vocab_size // ranks.size, config, sigma=LM_HEAD_SIGMA
        )
        return model, head

    def load_weights(self, path) -> None:
        """Fill all parameters from a checkpoint of any layout, of which only this process's rows are read.

        ``path``: a Hugging Face folder, a MindSpore file or folder, or a folder of ``rank_*``, see
        weights_of_rank.

        Raises:
            UsageError: names, shapes or sizes are not this model's; nothing is loaded then.
        """
        weights = weights_of_rank(
            path, sizes_of_model(self.config), tensor_parallel=self.ranks.size, rank=self.ranks.rank,
            qkv_concat=self.config.qkv_concat,
        )  # fmt: skip
        load_tensors(self, weights, str(path))

    def load_checkpoint(self, config) -> None:
        """Load what ``checkpoint_name_or_path`` names, if it does."""
        if config.checkpoint_name_or_path:
            self.load_weights(config.checkpoint_name_or_path)

    def _logits(self, hidden):
        logits = self.lm_head(hidden)
        return self.cast(self.joined_logits(logits) if self.shared else logits, ms.float32)
