"""The sections of a YAML: every key that MindFormers 1.9 or this project reads, and what its value may be.

MindFormers refuses unknown keys of some sections minutes after the start, and passes over those of others. A
test compares these tables with MindFormers' own. Kinds: see kinds.py.
"""

from research.telechat2.config.fields import kinds_of
from research.telechat2.config.kinds import table
from research.telechat2.config.moe import ExpertSection
from research.telechat2.config.plan_settings import (
    ParallelSettings,
    RecomputeSettings,
    RunnerSettings,
    SwapSettings,
)

TOP_LEVEL = table(
    # the sections
    "parallel_config:section recompute_config:section swap_config:section moe_config:section "
    "runner_config:section parallel:section context:section train_dataset:section "
    "train_dataset_task:section processor:section eval_dataset:section eval_dataset_task:section "
    "trainer:section model:section runner_wrapper:section optimizer:section lr_schedule:section "
    "metric:section|sections callbacks:sections monitor_config:section eval_callbacks:sections "
    "checkpoint:section tensorboard:section grouped_lr_schedule:section "
    # the run
    "seed:whole|null output_dir:text run_mode:text use_parallel:bool resume_training:bool|text|null "
    "print_separate_loss:bool load_checkpoint:text load_ckpt_format:text auto_trans_ckpt:bool|null "
    "transform_process_num:whole|null src_strategy_path_or_dir:text only_save_strategy:bool "
    "load_ckpt_async:bool use_legacy:bool use_legacy_format:bool pretrained_model_dir:text "
    "balanced_load:bool reshard_worker_num:whole do_eval:bool eval_step_interval:whole "
    "eval_epoch_interval:whole ignore_data_skip:bool data_skip_steps:whole|null remove_redundancy:bool "
    "transform_by_rank:bool npu_num_per_node:whole|null use_checkpoint_health_monitor:bool "
    "use_graceful_exit:bool resume_by_last_timestamp_ckpt:bool calculate_per_token_loss:bool "
    "check_for_nan_in_loss_and_grad:bool micro_batch_interleave_num:whole|null remote_save_url:text "
    # profiling
    "profile:bool profile_communication:bool profile_memory:bool init_start_profile:bool "
    "profile_start_step:whole profile_stop_step:whole profile_rank_ids:list|null profile_pipeline:bool "
    "profile_level:whole profile_output:text profiler_level:whole with_stack:bool data_simplification:bool "
    "mstx:bool "
    # the learning rate of layers
    "layer_scale:bool layer_decay:real lr_scale:bool lr_scale_factor:real "
    # prediction
    "save_file:text input_data:any predict_batch_size:whole|null exclude_cann_cpu:bool "
    "train_precision_sync:bool|null infer_precision_sync:bool|null postprocess_use_numpy:bool"
)
_DATASET = table(
    "data_loader:section input_columns:texts output_columns:texts|null construct_args_key:texts|null "
    "num_parallel_workers:count python_multiprocessing:bool drop_remainder:bool numa_enable:bool "
    "prefetch_size:count batch_size:whole repeat:count seed:whole profile:bool auto_tune:bool "
    "filepath_prefix:text autotune_per_step:whole eod_reset:bool eod_token_id:whole|null dynamic_batch:bool "
    "divisor:whole remainder:whole token_monitor:bool token_monitor_config:section shuffle:bool|text "
    "max_length:whole mock_config:section"
)
# Sections by their path. Sections whose keys are those of the class that ``type`` names: classes.py.
SECTIONS = {
    "": TOP_LEVEL,
    "parallel_config": kinds_of(ParallelSettings),
    "recompute_config": kinds_of(RecomputeSettings),
    "swap_config": kinds_of(SwapSettings),
    "runner_config": kinds_of(RunnerSettings),
    "parallel": table(
        "device_num:whole|null global_rank:whole|null gradients_mean:bool gradient_fp32_sync:bool "
        "loss_repeated_mean:bool pipeline_stages:whole auto_pipeline:bool pipeline_result_broadcast:bool "
        "pipeline_segments:whole parallel_mode:whole|text search_mode:text auto_parallel_search_mode:text "
        "parameter_broadcast:bool strategy_ckpt_load_file:text strategy_ckpt_save_file:text "
        "group_ckpt_save_file:text full_batch:bool dataset_strategy:text|list enable_parallel_optimizer:bool "
        "force_fp32_communication:bool parallel_optimizer_config:section|null pipeline_config:section|null "
        "grad_accumulation_step:whole all_reduce_fusion_config:list communi_parallel_mode:text "
        "optimizer_weight_shard_size:whole optimizer_weight_shard_aggregated_save:bool "
        "sharding_propagation:bool enable_alltoall:bool strategy_ckpt_config:section comm_fusion:section "
        "dump_local_norm:bool dump_local_norm_path:text dump_device_local_norm:bool "
        "auto_parallel_new_interface:bool init_param_in_compile:bool"
    ),
    "parallel.parallel_optimizer_config": table(
        "gradient_accumulation_shard:bool parallel_optimizer_threshold:whole "
        "optimizer_weight_shard_size:whole optimizer_level:text"
    ),
    "parallel.pipeline_config": table("pipeline_interleave:bool pipeline_scheduler:text"),
    "parallel.strategy_ckpt_config": table(
        "load_file:text save_file:text only_trainable_params:bool"
    ),
    "context": table(
        "mode:whole device_target:text device_id:whole max_device_memory:gigabytes "
        "mempool_block_size:gigabytes memory_optimize_level:text save_graphs:bool|whole "
        "save_graphs_path:text max_call_depth:count ascend_config:section dataset_broadcast_opt_level:whole "
        "jit_config:section jit_level:level infer_boost:text affinity_cpu_list:section|null "
        "affinity_config:section|text|null"
    ),
    "context.jit_config": table("jit_level:level infer_boost:text"),
    "context.ascend_config": table(
        "precision_mode:text jit_compile:any atomic_clean_policy:whole matmul_allow_hf32:bool "
        "conv_allow_hf32:bool exception_dump:any op_precision_mode:text op_debug_option:text "
        "ge_options:section parallel_speed_up_json_path:text host_scheduling_max_threshold:whole "
        "hccl_watchdog:bool topo_order:section cur_step_num:whole save_checkpoint_steps:whole need_ckpt:bool "
        "last_triggered_step:whole"
    ),
    "moe_config": kinds_of(ExpertSection),
    "checkpoint": table(
        "load_path:text no_load_optim:bool load_balanced:bool reshard_worker_num:whole save_path:text "
        "prefix:prefix save_max:whole save_interleaved_steps:whole no_save_optim:bool async_save:bool "
        "save_remove_redundancy:bool"
    ),
    "monitor_config": table(
        "monitor_on:bool dump_path:text target:any invert:bool step_interval:whole local_loss_format:any "
        "local_norm_format:any device_local_norm_format:any device_local_loss_format:any "
        "optimizer_state_format:any weight_state_format:any max_attention_logit_format:any "
        "throughput_baseline:real|null print_struct:bool check_for_global_norm:bool "
        "global_norm_spike_threshold:real global_norm_spike_count_threshold:whole stable_rank_config:section "
        "health_checkpoint:any"
    ),
    "monitor_config.stable_rank_config": table(
        "format:any step_interval:whole target:any do_aggregation:bool moe_show_mode:text "
        "power_iteration_num:whole"
    ),
    "tensorboard": table(
        "tensorboard_dir:text tensorboard_queue_size:whole log_loss_scale_to_tensorboard:bool "
        "log_timers_to_tensorboard:bool"
    ),
    "grouped_lr_schedule": table("default:section grouped:list"),
    "processor": table(
        "type:text return_tensors:text tokenizer:section image_processor:section audio_processor:section "
        "max_length:whole padding:bool|text auto_register:text"
    ),
    "train_dataset": _DATASET,
    "eval_dataset": _DATASET,
    "train_dataset_task.dataset_config": _DATASET,
    "eval_dataset_task.dataset_config": _DATASET,
    "model": table("model_config:section arch:section"),
    "model.arch": table("type:text auto_register:text"),
}  # fmt: skip
