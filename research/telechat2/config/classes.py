"""Sections whose ``type`` names a class: the classes that may be named there, and the arguments of each.

Only these are made without ``auto_register``: MindFormers would take any class that it or MindSpore has, some
of which start commands or read pickles. A test compares the arguments with the classes' own.
"""

from research.telechat2.config.kinds import table

OWN_KEYS = {"type": "text", "auto_register": "text"}
ANY = None  # arguments are not known here, and not checked

_RATE = "learning_rate:real warmup_steps:whole|null warmup_lr_init:real warmup_ratio:real|null "
_STEPS = "total_steps:whole|null "
_COSINE = table(
    _RATE + _STEPS + "num_cycles:real lr_end:real decay_steps:whole|null decay_ratio:real|null "
    "warmup_epochs:whole|null"
)
_LINEAR = table(_RATE + _STEPS + "warmup_epochs:whole|null")
_RESTARTS = table(
    _RATE + _STEPS + "num_cycles:real lr_end:real decay_steps:whole|null warmup_epochs:whole|null"
)
_POLYNOMIAL = table(_RATE + _STEPS + "lr_end:real power:real decay_steps:whole|null warmup_epochs:whole|null")
_ANNEALING = table(
    "base_lr:real learning_rate:real|null t_max:whole eta_min:real total_steps:whole|null "
    "warmup_epochs:whole|null"
)
_WARM_RESTARTS = table(
    "base_lr:real learning_rate:real|null t_0:whole t_mult:whole eta_min:real total_steps:whole|null "
    "warmup_epochs:whole|null"
)
_ADAMW = (
    "learning_rate:real|section betas:reals eps:real weight_decay:real|section use_fused:bool amsgrad:bool "
    "maximize:bool swap:bool "
)
_WRAPPER = (
    "use_clip_grad:bool max_grad_norm:real scale_sense:real|section local_norm:bool "
    "global_norm_spike_threshold:real use_skip_data_by_global_norm:bool calculate_per_token_loss:bool "
    "print_separate_loss:bool "
)
_SCALE = "loss_scale_value:real scale_factor:whole scale_window:whole "
_SAVING = (
    "prefix:prefix directory:text config:any save_checkpoint_steps:whole save_checkpoint_seconds:whole "
    "keep_checkpoint_max:whole keep_checkpoint_per_n_minutes:whole integrated_save:bool "
    "save_network_params:bool save_trainable_params:bool async_save:bool|text saved_network:any "
    "append_info:any enc_key:any enc_mode:text exception_save:bool global_batch_size:whole|null "
    "checkpoint_format:text remove_redundancy:bool embedding_size:whole embedding_local_norm_threshold:real "
    "use_checkpoint_health_monitor:bool health_ckpts_record_dir:text use_legacy_format:bool "
    "save_optimizer:bool"
)
_ADAM = table(
    "learning_rate:real|section beta1:real beta2:real eps:real use_locking:bool use_nesterov:bool "
    "weight_decay:real loss_scale:real"
)
_SGD = table(
    "learning_rate:real|section momentum:real dampening:real weight_decay:real nesterov:bool loss_scale:real"
)
# MindSpore's other optimizers, whose arguments are not known here.
_OTHER_OPTIMIZERS = (
    "ASGD AdaFactor AdaMax Adadelta Adagrad FTRL LARS Lamb LazyAdam ProximalAdagrad RMSProp Rprop adafactor "
    "adagrad"
)
_CALLBACK_STEPS = (
    "origin_epochs:whole|null dataset_size:whole|null initial_epoch:whole initial_step:whole "
    "global_batch_size:whole check_for_nan_in_loss_and_grad:bool "
)
GROUPS: dict[str, dict[str, dict[str, str] | None]] = {
    "lr_schedule": {
        "CosineWithWarmUpLR": _COSINE,
        "cosine": _COSINE,
        "ConstantWarmUpLR": _LINEAR,
        "constant_with_warmup": _LINEAR,
        "LinearWithWarmUpLR": _LINEAR,
        "linear": _LINEAR,
        "CosineWithRestartsAndWarmUpLR": _RESTARTS,
        "cosine_with_restarts": _RESTARTS,
        "PolynomialWithWarmUpLR": _POLYNOMIAL,
        "polynomial": _POLYNOMIAL,
        "CosineAnnealingLR": _ANNEALING,
        "cosine_annealing": _ANNEALING,
        "CosineAnnealingWarmRestarts": _WARM_RESTARTS,
        "cosine_annealing_warm_restarts": _WARM_RESTARTS,
        "ConstantWithCoolDownLR": table(
            _RATE + _STEPS + "keep_steps:whole decay_steps:whole|null decay_ratio:real|null num_cycles:real "
            "lr_end1:real final_steps:whole lr_end2:real|null warmup_epochs:whole|null"
        ),
        "WarmUpStableDecayLR": table(
            _RATE + _STEPS + "lr_end:real decay_start_steps:whole|null decay_start_ratio:real|null "
            "warmup_epochs:whole|null"
        ),
        **dict.fromkeys(
            ("CosineDecayLR", "ExponentialDecayLR", "InverseDecayLR", "NaturalExpDecayLR",
             "PolynomialDecayLR", "WarmUpLR"), ANY,
        ),
    },
    "optimizer": {
        "AdamW": table(_ADAMW),
        "PmaAdamW": table(
            _ADAMW + "fused_num:whole interleave_step:whole fused_algo:text ema_alpha:real"
        ),
        "Came": table(
            "learning_rate:real|null eps:reals clip_threshold:real decay_rate:real beta1:real beta3:real "
            "weight_decay:real scale_parameter:bool relative_step:bool warmup_init:bool compression:bool "
            "loss_scale:real"
        ),
        "AdamWeightDecay": table(
            "learning_rate:real beta1:real beta2:real eps:real weight_decay:real betas:reals"
        ),
        **dict.fromkeys(("Adam", "adam"), _ADAM | table("use_amsgrad:bool use_lazy:bool use_offload:bool")),
        "AdamOffload": _ADAM,
        **dict.fromkeys(("SGD", "sgd"), _SGD),
        "Momentum": table(
            "learning_rate:real|section momentum:real weight_decay:real loss_scale:real use_nesterov:bool"
        ),
        "Muon": ANY,
        **dict.fromkeys(_OTHER_OPTIMIZERS.split(), ANY),
    },
    "runner_wrapper": {
        "MFTrainOneStepCell": table(_WRAPPER),
        "MFPipelineWithLossScaleCell": table(_WRAPPER + "micro_batch_num:whole"),
        "TrainOneStepCell": ANY,
        "TrainOneStepWithLossScaleCell": ANY,
        "loss_scale_wrapper": ANY,
    },
    "scale_sense": {
        "DynamicLossScaleUpdateCell": table(_SCALE),
        "FixedLossScaleUpdateCell": table("loss_scale_value:real"),
        "AdaptiveLossScaleUpdateCell": table(_SCALE + "max_scale_window:whole min_scale_window:whole"),
    },
    "callback": {
        "MFLossMonitor": table(
            _CALLBACK_STEPS + "learning_rate:any per_print_times:whole micro_batch_num:whole "
            "micro_batch_interleave_num:whole gradient_accumulation_steps:whole "
            "calculate_per_token_loss:bool print_separate_loss:bool"
        ),
        "CheckpointMonitor": table(_SAVING),
        "TelechatMonitor": table("history:text"),
        "SummaryMonitor": ANY,
        "TrainingStateMonitor": table(
            _CALLBACK_STEPS + "config:any step_interval:whole micro_batch_num:whole "
            "tensor_model_parallel_size:whole use_skip_data_by_global_norm:bool embedding_size:whole "
            "use_local_norm:bool"
        ),
        "ProfileMonitor": table(
            "start_step:whole stop_step:whole output_path:text start_profile:bool profile_rank_ids:list|null "
            "profile_pipeline:bool profile_communication:bool profile_memory:bool config:any "
            "profiler_level:whole with_stack:bool data_simplification:bool mstx:bool"
        ),
        "TrainCallBack": table("stop_step:whole|null"),
        "ColdHotExpertMonitor": ANY,
        "StressDetectCallBack": table(
            "detection_interval:whole|null num_detections:whole|null dataset_size:whole|null"
        ),
        "SDCMonitor": table(
            "initial_step:whole step_interval:whole strike_window_time:whole strike_num:whole "
            "checksum_time:whole checksum_cooldown_time:whole"
        ),
        "MaxLogitsMonitor": ANY,
        "MoEDropRateCallback": ANY,
        "TopkBiasBalanceCallback": ANY,
        "ExpertMigrateCallback": ANY,
        "OnRequestExit": table(
            "save_ckpt:bool save_mindir:bool file_name:text directory:text config_file:text sig:whole"
        ),
        "EarlyStopping": table(
            "monitor:text min_delta:real patience:whole verbose:bool mode:text baseline:real|null "
            "restore_best_weights:bool"
        ),
        "ReduceLROnPlateau": table(
            "monitor:text factor:real patience:whole verbose:bool mode:text min_delta:real cooldown:whole "
            "min_lr:real"
        ),
        "LossMonitor": table("per_print_times:whole"),
        "TimeMonitor": table("data_size:whole|null data_time:bool"),
        "TrainFaultTolerance": ANY,
        "FlopsUtilizationCollector": ANY,
        "History": {},
    },
    "metric": dict.fromkeys(
        ("PerplexityMetric", "TelechatPerplexity", "EntityScore", "ADGENMetric", "PromptAccMetric",
         "EmF1Metric", "Accuracy", "Loss", "Perplexity"), ANY,
    ),
    "data_loader": {
        "MindDataset": table(
            "dataset_dir:text dataset_files:text|texts columns_list:texts|null "
            "num_parallel_workers:count|null shuffle:bool|null num_shards:whole|null shard_id:whole|null "
            "sampler:any padded_sample:any num_padded:whole|null num_samples:count|null cache:any"
        ),
        "TFRecordDataset": table(
            "dataset_dir:text dataset_files:text|texts schema:any columns_list:texts|null "
            "num_samples:whole|null num_parallel_workers:whole|null shuffle:bool|text|null "
            "num_shards:whole|null shard_id:whole|null shard_equal_rows:bool cache:any compression_type:text"
        ),
        "HFDataLoader": ANY,
        "CommonDataLoader": ANY,
        "BlendedMegatronDatasetDataLoader": ANY,
    },
    "dataset_task": {
        name: table("dataset_config:section")
        for name in ("CausalLanguageModelDataset", "KeyWordGenDataset", "MultiTurnDataset", "GeneralDataset")
    },
    "trainer": {
        name: table("model_name:text") for name in ("CausalLanguageModelingTrainer", "GeneralTaskTrainer")
    },
    "tokenizer": {
        "TelechatTokenizer": table(
            "vocab_file:text unk_token:text bos_token:text eos_token:text pad_token:text usr_token:text "
            "bot_token:text sys_token:text add_bos_token:bool add_eos_token:bool "
            "clean_up_tokenization_spaces:bool additional_special_tokens:list name_or_path:text "
            "processor_class:text model_max_length:any max_len:any padding_side:text truncation_side:text "
            "model_input_names:list split_special_tokens:bool verbose:bool sep_token:text cls_token:text "
            "mask_token:text tokenizer_class:text chat_template:text prompt_format:text auto_map:any"
        ),
        "MindIETelechatTokenizer": ANY,
        **dict.fromkeys(
            ("LlamaTokenizer", "LlamaTokenizerFast", "ChatGLM2Tokenizer", "ChatGLM3Tokenizer",
             "ChatGLM4Tokenizer"), ANY,
        ),
    },
    # MindIE's are those of a folder that build_mindie_folder.py wrote; the others are MindFormers' own.
    "model": dict.fromkeys(
        ("TelechatForCausalLM", "ParallelTelechatForCausalLM", "MindIETelechatForCausalLM",
         "LlamaForCausalLM", "ChatGLM2ForConditionalGeneration", "ChatGLM2WithPtuning2"), ANY,
    ),
    "config": dict.fromkeys(
        ("TelechatConfig", "MindIETelechatConfig", "LlamaConfig", "ChatGLM2Config"), ANY
    ),
}  # fmt: skip
# The plugin's classes: found without auto_register, under any of the names that YAMLs use for their modules.
PLUGIN = (
    "MFTrainOneStepCell", "ParallelTelechatForCausalLM", "TelechatConfig", "TelechatForCausalLM",
    "TelechatMonitor", "TelechatPerplexity", "TelechatTokenizer",
)  # fmt: skip
TELECHAT_CONFIGS = ("TelechatConfig", "MindIETelechatConfig")
# Where a class of a group is named; ``[]``: the section is a list of such sections.
PLACES = {
    "trainer": "trainer",
    "optimizer": "optimizer",
    "lr_schedule": "lr_schedule",
    "grouped_lr_schedule.default": "lr_schedule",
    "grouped_lr_schedule.grouped[]": "lr_schedule",
    "runner_wrapper": "runner_wrapper",
    "runner_wrapper.scale_sense": "scale_sense",
    "metric": "metric",
    "metric[]": "metric",
    "callbacks[]": "callback",
    "eval_callbacks[]": "callback",
    "train_dataset.data_loader": "data_loader",
    "eval_dataset.data_loader": "data_loader",
    "train_dataset_task.dataset_config.data_loader": "data_loader",
    "eval_dataset_task.dataset_config.data_loader": "data_loader",
    "train_dataset_task": "dataset_task",
    "eval_dataset_task": "dataset_task",
    "processor.tokenizer": "tokenizer",
    "model.arch": "model",
    "model.model_config": "config",
}
