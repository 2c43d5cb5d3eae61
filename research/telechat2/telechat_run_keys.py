"""The keys that MindFormers 1.9 reads where it does not say itself that it knows no other.

It refuses unknown keys of `runner_config`, `parallel_config` and the like; a mistyped key of the sections
`checkpoint:` and `context:`, or a mistyped section, it passes over. TelechatConfig checks model_config.
"""

from research.telechat2.telechat_run_config import did_you_mean


def _names(text: str) -> list[str]:
    return text.split()


SECTIONS = _names(
    "parallel_config recompute_config swap_config moe_config runner_config parallel context train_dataset "
    "train_dataset_task processor eval_dataset eval_dataset_task trainer model runner_wrapper optimizer "
    "lr_schedule metric callbacks monitor_config eval_callbacks checkpoint tensorboard grouped_lr_schedule"
)
TOP_LEVEL = _names(
    "seed output_dir run_mode use_parallel resume_training print_separate_loss load_checkpoint "
    "load_ckpt_format auto_trans_ckpt transform_process_num src_strategy_path_or_dir only_save_strategy "
    "load_ckpt_async use_legacy use_legacy_format pretrained_model_dir balanced_load reshard_worker_num "
    "do_eval eval_step_interval eval_epoch_interval ignore_data_skip data_skip_steps profile "
    "profile_communication profile_memory init_start_profile profile_start_step profile_stop_step "
    "profile_rank_ids profile_pipeline profile_level mstx layer_scale layer_decay lr_scale lr_scale_factor "
    "micro_batch_interleave_num remote_save_url save_file input_data predict_batch_size exclude_cann_cpu "
    "train_precision_sync infer_precision_sync postprocess_use_numpy remove_redundancy transform_by_rank "
    "npu_num_per_node use_checkpoint_health_monitor use_graceful_exit resume_by_last_timestamp_ckpt"
)
TEMPLATE = {section: {} for section in SECTIONS} | {"": dict.fromkeys(TOP_LEVEL)}  # of ``apply_overrides``
KEYS = {
    "checkpoint": _names(
        "load_path no_load_optim load_balanced reshard_worker_num save_path prefix save_max "
        "save_interleaved_steps no_save_optim async_save save_remove_redundancy"
    ),
    "context": _names(
        "mode device_target device_id max_device_memory mempool_block_size memory_optimize_level save_graphs "
        "save_graphs_path max_call_depth ascend_config dataset_broadcast_opt_level jit_config jit_level "
        "infer_boost affinity_cpu_list affinity_config"
    ),
}


def check_keys(config: dict) -> None:
    """Refuse keys that nothing reads: at the top, in ``checkpoint`` and in ``context``.

    Raises:
        ValueError: with the key and the nearest known one.
    """
    _check(config, [*SECTIONS, *TOP_LEVEL], "")
    for section, known in KEYS.items():
        if not isinstance(config.get(section) or {}, dict):
            raise ValueError(f"`{section}` is {config[section]!r}; expected a section of settings.")
        _check(config.get(section) or {}, known, f"{section}.")


def _check(settings: dict, known: list[str], where: str) -> None:
    for key in settings:
        if key not in known:
            raise ValueError(
                f"the setting {where}{key} is read by nothing in MindFormers 1.9; remove or correct it. "
                f"{did_you_mean(str(key), known)}"
            )
