"""The keys that MindFormers 1.9 reads where it does not say itself that it knows no other.

It refuses unknown keys of `runner_config`, `parallel_config` and the like; a mistyped key of the sections
`checkpoint:` and `context:`, or a mistyped section, it passes over. TelechatConfig checks model_config. The
keys of `moe_config:` are here for prediction without MindFormers' Trainer.
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
    "npu_num_per_node use_checkpoint_health_monitor use_graceful_exit resume_by_last_timestamp_ckpt "
    "calculate_per_token_loss"
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
    "moe_config": _names(
        "expert_num capacity_factor aux_loss_factor num_experts_chosen expert_group_size group_wise_a2a "
        "comp_comm_parallel comp_comm_parallel_degree save_token_distribution cur_layer "
        "enable_cold_hot_expert update_step hot_expert_num cold_token_percent moe_module_name routing_policy "
        "norm_topk_prob enable_sdrop use_fused_ops_topkrouter router_dense_type shared_expert_num "
        "use_shared_expert_gating max_router_load topk_method topk_group n_group first_k_dense_replace "
        "moe_intermediate_size routed_scaling_factor aux_loss_types aux_loss_factors z_loss_factor "
        "balance_via_topk_bias topk_bias_update_rate use_allgather_dispatcher moe_shared_expert_overlap "
        "expert_model_parallel use_gating_sigmoid enable_deredundency npu_nums_per_device use_gmm "
        "enable_gmm_safe_tokens use_fused_ops_permute callback_moe_droprate dispatch_global_max_bs "
        "ep_extend_tp"
    ),
}


def check_keys(config: dict) -> None:
    """Refuse keys that nothing reads: at the top, and in the sections of ``KEYS``.

    Raises:
        ValueError: with the key and the nearest known one.
    """
    _check(config, [*SECTIONS, *TOP_LEVEL], "")
    for section in KEYS:
        _check_section(config, section)
    moe_section(config)


def moe_section(config: dict) -> dict:
    """The section ``moe_config`` of a YAML, its keys checked; empty for a dense model.

    Raises:
        ValueError: it holds an unknown key, or stands in ``model_config``, where the Trainer replaces it.
    """
    if ((config.get("model") or {}).get("model_config") or {}).get("moe_config") is not None:
        raise ValueError(
            "moe_config stands in model.model_config, where MindFormers' Trainer replaces it, by that of a "
            "dense model if there is no other; move it to the top of the YAML, as a section of its own."
        )
    return _check_section(config, "moe_config")


def _check_section(config: dict, section: str) -> dict:
    settings = config.get(section) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"`{section}` is {settings!r}; expected a section of settings.")
    _check(settings, KEYS[section], f"{section}.")
    return settings


def _check(settings: dict, known: list[str], where: str) -> None:
    for key in settings:
        if key not in known:
            raise ValueError(
                f"the setting {where}{key} is read by nothing in MindFormers 1.9; remove or correct it. "
                f"{did_you_mean(str(key), known)}"
            )
