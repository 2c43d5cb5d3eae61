"""ParallelTelechatForCausalLM: prediction with a paged cache by one process or several."""

from research.telechat2.checkpoint.layouts.read import weights_of_rank
from research.telechat2.checkpoint.loading import load_tensors
from research.telechat2.checkpoint.sizes import sizes_of_model
from research.telechat2.common.errors import UsageError
from research.telechat2.compat.library import MindFormerModuleType, MindFormerRegister
from research.telechat2.infer.tensor_parallel import exchange_cells, ranks_of
from research.telechat2.telechat import TelechatForCausalLM


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class ParallelTelechatForCausalLM(TelechatForCausalLM):
    """TeleChat2 for prediction by ``parallel_config.model_parallel`` processes, which share the weights.

    Every process gets the same inputs, those of TelechatForCausalLM with a cache, and returns the same logits
    ``[B, V]`` float32. Its blocks of the cache hold the keys and values of its heads.

    Raises:
        UsageError: ``use_past`` is not set, sizes do not divide, or another number of processes runs.
    """

    def distribute(self, config) -> None:
        """Keep this process's part of the model."""
        if not config.use_past:
            raise UsageError(
                "use_past is False, but ParallelTelechatForCausalLM predicts with a cache only; set "
                "model_config.use_past: True, or model.arch.type: TelechatForCausalLM."
            )
        self.ranks = ranks_of(config)
        exchange_cells(self, config, self.ranks)

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
