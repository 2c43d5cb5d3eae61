"""The classes that YAMLs name: importing this file registers them with MindFormers."""
# ruff: noqa: F401

from research.telechat2.infer.telechat import ParallelTelechatForCausalLM
from research.telechat2.run.monitor import TelechatMonitor
from research.telechat2.run.perplexity import TelechatPerplexity
from research.telechat2.run.train_step import MFTrainOneStepCell
from research.telechat2.telechat import TelechatForCausalLM
from research.telechat2.telechat_config import TelechatConfig
from research.telechat2.telechat_tokenizer import TelechatTokenizer
