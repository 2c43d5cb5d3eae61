"""What YAMLs name in ``auto_register``: MindFormers runs a copy of this file, so it only re-exports."""

from research.telechat2.infer.telechat import ParallelTelechatForCausalLM
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_callback import TelechatMonitor
from research.telechat2.telechat_compat import MFTrainOneStepCell
from research.telechat2.telechat_config import TelechatConfig
from research.telechat2.telechat_metric import TelechatPerplexity
from research.telechat2.telechat_tokenizer import TelechatTokenizer

__all__ = [
    "MFTrainOneStepCell",
    "ParallelTelechatForCausalLM",
    "TelechatConfig",
    "TelechatForCausalLM",
    "TelechatMonitor",
    "TelechatPerplexity",
    "TelechatTokenizer",
]
