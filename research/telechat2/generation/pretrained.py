"""MindFormers' generate, for a model with a paged cache."""

from copy import deepcopy
from functools import partial

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from research.telechat2.compat.install import PluginModel
from research.telechat2.compat.library import GenerationConfig, get_valid_length_each_example
from research.telechat2.config.generation_limits import GenerationLimits
from research.telechat2.config.optimization import check_seed
from research.telechat2.config.sampling import check_spelling
from research.telechat2.generation.chunked_prefill import read_in_chunks
from research.telechat2.generation.padding import Rows, check_ids, pad_rows
from research.telechat2.generation.sampling import Sampling, check_finite, next_token, row_generators


def find_graph_again(cell: nn.Cell, phase: str, inputs: dict) -> None:
    """Make ``cell`` choose its graph anew if the shapes of ``inputs`` are not those of its last call.

    In the phases "prefill" and "increment" MindSpore runs the graph it ran last without looking at shapes,
    which fails where each shape has a graph of its own. Graphs that are compiled already are found again.
    """
    shapes = [value.shape for value in inputs.values()]
    if cell.last_shapes.get(phase) != shapes:
        cell.phase_cache.pop(phase, None)
        cell.last_shapes[phase] = shapes


def _ids_of(value) -> set:
    return set(value) if isinstance(value, list | tuple) else {value}


class PreTrainedModel(PluginModel):
    """MindFormers' model, whose next tokens are chosen by rules of our own: see generation/sampling.py."""

    rows = Rows

    def generate(self, input_ids, generation_config=None, *args, seed=None, **kwargs):
        """MindFormers' ``generate``, which with DYNAMIC_NTK passes every row's limit to every step.

        ``input_ids`` may be Rows: then no id is taken for padding, whatever ``pad_token_id`` is.
        ``longest`` ``[B]``: tokens that prompt and answer of each row may have, where ``max_new_tokens`` or
        ``max_length`` do not give it; see RequestLengths. ``seed``: of sampling; None goes on
        with NumPy's global random numbers.

        Raises:
            UsageError: a setting of sampling is none or misspelt, the seed is none, an id is no row of the
                embedding, the blocks of the cache may run out, or the logits of a step are no numbers.
        """
        check_seed(seed)
        if isinstance(kwargs.get("eos_token_id"), int):
            kwargs["eos_token_id"] = [kwargs["eos_token_id"]]
        if isinstance(input_ids, Rows):
            preferred = (kwargs.get("pad_token_id"), self.config.pad_token_id)
            ends = _ids_of(kwargs.get("eos_token_id")) | _ids_of(self.config.eos_token_id)
            input_ids, kwargs["pad_token_id"] = pad_rows(
                input_ids, [padding for padding in preferred if padding not in ends]
            )
        settings = deepcopy(generation_config or GenerationConfig.from_model_config(self.config))
        check_spelling(settings.update(**kwargs))
        self.sampling = Sampling.of(settings)
        rows = np.array(input_ids)
        rows = rows.reshape(-1, rows.shape[-1])
        lengths, _ = get_valid_length_each_example(rows, settings.pad_token_id or 0)
        check_ids(rows, lengths, self.config.vocab_size)
        self.prompt_lengths = lengths
        self.random = row_generators(len(lengths), seed) if self.sampling.do_sample else None
        if not self.config.use_past:
            return super().generate(input_ids, generation_config, *args, **kwargs)
        new = settings.max_new_tokens
        max_length = min(settings.max_length, self.config.seq_length) if new is None else None
        limits = GenerationLimits.of(self.config, max_length, new)
        limits.check_cache(lengths)
        if self.config.extend_method == "DYNAMIC_NTK" and kwargs.get("longest") is None:
            by_prompt = self.config.extend_by_prompt
            kwargs["longest"] = lengths if by_prompt else np.array([limits.end(n) for n in lengths])
        try:
            return super().generate(input_ids, generation_config, *args, **kwargs)
        except BaseException:
            self.block_mgr = None  # or the blocks of an interrupted answer would never be free again
            raise

    def forward(self, input_ids, valid_length_each_example, *, prefill=None, **kwargs):
        """MindFormers' ``forward``, which reads prompts in pieces with ``prefill_chunk``."""
        lengths = valid_length_each_example
        if not (prefill and self.config.use_past and 0 < self.config.prefill_chunk < np.sum(lengths)):
            return super().forward(input_ids, lengths, prefill=prefill, **kwargs)

        def run(input_ids, *, prefill, **step):
            inputs = self.prepare_inputs_for_generation(input_ids, prefill=prefill, **step)
            return self._incremental_infer(inputs, prefill, None)

        logits = read_in_chunks(run, self.config, input_ids, lengths, **kwargs)
        return logits, np.arange(len(lengths))

    def get_logits_processor(self, generation_config, input_ids_seq_length, logits_processor):
        """The processors that a caller gives; MindFormers' own are not used."""
        return logits_processor

    @staticmethod
    def get_logits_warper(generation_config):
        """None of MindFormers' warpers."""

    def postprocess(
        self,
        input_ids,
        is_finished,
        res,
        generation_config,
        valid_length_each_example,
        current_index,
        logits_processor=None,
        logits_warper=None,
        need_gather_logits=True,
    ):
        """The next token of every row that is not finished, as MindFormers' ``postprocess`` returns them.

        ``input_ids`` ``[B, seq_length]``; ``is_finished`` and ``valid_length_each_example`` ``[B]``; ``res``:
        logits ``[B, V]``, or without a cache ``[B * seq_length, V]``, of which ``current_index`` ``[B]`` are
        the rows. ``logits_processor``: a caller's own processors.

        Returns:
            Tokens ``[B]`` ([] for a finished row), scores and logits ``[B, V]`` where they are asked for
            (else None), ``is_finished``.

        Raises:
            UsageError: logits are NaN or infinite.
        """
        logits = res[0] if isinstance(res, tuple) else res
        logits = logits.reshape((-1, logits.shape[-1]))
        if need_gather_logits and logits.shape[0] > len(current_index):
            logits = logits[Tensor(current_index, ms.int32)]
        logits = logits.asnumpy()
        rows, wanted = len(is_finished), generation_config.return_dict_in_generate
        scores = logits.copy() if wanted and generation_config.output_scores else None
        targets = [[] for _ in range(rows)]
        for row in (row for row in range(rows) if not is_finished[row]):
            length, prompt = int(valid_length_each_example[row]), int(self.prompt_lengths[row])
            check_finite(logits[row], length - prompt + 1, length, row, rows)
            tokens = input_ids[row, :length]
            more = partial(_processed, logits_processor, tokens) if logits_processor else None
            random = self.random[row] if self.random else None
            targets[row], chosen_by = next_token(logits[row], tokens, prompt, self.sampling, random, more)
            if scores is not None:
                scores[row] = chosen_by
        return targets, scores, logits if wanted and generation_config.output_logits else None, is_finished


def _processed(processors, tokens, scores: np.ndarray) -> np.ndarray:
    """Scores ``[V]`` after the processors of a caller."""
    return processors(tokens[None], scores[None].astype(np.float32), [False])[0].astype(np.float64)
